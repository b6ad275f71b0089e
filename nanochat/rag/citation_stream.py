"""An answer with its citations as text, while it is still being written."""

from __future__ import annotations

from collections.abc import Sequence

from nanochat.data.answers import ABSTENTION
from nanochat.rag.citations import resolve
from nanochat.tokenizer import StreamDecoder, Tokenizer


class CitationStream:
    """Tokens in, text out: what `citations.parse(...).render()` says of all tokens, piece by piece.

    The model cites before a sentence, the text shows the citation behind it: `[n]` comes out when the sentence has
    ended. Citations that name none of the documents with these `headings` leave no trace. A decoder for `Engine`.
    """

    def __init__(self, tokenizer: Tokenizer, headings: Sequence[str]) -> None:
        self.tokenizer, self.headings = tokenizer, list(headings)
        self._start, self._end = tokenizer.special("cite_start"), tokenizer.special("cite_end")
        self._abstain = tokenizer.special("abstain")
        self._decoder = StreamDecoder(tokenizer, skip_special=True)
        self._inside: list[int] | None = None  # the tokens of a citation that has not ended
        self._cited: list[int] = []
        self._blanks = ""  # held back: at its end a sentence loses them
        self._begun = False  # whether the sentence has said something
        self._fed = False  # whether it has any token, be it a blank
        self._any = False  # whether a sentence before has
        self.adrift = False  # as in `citations.Answer`, so far

    def feed(self, ids: int) -> str:
        """The text that this token releases."""
        if ids == self._start:
            self._inside = []
            return self._close()
        if self._inside is None:
            if ids == self._abstain and not self.begun:
                self._cited.clear()
                self.adrift = False
            if self.tokenizer.is_special(ids):
                return ""
            self._fed = True
            return self._say(self._decoder.feed(ids))
        if ids != self._end:
            self._inside.append(ids)
            return ""
        number = resolve(self.tokenizer.decode(self._inside), self.headings)
        if number:
            self._cited.append(number)
        else:
            self.adrift |= not self.begun
        self._inside = None
        return ""

    @property
    def begun(self) -> bool:
        """Whether anything was said but citations."""
        return self._fed or self._any

    def flush(self) -> str:
        """The citations of the last sentence."""
        return self._close()

    def _say(self, text: str) -> str:
        text = self._blanks + text
        if not self._begun:
            text = text.lstrip()
        said = text.rstrip()
        self._blanks = text[len(said) :]
        if not said:
            return ""
        joint = " " if self._any and not self._begun else ""
        self._begun = True
        return joint + said

    def _close(self) -> str:
        text = self._say(self._decoder.flush())
        self._blanks, self._fed = "", False
        if not self._begun:
            return text
        text += "".join(f" [{n}]" for n in dict.fromkeys(self._cited))
        self._cited.clear()
        self._begun, self._any = False, True
        return text


class GroundedStream(CitationStream):
    """The same of an answer from documents: one that only cites, or never ends its citation, is an abstention."""

    def flush(self) -> str:
        text = super().flush()
        return text if self._any else text + ABSTENTION
