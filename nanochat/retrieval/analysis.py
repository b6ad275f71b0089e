"""Texts to terms: one frozen recipe that an index stores and applies to its documents and to every query alike.

A text is cleaned (lone surrogates, Unicode forms, Chinese and Japanese cut into characters and pairs of them) and cut
into words, runs of letters and digits. Each word becomes a term: lower-cased, stemmed, stripped of accents. Stop words
stay in the index; a query drops them when other words remain, so "the who" still finds the band.

All in plain Python, also for tantivy's index: terms then depend on no library's version, and a table of the terms of
known words makes it faster than tantivy's own filters. Stemmers of languages other than English come from tantivy.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from itertools import pairwise
from typing import Any

from nanochat.errors import UsageError
from nanochat.retrieval import english
from nanochat.retrieval.document import clean_text

MAX_WORD_BYTES = 100  # longer "words" are base64, hashes and the like: not indexed
MAX_KNOWN_WORDS = 1 << 18  # in a table of terms, about 40 MB
LANGUAGES = (
    "arabic", "danish", "dutch", "english", "finnish", "french", "german", "greek", "hungarian", "italian", "norwegian",
    "portuguese", "romanian", "russian", "spanish", "swedish", "tamil", "turkish",
)  # fmt: skip
_WITHOUT_STOP_WORDS = ("arabic", "greek", "romanian", "tamil", "turkish")  # tantivy brings no list for these
_ASCII_CASED = bytes(c if chr(c).isalnum() and c < 128 else 32 for c in range(256))  # letters and digits, else spaces
_ASCII_LOWER = _ASCII_CASED.lower()
_CJK = re.compile("[\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f]+")
_UNDECOMPOSED = str.maketrans(
    {"ß": "ss", "æ": "ae", "œ": "oe", "ø": "o", "đ": "d", "ð": "d", "þ": "th", "ł": "l", "ı": "i", "ħ": "h"}
)
_ACCENTS = re.compile("[\u0300-\u036f]")


@dataclass(frozen=True, slots=True)
class Analyser:
    """How texts become terms. Raises UsageError for an unknown language."""

    language: str = "english"
    """Whose stemmer and stop words apply: a name in LANGUAGES, or "none". No word is refused in any case."""
    stem: bool = True
    """Whether inflected forms fall together: "wings" finds "wing"."""
    fold_accents: bool = True
    """Whether "resume" finds "résumé"."""
    lower_case: bool = True
    """Whether "moon" finds "Moon". Stemmers and stop words know lower-case words only."""
    stop_words: tuple[str, ...] | None = None
    """Words that a query drops when others remain. None: those of the language."""

    def __post_init__(self) -> None:
        if self.language not in (*LANGUAGES, "none"):
            raise UsageError(f"unknown language {self.language!r}: choose from none, {', '.join(LANGUAGES)}")
        if isinstance(self.stop_words, str):
            raise UsageError("stop_words must be a list of words, not one text")
        if self.stop_words is not None:
            object.__setattr__(self, "stop_words", tuple(sorted(set(self.stop_words))))

    def settings(self) -> dict[str, Any]:
        """Plain JSON values, from which `of` makes an equal analyser."""
        values = asdict(self)
        return {**values, "stop_words": None if self.stop_words is None else list(self.stop_words)}

    @classmethod
    def of(cls, settings: Analyser | Mapping[str, Any] | str | None) -> Analyser:
        """An analyser from its settings, from a language's name, or the default from None.

        Raises UsageError for names and types that are not an analyser's."""
        if isinstance(settings, Analyser):
            return settings
        if settings is None:
            return cls()
        if isinstance(settings, str):
            return cls(language=settings)
        known = {field.name for field in fields(cls)}
        if not isinstance(settings, Mapping) or not known.issuperset(settings):
            raise UsageError(f"an analyser has the settings {', '.join(sorted(known))}; not {settings!r}")
        words = settings.get("stop_words")
        for name, value in settings.items():
            good = isinstance(value, str) if name == "language" else isinstance(value, bool)
            if name == "stop_words":
                good = words is None or (isinstance(words, list | tuple) and all(isinstance(w, str) for w in words))
            if not good:
                raise UsageError(f"analyser setting {name} cannot be {value!r}")
        return cls(**{**settings, "stop_words": None if words is None else tuple(words)})

    def terms(self, text: str) -> list[str]:
        """The terms of a document, in order and with repetitions. Needs tantivy for languages other than English."""
        table = _term_table(self.language if self.stem else "none", self.fold_accents)
        return list(filter(None, map(table.__getitem__, self._words(text))))

    def query_terms(self, text: str) -> list[str]:
        """The terms of a query: those of its words that are no stop words, or of all when nothing else remains."""
        table = _query_table(self.language, self.stem, self.fold_accents, self.stop_words)
        return list(filter(None, map(table.__getitem__, self._words(text)))) or self.terms(text)

    def _words(self, text: str) -> list[str]:
        if text.isascii():
            table = _ASCII_LOWER if self.lower_case else _ASCII_CASED
            return text.encode("ascii").translate(table).decode("ascii").split()
        text = prepare(text)
        return _unicode_words().findall(text.lower() if self.lower_case else text)


