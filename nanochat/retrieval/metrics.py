"""How good rankings are: Recall@K, Precision@K, MRR, nDCG, and recall of all gold documents for multi-hop questions.

`qrels` (judgements) say for each query which documents are relevant and how much: `{query: {document: grade}}`, where
grades of 1 and more are relevant. A `run` holds what was found: `{query: ranking}`, a ranking being either document
ids, best first, or `{document: score}`, sorted as trec_eval does (scores as float32, ties by descending id).

The definitions are trec_eval's, so figures compare with published ones: a document that was not judged counts as
irrelevant, precision divides by K even when fewer were found, nDCG has linear gains and a log2 discount (Järvelin and
Kekäläinen 2002), and each judged query counts, those missing from the run and those without relevant documents with 0.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

import numpy as np

from nanochat.errors import NanochatError, UsageError
from nanochat.intervals import Metric, mean, share

Grades: TypeAlias = Mapping[str, int]  # document -> grade
Qrels: TypeAlias = Mapping[str, Grades]
Ranking: TypeAlias = Mapping[str, float] | Sequence[str]
Run: TypeAlias = Mapping[str, Ranking]

DEFAULT_METRICS = ("ndcg@10", "recall@5", "recall@10", "precision@5", "mrr", "all_gold@5", "all_gold@10")

def recall(ranking: Sequence[str], grades: Grades, k: int) -> float:
    """The share of relevant documents among the first k."""
    gold = _relevant(grades)
    return len(gold.intersection(ranking[:k])) / len(gold) if gold else 0.0


def precision(ranking: Sequence[str], grades: Grades, k: int) -> float:
    """The share of the first k places that hold relevant documents; a place left empty is a miss."""
    return len(_relevant(grades).intersection(ranking[:k])) / k


def reciprocal_rank(ranking: Sequence[str], grades: Grades, k: int) -> float:
    """1 / rank of the first relevant document, 0 when none is among the first k."""
    gold = _relevant(grades)
    return next((1 / rank for rank, document in enumerate(ranking[:k], 1) if document in gold), 0.0)


def ndcg(ranking: Sequence[str], grades: Grades, k: int) -> float:
    """Discounted gain of the first k over that of the best possible order; negative grades gain nothing."""
    gains = {document: grade for document, grade in grades.items() if grade > 0}
    best = _discounted(sorted(gains.values(), reverse=True)[:k])
    return _discounted([gains.get(document, 0) for document in ranking[:k]]) / best if best else 0.0


def all_gold(ranking: Sequence[str], grades: Grades, k: int) -> float:
    """1 when every relevant document is among the first k, else 0: what a multi-hop question needs."""
    gold = _relevant(grades)
    return float(bool(gold) and gold.issubset(ranking[:k]))


def any_gold(ranking: Sequence[str], grades: Grades, k: int) -> float:
    """1 when at least one relevant document is among the first k, else 0 (trec_eval's success)."""
    return float(not _relevant(grades).isdisjoint(ranking[:k]))


METRICS: dict[str, Callable[[Sequence[str], Grades, int], float]] = {
    "recall": recall,
    "precision": precision,
    "mrr": reciprocal_rank,
    "ndcg": ndcg,
    "all_gold": all_gold,
    "any_gold": any_gold,
}


def _relevant(grades: Grades) -> set[str]:
    return {document for document, grade in grades.items() if grade > 0}


def _discounted(gains: Sequence[int]) -> float:
    return sum(gain / math.log2(rank + 1) for rank, gain in enumerate(gains, 1))


def parse(name: str) -> tuple[Callable[[Sequence[str], Grades, int], float], int]:
    """The function and the K of a name such as `recall@10`; without @K (`ndcg`, `mrr`) the whole ranking counts.

    Raises UsageError for an unknown name, a K below 1, and a precision or recall without K."""
    base, at, depth = name.strip().lower().partition("@")
    if base not in METRICS:
        near = difflib.get_close_matches(base, METRICS, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UsageError(f"unknown metric {name!r}: choose from {', '.join(METRICS)}, each as name@K{hint}")
    if not at and base in ("ndcg", "mrr"):
        return METRICS[base], 2**31
    if not depth.isascii() or not depth.isdigit() or int(depth) < 1:
        raise UsageError(f"metric {name!r} needs a whole number after @, as in {base}@10")
    return METRICS[base], int(depth)


def ranked(ranking: Ranking) -> list[str]:
    """Document ids, best first, each once. Scores are sorted as trec_eval does it: as float32, equal ones by descending
    id. Raises NanochatError for a score that is no number."""
    if not isinstance(ranking, Mapping):
        return list(dict.fromkeys(ranking))
    scores = np.fromiter(ranking.values(), np.float64, len(ranking)).astype(np.float32)
    if np.isnan(scores).any():
        bad = list(ranking)[int(np.isnan(scores).argmax())]
        raise NanochatError(f"the score of document {bad!r} is not a number")
    pairs = sorted(zip(scores.tolist(), ranking), reverse=True)
    return [document for _, document in pairs]


def per_query(qrels: Qrels, run: Run, metrics: Iterable[str] = DEFAULT_METRICS) -> dict[str, dict[str, float]]:
    """`{metric: {query: value}}` over all judged queries, in their order."""
    functions = {name: parse(name) for name in metrics}
    rankings = {query: ranked(run.get(query, ())) for query in qrels}
    return {
        name: {query: function(rankings[query], grades, k) for query, grades in qrels.items()}
        for name, (function, k) in functions.items()
    }


def measure(
    qrels: Qrels, run: Run, metrics: Iterable[str] = DEFAULT_METRICS, seed: int = 0
) -> dict[str, Metric]:
    """Each metric's mean over the judged queries with its interval. Raises NanochatError when nothing is judged."""
    if not qrels:
        raise NanochatError("no query has a relevance judgement: there is nothing to measure")
    return {name: estimate(list(values.values()), seed) for name, values in per_query(qrels, run, metrics).items()}


def estimate(values: Sequence[float] | np.ndarray, seed: int = 0) -> Metric:
    """The mean of independent values: Wilson's interval when all are 0 or 1, as it stays honest where all are equal,
    else the bootstrap's; one value alone has no interval."""
    x = np.asarray(values, dtype=np.float64)
    if len(x) > 1 and np.isin(x, (0.0, 1.0)).all():
        return share(int(x.sum()), len(x))
    return mean(x, seed)


def difference(better: Mapping[str, float], worse: Mapping[str, float], seed: int = 0) -> Metric:
    """The mean of `better - worse`, paired by query: an interval above 0 says that the one beats the other on such
    queries, which two overlapping intervals of their own cannot deny. Raises UsageError unless both have the same
    queries."""
    if better.keys() != worse.keys() or not better:
        raise UsageError("a difference needs two results over the same queries")
    return mean([better[query] - worse[query] for query in better], seed)
