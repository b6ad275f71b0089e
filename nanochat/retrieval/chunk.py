"""Long texts cut into passages of whole words that overlap, each with its place in the text."""

from __future__ import annotations

import re
from itertools import islice

from nanochat.errors import UsageError

LONGEST_WORD = 100  # characters; what is longer (base64, scripts without spaces) counts as several words
_SPACES = " \n\t\r\x0b\x0c\x1c\x1d\x1e\x1f"  # of ASCII, all that part words
_IDEOGRAPHS = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # each counts as a word
_WORD = re.compile(rf"[{_IDEOGRAPHS}]|[^\s{_IDEOGRAPHS}]{{1,{LONGEST_WORD}}}")

Span = tuple[int, int]


def check_chunking(chunk_words: int, overlap_words: int) -> None:
    """Raises UsageError unless 0 <= overlap < chunk; 0 words a chunk means: never cut."""
    if chunk_words < 0 or not 0 <= overlap_words < max(chunk_words, 1):
        raise UsageError(
            f"chunk_words={chunk_words} and overlap_words={overlap_words}: words must be positive (0 keeps documents "
            "whole), and the overlap smaller"
        )


def spans(text: str, chunk_words: int, overlap_words: int) -> list[Span]:
    """Where to cut: (start, end) of each passage, from its first word's start to its last word's end.

    A text of up to `chunk_words` words stays whole: (0, length). Passages start every chunk_words - overlap_words
    words; the last one ends with the text, and each holds at least one word that the one before lacks."""
    if not chunk_words or len(text) <= chunk_words or _surely_short(text, chunk_words):
        return [(0, len(text))]
    if next(islice(_WORD.finditer(text), chunk_words, None), None) is None:
        return [(0, len(text))]
    words = [match.span() for match in _WORD.finditer(text)]
    step = chunk_words - overlap_words
    return [
        (words[first][0], words[min(first + chunk_words, len(words)) - 1][1])
        for first in range(0, max(len(words) - overlap_words, 1), step)
    ]


def _surely_short(text: str, chunk_words: int) -> bool:
    """True only for texts of up to so many words; many times faster than finding these."""
    if not text.isascii() or len(text) > 20 * chunk_words:
        return False
    if len(text) < 2 * chunk_words:
        return True
    return sum(map(text.count, _SPACES)) + len(text) // LONGEST_WORD < chunk_words
