"""A search over one version: rows from the indexes, fused, filtered, made into hits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nanochat.errors import UsageError
from nanochat.retrieval.document import Embedder, Filter, Found, Hit, Reranker, clean_text
from nanochat.retrieval.filters import check
from nanochat.retrieval.staging import check_vectors
from nanochat.retrieval.view import View

AUTO = "auto"  # a reranker where it pays


@dataclass(frozen=True)
class Query:
    """How to search; see KnowledgeBase.search."""

    k: int = 5
    filter: Filter | None = None
    mode: str | None = None
    normalize: bool | str = False
    unique: bool = False
    reranker: Reranker | str | None = AUTO
    candidates: int | None = None


def run(view: View, queries: Sequence[str], query: Query, embedder: Callable[[], Embedder]) -> list[list[Hit]]:
    """The hits for each text. Raises UsageError for wrong arguments."""
    k = check_k(query.k)
    texts = [clean_text(_text(one)) for one in queries]
    kinds = _kinds(view, query.mode)
    conditions = check(query.filter)
    if not texts or not view.version.passages:
        return [[] for _ in texts]
    allowed = view.allowed(conditions) if conditions else None
    reranker = choose_reranker(query.reranker, len(kinds) > 1, view.manifest.settings.get("analyser"))
    depth = depth_with(reranker, k, query.candidates)
    vectors = _embed(texts, embedder()) if "dense" in kinds else None
    founds = _rank(view, kinds, texts, vectors, depth, allowed)
    if query.unique:
        founds = [
            _unique(view, kinds, text, None if vectors is None else vectors[i : i + 1], depth, allowed, found)
            for i, (text, found) in enumerate(zip(texts, founds))
        ]
    answers = [_hits(view, found) for found in founds]
    if reranker is not None:
        from nanochat.retrieval.rerank import rerank

        answers = [rerank(reranker, text, hits, k, query.candidates) for text, hits in zip(texts, answers)]
    return normalized(answers, query.normalize)


def normalized(answers: list[list[Hit]], how: bool | str) -> list[list[Hit]]:
    """Hits with scores from 0 to 1: "minmax", "max" or "rank"; True is "minmax", False leaves them as they are."""
    if not how:
        return answers
    from nanochat.retrieval.fusion import normalize

    return [normalize(hits, "minmax" if how is True else how) for hits in answers]


def choose_reranker(reranker: Reranker | str | None, is_hybrid: bool, analyser: Any) -> Reranker | None:
    """AUTO is feedback for hybrid searches, which needs no model and finds more (docs/retrieval-design.md), and none
    for the others. Raises UsageError for an unknown name."""
    if reranker == AUTO:
        reranker = "feedback" if is_hybrid else None
    if reranker is None:
        return None
    from nanochat.retrieval.rerank import make_reranker

    return make_reranker(reranker, analyser)


def depth_with(reranker: Reranker | None, k: int, candidates: int | None) -> int:
    """How many hits a search needs for k of them to be left by the reranker."""
    if reranker is None:
        return k
    from nanochat.retrieval.rerank import depth_of

    return max(k, depth_of(reranker, candidates))


def check_k(k: Any) -> int:
    """Raises UsageError unless k is a count."""
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
        raise UsageError(f"k must be a whole number of 1 or more, not {k!r}")
    return int(k)


def _text(query: Any) -> str:
    if not isinstance(query, str):
        raise UsageError(f"a query must be a text, not {query!r:.60}")
    return query


def _kinds(view: View, mode: str | None) -> tuple[str, ...]:
    """The indexes to ask. Raises UsageError for a mode that this kind of knowledge base has not."""
    from nanochat.retrieval.generation import KINDS

    kind = view.manifest.settings["kind"]
    if mode is None or mode == kind:
        return KINDS[kind]
    if mode not in KINDS[kind]:
        raise UsageError(f"no mode {mode!r} in a {kind} knowledge base: choose from {', '.join({kind, *KINDS[kind]})}")
    return (mode,)


def _embed(texts: list[str], embedder: Embedder) -> np.ndarray:
    return check_vectors(embedder.embed_queries(texts), len(texts), embedder)


def _rank(
    view: View, kinds: Sequence[str], texts: list[str], vectors: np.ndarray | None, k: int, allowed: np.ndarray | None
) -> list[Found]:
    """The best k rows for each query: of one index, or of several, fused."""
    if len(kinds) == 1:
        return view.find(kinds[0], vectors if kinds[0] == "dense" else texts, k, allowed)
    from nanochat.retrieval.hybrid import fuse

    settings = view.manifest.settings["fusion"]
    depth = max(k, settings["depth"])
    lists = [view.find(kind, vectors if kind == "dense" else texts, depth, allowed) for kind in kinds]
    return [fuse(founds, k, settings["fusion"], settings["weights"]) for founds in zip(*lists)]


def _unique(
    view: View,
    kinds: Sequence[str],
    text: str,
    vector: np.ndarray | None,
    k: int,
    allowed: np.ndarray | None,
    found: Found,
) -> Found:
    """The best passage of each document, the best k of them: searches deeper until there are enough."""
    depth = k
    while True:
        _, best = np.unique(view.first_rows(found.rows), return_index=True)
        best = np.sort(best)[:k]
        if len(best) >= k or len(found.rows) < depth or depth >= view.version.passages:
            return Found(found.rows[best], found.scores[best])
        depth = min(depth * 4, view.version.passages)
        [found] = _rank(view, kinds, [text], vector, depth, allowed)


def _hits(view: View, found: Found) -> list[Hit]:
    documents = view.fetch(found.rows)
    return [
        Hit(documents[row].id, score, rank, documents[row])
        for rank, (row, score) in enumerate(zip(found.rows.tolist(), found.scores.tolist()), 1)
    ]
