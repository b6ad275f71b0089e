"""Retrieval quality: every retriever on Cranfield and HotpotQA, with bm25s and its plain fusion in the same run.

    python -m benchmarks.retrieval_quality --cranfield DIR --hotpotqa FILE [--embedder minilm]

Knowledge bases with default settings; `fused` is the hybrid search without a reranker, `hybrid` the one with
`FeedbackReranker`, `rrf` fuses the same two indexes by rank. Values are means over all queries; the first metric's also
over the odd-numbered ones, on which fusion and feedback were tuned, and over the even-numbered ones. `interval` is the
first metric's 95% interval, `hybrid ahead` by how much the hybrid's is higher, paired by query. Latency is that of one
query at a time with its embedding. Ratios:

    <collection>_hybrid_minus_<row>   the middle of `hybrid ahead`
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import SHARED, report
from nanochat.retrieval.document import Document, Found, Hit
from nanochat.retrieval.evaluate import Evaluation, evaluate
from nanochat.retrieval.formats import Collection, cranfield, hotpotqa
from nanochat.retrieval.fusion import rrf
from nanochat.retrieval.hybrid import FusedRetriever
from nanochat.retrieval.knowledge_base import KnowledgeBase
from nanochat.retrieval.metrics import difference
from nanochat.retrieval.rerank import FeedbackReranker

METRICS = {
    "cranfield": ("ndcg@10", "recall@10", "precision@5", "mrr@10"),
    "hotpotqa": ("all_gold@5", "recall@2", "recall@5", "recall@10", "all_gold@2", "all_gold@10", "ndcg@10"),
}
PASSAGES = 40  # asked for, so that ten documents are among them
OURS = "hybrid"

Search = Callable[[str, int], Sequence[Hit]]


def there(path: Path) -> Path | None:
    return path if path.exists() else None


def main() -> None:
    parser = argparse.ArgumentParser(description="Quality of every retriever on Cranfield and HotpotQA")
    data, questions = there(SHARED / "cranfield"), there(SHARED / "hotpotqa" / "sample200.jsonl")
    parser.add_argument("--cranfield", default=data, help="directory with cran.all.1400, cran.qry and cranqrel")
    parser.add_argument("--hotpotqa", default=questions, help="JSONL file of HotpotQA questions with their paragraphs")
    parser.add_argument("--embedder", default="minilm", help="as for make_embedder")
    args = parser.parse_args()
    collections: dict[str, Collection] = {}
    if args.cranfield:
        collections["cranfield"] = cranfield(args.cranfield)
    if args.hotpotqa:
        collections["hotpotqa"] = hotpotqa(args.hotpotqa)
    if not collections:
        print("retrieval_quality: not run; name a collection: --cranfield DIR, --hotpotqa FILE")
        return
    rows: list[dict[str, Any]] = []
    ratios: dict[str, float | None] = {}
    for name, collection in collections.items():
        found, compared = measure(name, collection, args.embedder)
        rows += found
        ratios |= compared
    report("retrieval_quality", rows, ratios)


def measure(
    name: str, collection: Collection, embedder: str
) -> tuple[list[dict[str, Any]], dict[str, float | None]]:
    """Rows and differences of one collection."""
    with tempfile.TemporaryDirectory() as folder:
        searches = retrievers(Path(folder), list(collection.documents), embedder)
        results = {
            row: evaluate(search, collection.queries, collection.qrels, metrics=METRICS[name])
            for row, search in searches.items()
        }
    rows: list[dict[str, Any]] = []
    ratios: dict[str, float | None] = {}
    main_metric = METRICS[name][0]
    for row, result in results.items():
        rows.append({"collection": name, "retriever": row, **figures(result)})
        if row != OURS:
            ahead = difference(results[OURS].per_query[main_metric], result.per_query[main_metric])
            rows[-1]["hybrid ahead"] = f"{ahead.value:.3f} ({ahead.low:.3f} to {ahead.high:.3f})"
            ratios[f"{name}_{OURS}_minus_{row}"] = ahead.value
    return rows, ratios


def figures(result: Evaluation) -> dict[str, Any]:
    row: dict[str, Any] = {metric: round(estimate.value, 4) for metric, estimate in result.metrics.items()}
    name, first = next(iter(result.metrics.items()))
    values = list(result.per_query[name].values())
    for part, start in (("odd", 0), ("even", 1)):
        row[f"{name} {part}"] = round(float(np.mean(values[start::2])), 4)
    interval = f"{first.low:.3f} to {first.high:.3f}"
    return {"queries": result.n_queries, **row, "p50 ms": result.latency_ms["p50"], "interval": interval}


def retrievers(folder: Path, documents: list[Document], embedder: str) -> dict[str, Search]:
    """Searches by name: ours over two knowledge bases, then the peers."""
    simple = KnowledgeBase.create(folder / "simple", kind="simple")
    kb = KnowledgeBase.create(folder / "hybrid", kind="hybrid", embedder=embedder)
    for one in (simple, kb):
        one.add(documents)
    feedback = FeedbackReranker(kb.settings["analyser"])
    dense = Mode(kb, "dense")
    ranks = FusedRetriever([Mode(kb, "bm25"), dense], fusion="rrf", reranker=None)
    searches: dict[str, Search] = {
        "simple": lambda query, k: simple.search(query, k, unique=True),
        "bm25": lambda query, k: kb.search(query, k, mode="bm25", unique=True),
        "dense": lambda query, k: kb.search(query, k, mode="dense", unique=True),
        "rrf": lambda query, k: ranks.search(query, PASSAGES),
        "fused": lambda query, k: kb.search(query, k, unique=True, reranker=None),
        OURS: lambda query, k: kb.search(query, k, unique=True, reranker=feedback),
    }
    return {**searches, **peers(documents, dense)}


class Mode:
    """One index of a knowledge base as a retriever."""

    def __init__(self, kb: KnowledgeBase, mode: str) -> None:
        self.kb, self.mode = kb, mode

    def search(self, queries: Any, k: int = 5, filter: Any = None) -> Any:
        return self.kb.search(queries, k, filter, mode=self.mode)


def peers(documents: list[Document], dense: Mode) -> dict[str, Search]:
    """bm25s with Snowball's stemmer and English stop words, and its reciprocal-rank fusion with the dense index."""
    try:
        import bm25s
        import Stemmer
    except ImportError as error:
        print(f"no peers: {error.name} is not installed (pip install bm25s PyStemmer)")
        return {}
    stemmer = Stemmer.Stemmer("english")

    def tokens(texts: list[str]) -> Any:
        return bm25s.tokenize(texts, stopwords="en", stemmer=stemmer, show_progress=False)

    index = bm25s.BM25()
    index.index(tokens([document.text for document in documents]), show_progress=False)
    rows = {document.id: row for row, document in enumerate(documents)}

    def lexical(query: str, k: int) -> Found:
        found, scores = index.retrieve(tokens([query]), k=min(k, len(documents)), show_progress=False)
        kept = scores[0] > 0
        return Found(found[0][kept].astype(np.int64), scores[0][kept])

    def hits(found: Found) -> list[Hit]:
        pairs = zip(found.rows.tolist(), found.scores.tolist())
        return [Hit(documents[row].id, score, rank, documents[row]) for rank, (row, score) in enumerate(pairs, 1)]

    def fused(query: str, k: int) -> list[Hit]:
        near = list(dict.fromkeys(rows[hit.id] for hit in dense.search(query, 100)))
        other = Found(np.array(near, np.int64), np.zeros(len(near), np.float32))
        return hits(rrf([lexical(query, 100), other], k))

    return {"bm25s": lambda query, k: hits(lexical(query, k)), "bm25s_rrf": fused}


if __name__ == "__main__":
    main()