class _TermTable(dict[str, str]):
    """Word -> term, or "" for words that give none, being too long to index; filled as words come, emptied when
    full."""

    def __init__(self, term_of: Callable[[str], str]) -> None:
        self._term_of = term_of

    def __missing__(self, word: str) -> str:
        if len(word) >= MAX_WORD_BYTES or len(word.encode()) >= MAX_WORD_BYTES:
            return ""
        term = self._term_of(word)
        if len(self) >= MAX_KNOWN_WORDS:
            self.clear()
        self[word] = term
        return term


def prepare(text: str) -> str:
    """A text with no lone surrogates, equal characters made one (Unicode's NFKC), and runs of
    Chinese or Japanese, which put no spaces between words, as their characters and pairs of neighbours."""
    if text.isascii():
        return text
    text = unicodedata.normalize("NFKC", clean_text(text))
    return _CJK.sub(_characters_and_pairs, text)


def _characters_and_pairs(match: re.Match[str]) -> str:
    run = match.group()
    return f" {' '.join(run)} {' '.join(map(''.join, pairwise(run)))} "


def fold(word: str) -> str:
    """Latin, Greek and Cyrillic letters without their accents."""
    if word.isascii():
        return word
    bare = _ACCENTS.sub("", unicodedata.normalize("NFKD", word))
    return unicodedata.normalize("NFC", bare).translate(_UNDECOMPOSED)


@cache
def _unicode_words() -> re.Pattern[str]:
    """Runs of letters, digits and the marks that belong to them: without these, Hindi or Hebrew words fall apart."""
    marks = [chr(c) for c in range(0x300, 0x10000) if unicodedata.category(chr(c))[0] == "M"]
    return re.compile(f"(?:[^\\W_]|[{''.join(marks)}])+")


@cache
def _term_table(language: str, fold_accents: bool) -> _TermTable:
    stem = _stemmer(language)
    if not fold_accents:
        return _TermTable(stem)
    if language == "english":  # its accents are those of foreign words, which the stemmer does not know
        return _TermTable(lambda word: stem(fold(word)))
    return _TermTable(lambda word: fold(stem(word)))


@cache
def _query_table(language: str, stem: bool, fold_accents: bool, stop_words: tuple[str, ...] | None) -> _TermTable:
    """`_term_table` in which stop words give no term: a word of a query is looked up once, and not twice."""
    table, is_stop = _term_table(language if stem else "none", fold_accents), _stop_test(language, stop_words)
    return _TermTable(lambda word: "" if is_stop(word) else table[word])


def _stemmer(language: str) -> Callable[[str], str]:
    if language == "none":
        return str
    if language == "english":
        return english.stem
    engine = import_tantivy()
    analyzer = engine.TextAnalyzerBuilder(engine.Tokenizer.raw()).filter(engine.Filter.stemmer(language)).build()
    return lambda word: analyzer.analyze(word)[0]


@cache
def _stop_test(language: str, words: tuple[str, ...] | None) -> Callable[[str], bool]:
    if words is not None:
        return frozenset((*words, *(word.lower() for word in words))).__contains__
    if language == "english":
        return english.STOP_WORDS.__contains__
    if language == "none" or language in _WITHOUT_STOP_WORDS:
        return frozenset[str]().__contains__
    engine = import_tantivy()
    analyzer = engine.TextAnalyzerBuilder(engine.Tokenizer.raw()).filter(engine.Filter.stopword(language)).build()
    return lambda word: not analyzer.analyze(word)


def import_tantivy() -> Any:
    """The engine. Raises UsageError where it is not installed."""
    try:
        import tantivy
    except ImportError as error:
        raise UsageError("this needs tantivy: pip install 'nanochat[rag]'") from error
    return tantivy
