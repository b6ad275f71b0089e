"""Searches in Milvus: queries to requests, rows to hits, exactly as many as asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from nanochat.errors import UsageError
from nanochat.retrieval.document import Embedder, Found, Hit, clean_text
from nanochat.retrieval.filters import Condition, matches
from nanochat.retrieval.fusion import RRF_CONSTANT, normalize
from nanochat.retrieval.hybrid import fuse
from nanochat.retrieval.manifest import Version
from nanochat.retrieval.milvus_client import MOST_ROWS, Connection, import_pymilvus
from nanochat.retrieval.milvus_rows import DOCUMENT_FIELDS, Shape, document_of, expression, tokens
from nanochat.retrieval.rerank import rerank
from nanochat.retrieval.search import Query, choose_reranker, depth_with
from nanochat.retrieval.staging import check_vectors

FIELDS = {"bm25": ("sparse",), "dense": ("dense",), "hybrid": ("sparse", "dense")}  # mode -> fields to search
METRICS = {"sparse": "BM25", "dense": "IP"}
_MOST_ANSWERS = 8192  # rows that one request may bring: Milvus sends 64 MB at most

Row = dict[str, Any]
Parts = dict[str, Any]  # field to search -> what to look for: a text of tokens, a vector


def answer(
    searcher: Searcher,
    queries: Sequence[str],
    query: Query,
    conditions: Mapping[str, Condition],
    embedder: Callable[[], Embedder],
) -> list[list[Hit]]:
    """The hits for each text, reranked and normalised if wished. Raises UsageError for wrong arguments."""
    k = query.k
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
        raise UsageError(f"k must be a whole number of 1 or more, not {k!r}")
    for text in queries:
        if not isinstance(text, str):
            raise UsageError(f"a query must be a text, not {text!r:.60}")
    texts = [clean_text(text) for text in queries]
    fields = searcher.fields(query.mode)
    reranker = choose_reranker(query.reranker, len(fields) > 1, searcher.settings.get("analyser"))
    depth = depth_with(reranker, int(k), query.candidates)
    answers = searcher.search(texts, depth, fields, conditions, query.unique, embedder)
    if reranker is not None:
        answers = [rerank(reranker, text, hits, int(k), query.candidates) for text, hits in zip(texts, answers)]
    if query.normalize:
        kind = "minmax" if query.normalize is True else query.normalize
        answers = [normalize(hits, kind) for hits in answers]
    return answers


class Searcher:
    """The passages of one version."""

    def __init__(
        self, call: Connection, name: str, shape: Shape, settings: Mapping[str, Any], version: Version
    ) -> None:
        self._call, self._name, self._shape, self.settings, self._version = call, name, shape, settings, version

    def fields(self, mode: str | None) -> tuple[str, ...]:
        """What to search. Raises UsageError for a mode that this kind of knowledge base has not."""
        kind = self.settings["kind"]
        offered = tuple(FIELDS) if kind == "hybrid" else (kind,)
        if (mode or kind) not in offered:
            raise UsageError(f"no mode {mode!r} in a {kind} knowledge base: choose from {', '.join(offered)}")
        return FIELDS[mode or kind]

    def search(
        self,
        texts: Sequence[str],
        k: int,
        fields: Sequence[str],
        conditions: Mapping[str, Condition],
        unique: bool,
        embedder: Callable[[], Embedder],
    ) -> list[list[Hit]]:
        """The best `k` for each query. More are fetched until enough pass the filter and, with `unique`, are of
        different documents. Raises UsageError when that takes more than Milvus gives."""
        answers: list[list[Hit]] = [[] for _ in texts]
        if not texts or not self._version.passages:
            return answers
        where = expression(conditions, self._version.number)
        parts = self._parts(texts, fields, embedder)
        todo = [i for i, part in enumerate(parts) if part]
        k = min(k, self._version.passages)
        limit = min(2 * k if unique else k, MOST_ROWS)
        while todo:
            late = []
            for i, rows in zip(todo, self._ask([parts[i] for i in todo], len(fields) > 1, where, limit)):
                answers[i] = _hits(rows, k, conditions, unique)
                if len(answers[i]) < k and len(rows) >= limit:
                    late.append(i)
            if late and limit == MOST_ROWS:
                raise UsageError(f"k={k}: Milvus looks at {MOST_ROWS:,} passages at most; take a smaller k")
            todo, limit = late, min(4 * limit, MOST_ROWS)
        return answers

    def _parts(self, texts: Sequence[str], fields: Sequence[str], embedder: Callable[[], Embedder]) -> list[Parts]:
        """What to look for; a query without a word, or without a vector, leaves it out."""
        parts: list[Parts] = [{} for _ in texts]
        if "sparse" in fields:
            for part, text in zip(parts, texts):
                if terms := tokens(self._shape.analyser.query_terms(text)):
                    part["sparse"] = terms
        if "dense" in fields:
            made = embedder()
            for part, vector in zip(parts, check_vectors(made.embed_queries(texts), len(texts), made)):
                if vector.any():
                    part["dense"] = vector
        return parts

    def _ask(self, parts: Sequence[Parts], hybrid: bool, where: str, limit: int) -> list[list[Row]]:
        """Rows with their scores, best first, for each query; those that look for the same fields go together."""
        found: list[list[Row]] = [[] for _ in parts]
        for fields in {tuple(part) for part in parts}:
            alike = [i for i, part in enumerate(parts) if tuple(part) == fields]
            at_once = max(1, _MOST_ANSWERS // limit)
            for start in range(0, len(alike), at_once):
                some = alike[start : start + at_once]
                asked = {field: [parts[i][field] for i in some] for field in fields}
                answers = self._fused(asked, where, limit) if hybrid else self._single(*asked.popitem(), where, limit)
                for i, rows in zip(some, answers):
                    found[i] = rows
        return found

    def _single(self, field: str, data: list[Any], where: str, limit: int) -> list[list[Row]]:
        """The best rows in one index."""
        options = {"filter": where, "limit": limit, "search_params": {"metric_type": METRICS[field]}}
        found = self._call(
            "search", self._name, data=data, anns_field=field, output_fields=list(DOCUMENT_FIELDS), **options
        )
        # milvus-lite gives BM25 as a distance: below 0
        return [_sorted(hits, abs if field == "sparse" else float) for hits in found]

    def _fused(self, asked: dict[str, list[Any]], where: str, limit: int) -> list[list[Row]]:
        """The best rows of both indexes: by Milvus where it can, else here."""
        fusion = self.settings["fusion"]
        depth = min(max(limit, fusion["depth"]), MOST_ROWS)
        if fusion["fusion"] == "rrf" and fusion["weights"] is None:
            return self._fused_there(asked, where, limit, depth)
        lists = {field: self._single(field, data, where, depth) for field, data in asked.items()}
        answers = []
        for i in range(len(next(iter(lists.values())))):
            rows = {row["row"]: row for found in lists.values() for row in found[i]}
            founds = [_found(lists[field][i] if field in lists else []) for field in FIELDS["hybrid"]]
            best = fuse(founds, limit, fusion["fusion"], fusion["weights"])
            answers.append([{**rows[n], "score": score} for n, score in zip(best.rows.tolist(), best.scores.tolist())])
        return answers

    def _fused_there(self, asked: dict[str, list[Any]], where: str, limit: int, depth: int) -> list[list[Row]]:
        engine = import_pymilvus()
        requests = [
            engine.AnnSearchRequest(
                data=data, anns_field=field, param={"metric_type": METRICS[field]}, limit=depth, expr=where
            )
            for field, data in asked.items()
        ]
        ranker = engine.RRFRanker(int(RRF_CONSTANT))
        fields = list(DOCUMENT_FIELDS)
        found = self._call("hybrid_search", self._name, reqs=requests, ranker=ranker, limit=limit, output_fields=fields)
        return [_sorted(hits, float) for hits in found]


def _sorted(hits: Sequence[Mapping[str, Any]], sign: Callable[[float], float]) -> list[Row]:
    """Rows with scores, best first; of equal scores the lower row first."""
    rows = [{**hit["entity"], "row": int(hit["row"]), "score": sign(float(hit["distance"]))} for hit in hits]
    return sorted(rows, key=lambda row: (-row["score"], row["row"]))


def _found(rows: Sequence[Row]) -> Found:
    return Found(np.array([row["row"] for row in rows], np.int64), np.array([row["score"] for row in rows], np.float32))


def _hits(rows: Sequence[Row], k: int, conditions: Mapping[str, Condition], unique: bool) -> list[Hit]:
    """Those that are wanted; passages without a word are not indexed elsewhere, and not found here."""
    hits: list[Hit] = []
    seen: set[str] = set()
    for row in rows:
        if len(hits) == k:
            break
        document = document_of(row)
        if (unique and document.id in seen) or not document.text.strip() or not matches(document, conditions):
            continue
        seen.add(document.id)
        hits.append(Hit(document.id, row["score"], len(hits) + 1, document))
    return hits
