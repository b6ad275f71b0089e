"""Right or wrong: judging an answer that may be a bare value, or a sentence that restates one.

Exact match is fair to bare values only: "Mara Velt was born in Torwick." says what the gold answer "Torwick" says.
Containment is unfair the other way round: "Torwick or Brimholt", "not in Torwick" and "Bram Cobb was born in Torwick"
all contain it. `is_right` accepts a sentence when it contains the gold answer and *names nothing else*.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from nanochat.data.answers import contains_answer, exact_match, normalize_answer, token_f1
from nanochat.retrieval.english import STOP_WORDS

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_LISTED = re.compile(
    r"(?:\b(?:and|or)|[,/;&])\s*(?:(?:a|an|the)\s+)?\0|\0\s*(?:(?:and|or)\b|[,/;&]\s*\w)", flags=re.IGNORECASE
)
_NEGATIONS = frozenset({"not", "no", "never", "neither", "nor", "cannot", "isn't", "wasn't", "doesn't", "didn't"})


def is_right(
    text: str,
    answers: Sequence[str],
    *,
    question: str = "",
    sentences: Sequence[str] = (),
    evidence: Sequence[str] = (),
) -> bool:
    """Whether an answer is right.

    It is when, after SQuAD's normalisation, it equals one of the gold `answers` or of the gold `sentences`; or when it
    restates a gold answer: its text holds the answer as whole words and, beside it, names nothing else. That is: every
    other name and number in it stands in the question or in one sentence of the `evidence` (texts that state the
    answer, such as the gold documents); it is not negated unless that sentence or the question is; the answer is no
    item of a list ("oboe or harp"), unless that sentence says so too. Where the question itself holds the answer ("Is A
    larger or B?") and for yes and no, the text has to begin with it.
    """
    if any(_same(text, gold) for gold in (*answers, *sentences)):
        return True
    return any(restates(text, gold, question, (*sentences, *evidence)) for gold in answers)


def restates(text: str, gold: str, question: str, evidence: Sequence[str] = ()) -> bool:
    """Whether a sentence holds the gold answer and names nothing else, as `is_right` describes."""
    if not contains_answer(text, gold):
        return False
    inner = normalize_answer(gold)
    first = inner in ("yes", "no") or contains_answer(question, gold)
    if first and not f"{normalize_answer(text)} ".startswith(f"{inner} "):
        return False
    rest = _without(text, gold)
    sources = [s for s in evidence if contains_answer(s, gold)]
    may_list = inner in ("yes", "no")  # "Yes, both are …"
    return any(_adds_nothing(rest, question, source, may_list) for source in ("", *sources))


def _same(text: str, gold: str) -> bool:
    """Equal after normalisation, or as they stand where that leaves nothing: "A" is an article too."""
    if not normalize_answer(gold):
        return bool(gold.strip()) and text.strip().lower() == gold.strip().lower()
    return exact_match(text, gold)


def _adds_nothing(rest: str, question: str, source: str, may_list: bool) -> bool:
    """`rest`: the text with its gold answer replaced by a mark."""
    known = {word.lower() for word in _WORD.findall(f"{question} {source}")}
    if any(name.lower() not in known for name in names(rest)):
        return False
    said = {word.lower() for word in _WORD.findall(rest)}
    if any(word in said and word not in known for word in _NEGATIONS):
        return False
    listed = not may_list and _LISTED.search(rest) is not None
    return not listed or (bool(source) and said <= known)


def _without(text: str, gold: str) -> str:
    """The text with each mention of the gold answer, whatever its case and articles, replaced by a NUL character."""
    inner = [re.escape(word) for word in _WORD.findall(gold)]
    if not inner:
        return text.replace(gold, "\0")
    return re.sub(r"\b" + r"\W+(?:(?:a|an|the)\W+)?".join(inner) + r"\b", "\0", text, flags=re.IGNORECASE)


def names(text: str) -> list[str]:
    """Words that name something: numbers, and words with a capital. A sentence's first word counts when another word
    follows it, unless it is a stop word or a participle or adverb by its ending ("Located in …", "Possibly …")."""
    found = []
    for sentence in re.split(r"(?<=[.!?])\s+", text):
        for match in _WORD.finditer(sentence):
            word = match.group()
            if word[0].isdigit():
                found.append(word)
            elif word[0].isupper() and word.lower().split("'")[0] not in STOP_WORDS:
                follows = sentence[match.end() :].lstrip()[:1]
                starts = not sentence[: match.start()].strip("\"'“( ")
                if not starts or (follows.isalnum() and not word.endswith(("ed", "ing", "ly"))):
                    found.append(word)
    return found


def answer_f1(text: str, answers: Sequence[str], question: str = "") -> float:
    """Token F1 with the best of the gold answers, as SQuAD's; a sentence is also compared without what it only repeats:
    words of the question and stop words that the gold answer lacks. The better of the two counts, so that "Mara Velt
    was born in Torwick." has F1 1 with "Torwick" when that was asked of Mara Velt. Gold sentences are not compared:
    wrong answers share most of their words."""
    tokens = normalize_answer(text).split()
    asked = set(normalize_answer(question).split()) | STOP_WORDS
    best = 0.0
    for gold in answers:
        wanted = normalize_answer(gold).split()
        if not wanted:
            best = max(best, float(_same(text, gold)))
            continue
        added = [token for token in tokens if token in wanted or token not in asked]
        best = max(best, token_f1(tokens, wanted), token_f1(added, wanted))
    return best
