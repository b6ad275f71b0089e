"""Several rankings of one query made into one, and scores brought to the range 0 to 1.

`rrf` looks at ranks only (Cormack, Clarke and Büttcher 2009); `weighted` adds scores that were normalised query by
query (a convex combination; Bruch, Gai and Ingber 2023). Both are symmetric: the order of the rankings decides nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import overload

import numpy as np

from nanochat.errors import NanochatError, UsageError
from nanochat.retrieval.document import Found, Hit

RRF_CONSTANT = 60.0
NORMALIZATIONS = ("minmax", "max", "rank")


def rrf(
    founds: Sequence[Found], k: int, constant: float = RRF_CONSTANT, weights: Sequence[float] | None = None
) -> Found:
    """The best `k` by the sum of weight / (constant + rank), ranks counted from 1; weights are 1 unless given."""
    factors = _weights(weights, len(founds))
    parts = [w / (constant + 1.0 + np.arange(len(found.rows))) for w, found in zip(factors, founds)]
    return _add(founds, parts, k)


def weighted(founds: Sequence[Found], weights: Sequence[float] | None, k: int, kind: str = "minmax") -> Found:
    """The best `k` by the weighted mean of normalised scores, 0 to 1; weights are equal unless given.

    A row that one ranking lacks gets 0 from it, the least that ranking gave. Raises UsageError for weights that are not
    one per ranking, negative, or all 0."""
    factors = _weights(weights, len(founds))
    total = sum(factors)
    parts = [w / total * unit_scores(found.scores, kind) for w, found in zip(factors, founds)]
    return _add(founds, parts, k)


@overload
def normalize(found: Found, kind: str = "minmax") -> Found: ...
@overload
def normalize(found: Sequence[Hit], kind: str = "minmax") -> list[Hit]: ...
def normalize(found: Found | Sequence[Hit], kind: str = "minmax") -> Found | list[Hit]:
    """The same documents in the same order with scores from 0 to 1, best first. Kinds as in `unit_scores`."""
    if isinstance(found, Found):
        return Found(found.rows, unit_scores(found.scores, kind).astype(np.float32))
    scores = unit_scores(np.array([hit.score for hit in found], np.float64), kind)
    return [replace(hit, score=score) for hit, score in zip(found, scores.tolist())]


def unit_scores(scores: np.ndarray, kind: str = "minmax") -> np.ndarray:
    """Scores of one query, (n,) float64 from 0 to 1, in an order that never contradicts theirs:

    minmax  0 for the lowest, 1 for the highest; all 1 when they are equal, so that a lone hit counts in full
    max     divided by the highest, scores below 0 become 0; keeps how far the rest lies behind. As minmax when no
            score is above 0
    rank    1 for the first place, 1/n for the last, equal scores the same; for scores without any scale

    Raises UsageError for another kind, NanochatError for a score that is no finite number."""
    if kind not in NORMALIZATIONS:
        raise UsageError(f"unknown normalisation {kind!r}: choose from {', '.join(NORMALIZATIONS)}")
    x = np.asarray(scores, dtype=np.float64)
    if not x.size:
        return x
    if not np.isfinite(x).all():
        raise NanochatError("cannot combine a score that is not a finite number: check the embedder or reranker")
    high, low = x.max(), x.min()
    if high == low:
        return np.ones_like(x)
    if kind == "rank":
        better = np.searchsorted(np.sort(-x), -x, side="left")
        return 1.0 - better / len(x)
    if kind == "max" and high > 0:
        return np.clip(x, 0.0, None) / high
    scale = max(abs(high), abs(low))  # divided first: a range over the whole of float64 would overflow
    return (x / scale - low / scale) / (high / scale - low / scale)


def _weights(weights: Sequence[float] | None, n: int) -> list[float]:
    if weights is None:
        return [1.0] * n
    if len(weights) != n:
        raise UsageError(f"{len(weights)} fusion weights for {n} rankings: give one for each")
    if not np.isfinite(weights).all() or min(weights, default=1.0) < 0 or (n and not sum(weights)):
        raise UsageError(f"fusion weights must be 0 or more, and not all 0: {list(weights)}")
    return [float(w) for w in weights]


def _add(founds: Sequence[Found], parts: Sequence[np.ndarray], k: int) -> Found:
    """Sum what each ranking gives to a row, and take the best k; of equal sums the lower row first."""
    if not founds or k < 1:
        return Found.none()
    rows = np.unique(np.concatenate([found.rows for found in founds]))
    table = np.zeros((len(founds), len(rows)))
    for line, found, part in zip(table, founds, parts):
        line[np.searchsorted(rows, found.rows[::-1])] = part[::-1]  # backwards: of a repeated row the best place stays
    # Sorted before they are added, so that rounding cannot depend on which ranking came first.
    scores = np.sort(table, axis=0).sum(axis=0).astype(np.float32)
    order = np.lexsort((rows, -scores))[:k]
    return Found(rows[order].astype(np.int64, copy=False), scores[order])
