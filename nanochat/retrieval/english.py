"""English in plain Python: its stop words and the Porter2 ("English" Snowball) stemmer.

Tantivy brings the same stemmer; this one serves the index that needs numpy only. Source: M. F. Porter, "The English
(Porter2) stemming algorithm", https://snowballstem.org/algorithms/english/stemmer.html, as of Snowball 3. R1 and R2 are
the regions after the first and the second vowel + consonant; suffixes are cut only inside them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

# Snowball's list, its contractions cut at the apostrophe as a tokenizer cuts them.
STOP_WORDS = frozenset(
    """a about above after again against all am an and any are aren as at be because been before being below between
    both but by can cannot could couldn d did didn do does doesn doing don down during each few for from further had
    hadn has hasn have haven having he her here hers herself him himself his how i if in into is isn it its itself let
    ll m me more most mustn my myself no nor not of off on once only or other ought our ours ourselves out over own re
    s same shan she should shouldn so some such t than that the their theirs them themselves then there these they this
    those through to too under until up ve very was wasn we were weren what when where which while who whom why will
    with won would wouldn you your yours yourself yourselves""".split()  # noqa: SIM905 - 190 quotes are no easier to read
)

_VOWEL, _CONSONANT = "[aeiouy]", "[^aeiouy]"
_REGION = re.compile(_VOWEL + _CONSONANT)
_EARLY_REGION = re.compile("gener|commun|arsen|past|univers|later|emerg|organ|inter")  # the rule would cut too much
_SHORT_END = re.compile(f"(?:.*{_CONSONANT}{_VOWEL}[^aeiouywxY]|{_VOWEL}{_CONSONANT}|past)$")
_HAS_VOWEL = re.compile(_VOWEL)
_CONSONANT_Y = re.compile("(^|[aeiouy])y")
_DOUBLE = ("bb", "dd", "ff", "gg", "mm", "nn", "pp", "rr", "tt")
_IRREGULAR = {
    "skis": "ski", "skies": "sky", "idly": "idl", "gently": "gentl", "ugly": "ugli", "early": "earli", "only": "onli",
    "singly": "singl", "sky": "sky", "news": "news", "howe": "howe", "atlas": "atlas", "cosmos": "cosmos",
    "bias": "bias", "andes": "andes",
}  # fmt: skip
_INVARIANT = frozenset(
    ("inning", "outing", "canning", "herring", "earring", "evening", "proceed", "exceed", "succeed")
)
_STEP2 = {
    "ization": "ize", "ational": "ate", "fulness": "ful", "ousness": "ous", "iveness": "ive", "tional": "tion",
    "biliti": "ble", "lessli": "less", "entli": "ent", "ation": "ate", "alism": "al", "aliti": "al", "ousli": "ous",
    "iviti": "ive", "fulli": "ful", "enci": "ence", "anci": "ance", "abli": "able", "izer": "ize", "ator": "ate",
    "alli": "al", "ogist": "og", "bli": "ble", "ogi": "og", "li": "",
}  # fmt: skip
_STEP3 = {
    "ational": "ate", "tional": "tion", "alize": "al", "icate": "ic", "iciti": "ic", "ative": "", "ical": "ic",
    "ness": "", "ful": "",
}  # fmt: skip
_STEP4 = ("ement", "ance", "ence", "able", "ible", "ment", "ant", "ent", "ism", "ate", "iti", "ous", "ive", "ize",
          "ion", "al", "er", "ic")  # fmt: skip


def _by_last_letter(suffixes: Iterable[str]) -> dict[str, list[str]]:
    """Suffixes, the longest first, by the letter that they end in: most words end in none of them."""
    table: dict[str, list[str]] = {}
    for suffix in sorted(suffixes, key=len, reverse=True):
        table.setdefault(suffix[-1], []).append(suffix)
    return table


_ENDS_1B = _by_last_letter(("eedly", "eed", "ingly", "edly", "ing", "ed"))
_ENDS_2, _ENDS_3, _ENDS_4 = map(_by_last_letter, (_STEP2, _STEP3, _STEP4))


def stem(word: str) -> str:
    """The stem of a lower-case word. Words of other alphabets come back as they are."""
    if len(word) < 3:
        return word
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if "y" in word:
        word = _CONSONANT_Y.sub(r"\1Y", word)
    region = _EARLY_REGION.match(word) or _REGION.search(word)
    r1 = region.end() if region else len(word)
    region = _REGION.search(word, r1)
    r2 = region.end() if region else len(word)
    word = _plural(word)
    if word in _INVARIANT:
        return word
    word = _past_and_gerund(word, r1)
    if len(word) > 2 and word[-1] in "yY" and word[-2] not in "aeiouy":
        word = word[:-1] + "i"
    word = _suffixes(word, r1, r2)
    return word.replace("Y", "y")


def _split(word: str, endings: Mapping[str, list[str]]) -> tuple[str, str]:
    """The word without the longest suffix that it has, and the suffix."""
    for suffix in endings.get(word[-1:], ()):
        if word.endswith(suffix):
            return word[: len(word) - len(suffix)], suffix
    return word, ""


def _plural(word: str) -> str:
    """Step 1a."""
    if word.endswith("sses"):
        return word[:-2]
    if word.endswith(("ied", "ies")):
        return word[:-2] if len(word) > 4 else word[:-1]
    if word.endswith("s") and not word.endswith(("us", "ss")) and _HAS_VOWEL.search(word, 0, len(word) - 2):
        return word[:-1]
    return word


def _past_and_gerund(word: str, r1: int) -> str:
    """Step 1b."""
    left, suffix = _split(word, _ENDS_1B)
    if suffix in ("eed", "eedly"):
        return left + "ee" if len(left) >= r1 else word
    if not suffix or not _HAS_VOWEL.search(left):
        return word
    if suffix == "ing" and len(left) == 2 and left[1] == "y" and left[0] not in "aeiouy":
        return left[0] + "ie"  # lying
    if left.endswith(("at", "bl", "iz")):
        return left + "e"
    if left.endswith(_DOUBLE):
        return left if len(left) == 3 and left[0] in "aeo" else left[:-1]  # add, egg, off
    return left + "e" if len(left) <= r1 and _SHORT_END.match(left) else left


def _suffixes(word: str, r1: int, r2: int) -> str:
    """Steps 2 to 5."""
    left, suffix = _split(word, _ENDS_2)
    before = {"ogi": "l", "li": "cdeghkmnrt"}.get(suffix, "")
    if suffix and len(left) >= r1 and (not before or (left and left[-1] in before)):
        word = left + _STEP2[suffix]
    left, suffix = _split(word, _ENDS_3)
    if suffix and len(left) >= (r2 if suffix == "ative" else r1):
        word = left + _STEP3[suffix]
    left, suffix = _split(word, _ENDS_4)
    if suffix and len(left) >= r2 and (suffix != "ion" or left.endswith(("s", "t"))):
        word = left
    left = word[:-1]
    if word.endswith("e") and (len(left) >= r2 or (len(left) >= r1 and not _SHORT_END.match(left))):
        return left
    return left if word.endswith("ll") and len(left) >= r2 else word
