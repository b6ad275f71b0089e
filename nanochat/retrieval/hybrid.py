"""FusedRetriever: several retrievers searched with one query, their rankings fused, the best reranked if wished."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from nanochat.errors import NanochatError, UsageError
from nanochat.retrieval.document import Document, Filter, Found, Hit, Reranker, Retriever
from nanochat.retrieval.fusion import rrf, weighted
from nanochat.retrieval.index_files import fsync, make_directory
from nanochat.retrieval.interface import SearchesDocuments
from nanochat.retrieval.rerank import make_reranker, rerank

Key: TypeAlias = tuple[str, tuple[int, int] | None]  # what makes a passage one: the id and where in the document

FUSIONS = ("weighted", "rrf")
FORMAT, SAVED = 1, "hybrid.json"


class FusedRetriever(SearchesDocuments):
    """Fuses any retrievers. `depth` candidates are taken from each (or k, if that is more).

    `fusion` is "weighted" (normalised scores) or "rrf" (ranks only); `weights` gives each retriever's say. `reranker`
    judges the best of the fused anew: an object, a name that `make_reranker` knows, or None. `add` and `delete` go to
    every retriever. Raises UsageError for an unknown fusion, no retriever, or weights that do not fit."""

    def __init__(
        self,
        retrievers: Sequence[Retriever],
        *,
        fusion: str = "weighted",
        weights: Sequence[float] | None = None,
        depth: int = 100,
        reranker: Reranker | str | None = "feedback",
    ) -> None:
        if not retrievers:
            raise UsageError("a hybrid retriever needs at least one retriever")
        if depth < 1:
            raise UsageError(f"depth must be 1 or more, not {depth}")
        self.retrievers = list(retrievers)
        self.fusion, self.weights, self.depth, self.reranker = fusion, weights, depth, make_reranker(reranker)
        fuse([Found.none()] * len(self.retrievers), 1, fusion, weights)  # says now what is wrong with them

    def _answers(self, texts: Sequence[str], k: int, filter: Filter | None) -> list[list[Hit]]:
        if k < 1:
            raise UsageError(f"k must be 1 or more, not {k}")
        depth = max(k, self.depth)
        answers = [retriever.search(texts, depth, filter) for retriever in self.retrievers]
        keep = depth if self.reranker else k
        found = [fuse_hits(lists, keep, self.fusion, self.weights) for lists in zip(*answers)]
        if self.reranker is None:
            return found
        return [rerank(self.reranker, text, hits, k) for text, hits in zip(texts, found)]

    def add(self, documents: Iterable[Document]) -> list[Any]:
        """Add the documents to every retriever; what each of them answered."""
        kept = list(documents)
        return [retriever.add(kept) for retriever in self.retrievers]

    def delete(self, ids: str | Iterable[str]) -> list[Any]:
        """Delete the documents from every retriever; what each of them answered."""
        kept = ids if isinstance(ids, str) else list(ids)
        return [retriever.delete(kept) for retriever in self.retrievers]

    def save(self, directory: str | Path) -> None:
        """Save each retriever in a folder of its own, 0, 1, …, and what joins them in hybrid.json; the reranker is not
        saved. Raises UsageError where something is saved already."""
        folder = Path(directory)
        make_directory(folder)
        for number, retriever in enumerate(self.retrievers):
            retriever.save(folder / str(number))
        kinds = [type(retriever).__name__ for retriever in self.retrievers]
        joined = {"fusion": self.fusion, "weights": self.weights and list(self.weights), "depth": self.depth}
        record = {"format": FORMAT, "retrievers": kinds, **joined}
        (folder / SAVED).write_text(json.dumps(record), encoding="utf-8")
        fsync(folder / SAVED)

    @classmethod
    def load(
        cls,
        directory: str | Path,
        *,
        kinds: Mapping[str, type[Retriever]] | None = None,
        reranker: Reranker | str | None = "feedback",
    ) -> FusedRetriever:
        """What `save` saved. `kinds` names classes of your own: class name -> class.

        Raises NanochatError when it is damaged or not there, UsageError for a newer format or an unknown class."""
        path = Path(directory) / SAVED
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            version, names = saved["format"], saved["retrievers"]
            joined = {key: saved[key] for key in ("fusion", "weights", "depth")}
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise NanochatError(f"no hybrid retriever at {directory}: {SAVED} cannot be read ({error!r})") from error
        if version != FORMAT:
            raise UsageError(f"{path} has format {version}; this nanochat reads {FORMAT}: update it")
        known = dict(kinds or {})
        if not known.keys() >= set(names):
            known = {kind.__name__: kind for kind in (cls, *_retrievers())} | known
        missing = [name for name in names if name not in known]
        if missing:
            raise UsageError(f"{path} needs the class {missing[0]}: give it as kinds={{{missing[0]!r}: …}}")
        retrievers = [known[name].load(path.parent / str(number)) for number, name in enumerate(names)]
        return cls(retrievers, **joined, reranker=reranker)


def _retrievers() -> Iterable[type[Retriever]]:
    """The classes that come with nanochat; imported late, as some of them are made of this one."""
    from nanochat.retrieval.retriever import RETRIEVERS

    return RETRIEVERS.values()


def fuse(founds: Sequence[Found], k: int, fusion: str = "weighted", weights: Sequence[float] | None = None) -> Found:
    """The best k rows of several rankings, fused by name. Raises UsageError for an unknown fusion or bad weights."""
    if fusion == "weighted":
        return weighted(founds, weights, k)
    if fusion == "rrf":
        return rrf(founds, k, weights=weights)
    raise UsageError(f"unknown fusion {fusion!r}: choose from {', '.join(FUSIONS)}")


def fuse_hits(
    lists: Sequence[Sequence[Hit]], k: int, fusion: str = "weighted", weights: Sequence[float] | None = None
) -> list[Hit]:
    """`fuse` for hits, which are the same when document id and span are. Equal scores keep the order in which the
    lists, rank by rank, name them."""
    rows: dict[Key, int] = {}
    documents: list[Document] = []
    for rank in range(max(map(len, lists), default=0)):
        for hits in lists:
            if rank < len(hits) and (key := _key(hits[rank])) not in rows:
                rows[key] = len(rows)
                documents.append(hits[rank].document)
    founds = [
        Found(
            np.array([rows[_key(hit)] for hit in hits], np.int64), np.array([hit.score for hit in hits], np.float32)
        )
        for hits in lists
    ]
    best = fuse(founds, k, fusion, weights)
    return [
        Hit(documents[row].id, score, rank, documents[row])
        for rank, (row, score) in enumerate(zip(best.rows.tolist(), best.scores.tolist()), 1)
    ]


def _key(hit: Hit) -> Key:
    return hit.id, hit.document.span
