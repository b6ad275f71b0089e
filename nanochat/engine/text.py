"""Tokens to text as it comes: never half a character, never a part of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Decoder(Protocol):
    """Turns tokens into text that will not change any more. `tokenizer.StreamDecoder` is one."""

    def feed(self, ids: int) -> str: ...

    def flush(self) -> str:
        """What is left at the end."""


class TextStream:
    """Turns one row's tokens into text that may be shown at once.

    Bytes that do not yet make a whole UTF-8 character are held back (by the decoder), and so is text that may turn out
    to be the beginning of a stop string. `stopped` becomes True when a stop string is complete: the text ends before.
    """

    def __init__(self, decoder: Decoder, stop: Sequence[str] = ()) -> None:
        self.decoder, self.stop = decoder, tuple(stop)
        self.held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that this token releases."""
        return self._release(self.decoder.feed(token), final=False)

    def finish(self) -> str:
        """What is still held at the end; an incomplete character becomes U+FFFD."""
        return self._release(self.decoder.flush(), final=True)

    def _release(self, text: str, final: bool) -> str:
        if self.stopped:
            return ""
        text = self.held + text
        ends = [at for at in (text.find(stop) for stop in self.stop) if at >= 0]
        if ends:
            self.stopped, self.held = True, ""
            return text[: min(ends)]
        keep = 0 if final else self._possible_beginning(text)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _possible_beginning(self, text: str) -> int:
        """The length of the longest end of `text` with which a stop string begins."""
        longest = min(len(text), max((len(stop) - 1 for stop in self.stop), default=0))
        for n in range(longest, 0, -1):
            if any(stop.startswith(text[-n:]) for stop in self.stop):
                return n
        return 0
