"""Comparing a short answer with the gold one, as SQuAD does (Rajpurkar et al. 2016)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable

ABSTENTION = "I do not know."
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Lower case, without punctuation, articles and repeated blanks."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, gold: str) -> bool:
    """Whether both are the same after normalisation."""
    return normalize_answer(prediction) == normalize_answer(gold)


def contains_answer(prediction: str, gold: str) -> bool:
    """Whether the gold answer's words occur in the prediction in a row, as whole words. An empty gold never does."""
    inner = normalize_answer(gold)
    return bool(inner) and f" {inner} " in f" {normalize_answer(prediction)} "


def token_f1(tokens: Iterable[str], gold: Iterable[str]) -> float:
    """Harmonic mean of precision and recall of the tokens, counted with repetitions; 1 when both are empty."""
    said, wanted = Counter(tokens), Counter(gold)
    if not said or not wanted:
        return float(said == wanted)
    common = sum((said & wanted).values())
    return 2 * common / (sum(said.values()) + sum(wanted.values()))


def is_abstention(prediction: str) -> bool:
    """Whether the prediction begins with the special token for "no answer", or is the sentence that stands for it.

    The token somewhere in rambling text does not count: an untrained model would abstain on everything.
    """
    return prediction.lstrip().startswith("<|abstain|>") or exact_match(prediction, ABSTENTION)
