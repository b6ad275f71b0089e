"""Texts to terms: one frozen recipe that an index stores and applies to its documents and to every query alike.

A text is cleaned (lone surrogates, Unicode forms, Chinese and Japanese cut into characters and pairs of them), cut into
runs of letters and digits, lower-cased, stemmed, and stripped of accents. Stop words stay in the index; a query drops
them when other words remain, so "the who" still finds the band.

Two engines do this: tantivy, in its own threads, for BM25; and plain Python for the index that needs numpy only. Each is
consistent with itself, which is what matters; in English both give the same terms, rare scripts aside.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from typing import TYPE_CHECKING, Any

from nanochat.errors import UsageError
from nanochat.retrieval import english
from nanochat.retrieval.document import clean_text

if TYPE_CHECKING:
    import tantivy

MAX_WORD_BYTES = 100  # longer "words" are base64, hashes and the like: not indexed
LANGUAGES = (
    "arabic", "danish", "dutch", "english", "finnish", "french", "german", "greek", "hungarian", "italian", "norwegian",
    "portuguese", "romanian", "russian", "spanish", "swedish", "tamil", "turkish",
)  # fmt: skip
_WITHOUT_STOP_WORDS = ("arabic", "greek", "romanian", "tamil", "turkish")  # tantivy brings no list for these
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
                good = words is None or (not isinstance(words, str) and all(isinstance(word, str) for word in words))
            if not good:
                raise UsageError(f"analyser setting {name} cannot be {value!r}")
        return cls(**{**settings, "stop_words": None if words is None else tuple(words)})

    # -- the plain-Python engine ---------------------------------------------------------------------------------------

    def terms(self, text: str) -> list[str]:
        """The terms of a document, in order and with repetitions. Needs tantivy for languages other than English."""
        return self._terms(self._words(text))

    def query_terms(self, text: str) -> list[str]:
        """The terms of a query: those of its words that are no stop words, or of all when nothing else remains."""
        words = self._words(text)
        return self._terms(self.without_stop_words(words))

    def _words(self, text: str) -> list[str]:
        text = prepare(text)
        if self.lower_case:
            text = text.lower()
        words = (_ascii_words() if text.isascii() else _unicode_words()).findall(text)
        if text.isascii() and len(text) < MAX_WORD_BYTES:
            return words
        return [word for word in words if len(word) < MAX_WORD_BYTES // 4 or len(word.encode()) < MAX_WORD_BYTES]

    def _terms(self, words: Sequence[str]) -> list[str]:
        if self.stem and self.language == "english":
            words = [english.stem(word) for word in words]
        elif self.stem and self.language != "none":
            words = _tantivy_analyzer(self.language, True, False, False).analyze(" ".join(words))
        return [word if word.isascii() else fold(word) for word in words] if self.fold_accents else list(words)

    # -- tantivy's engine ----------------------------------------------------------------------------------------------

    def tantivy(self) -> tantivy.TextAnalyzer:
        """Prepared text to terms, for tantivy's indexer."""
        return _tantivy_analyzer(self.language if self.stem else "none", self.stem, self.lower_case, self.fold_accents)

    def tantivy_query_terms(self, text: str) -> list[str]:
        """As `query_terms`, with tantivy's terms."""
        analyze = self.tantivy().analyze
        text = prepare(text)
        words = _tantivy_analyzer("none", False, self.lower_case, False).analyze(text)
        kept = self.without_stop_words(words)
        return analyze(text) if len(kept) == len(words) else analyze(" ".join(kept))

    # -- both ----------------------------------------------------------------------------------------------------------

    def without_stop_words(self, words: list[str]) -> list[str]:
        """The words that are no stop words, or all when nothing else remains."""
        if self.stop_words is not None or self.language in ("english", "none"):
            stops = _stop_set(self.language, self.stop_words)
            kept = [word for word in words if word not in stops]
        elif self.language in _WITHOUT_STOP_WORDS:
            kept = words
        else:
            others = set(_tantivy_stop_filter(self.language).analyze(" ".join(words)))
            kept = [word for word in words if word in others]
        return kept or words


def prepare(text: str) -> str:
    """A text as both engines take it: no lone surrogates, Unicode's compatibility forms made one (NFKC), and runs of
    Chinese or Japanese, which put no spaces between words, as their characters and pairs of neighbours."""
    if text.isascii():
        return text
    text = unicodedata.normalize("NFKC", clean_text(text))
    return _CJK.sub(_characters_and_pairs, text)


def _characters_and_pairs(match: re.Match[str]) -> str:
    run = match.group()
    return f" {' '.join(run)} {' '.join(map(''.join, zip(run, run[1:])))} "


def fold(word: str) -> str:
    """Latin, Greek and Cyrillic letters without their accents."""
    bare = _ACCENTS.sub("", unicodedata.normalize("NFKD", word))
    return unicodedata.normalize("NFC", bare).translate(_UNDECOMPOSED)


@cache
def _ascii_words() -> re.Pattern[str]:
    return re.compile("[a-zA-Z0-9]+")


@cache
def _unicode_words() -> re.Pattern[str]:
    """Runs of letters, digits and the marks that belong to them: without these, Hindi or Hebrew words fall apart."""
    marks = [chr(c) for c in range(0x300, 0x10000) if unicodedata.category(chr(c))[0] == "M"]
    return re.compile(f"(?:[^\\W_]|[{''.join(marks)}])+")


@cache
def _stop_set(language: str, words: tuple[str, ...] | None) -> frozenset[str]:
    if words is not None:
        return frozenset(words)
    return english.STOP_WORDS if language == "english" else frozenset()


@cache
def _tantivy_analyzer(language: str, stem: bool, lower_case: bool, fold_accents: bool) -> tantivy.TextAnalyzer:
    engine = import_tantivy()
    builder = engine.TextAnalyzerBuilder(engine.Tokenizer.simple()).filter(engine.Filter.remove_long(MAX_WORD_BYTES))
    if lower_case:
        builder = builder.filter(engine.Filter.lowercase())
    if stem and language != "none":
        builder = builder.filter(engine.Filter.stemmer(language))
    if fold_accents:
        builder = builder.filter(engine.Filter.ascii_fold())
    return builder.build()


@cache
def _tantivy_stop_filter(language: str) -> tantivy.TextAnalyzer:
    engine = import_tantivy()
    return engine.TextAnalyzerBuilder(engine.Tokenizer.simple()).filter(engine.Filter.stopword(language)).build()


def import_tantivy() -> Any:
    """The engine. Raises UsageError where it is not installed."""
    try:
        import tantivy
    except ImportError as error:
        raise UsageError("this needs tantivy: pip install 'nanochat[rag]'") from error
    return tantivy
