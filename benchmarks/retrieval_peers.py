"""The parts of benchmarks/retrieval.py that measure its peers: each builds an index on disk, and searches it in another
process. Words are what stands between spaces; nothing is stemmed or left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.retrieval_parts import (
    JUDGED,
    WARM_UP,
    Config,
    Figures,
    K,
    built,
    latency,
    queries_of,
    texts,
    timed_ms,
)
from nanochat.retrieval.evaluate import peak_memory_mb

RANK_BM25_DOCS, RANK_BM25_QUERIES = 100_000, 20
LANCE_BATCH = 10_000  # rows

Search = Callable[[str], list[str]]  # a query -> ids, best first


def build(folder: Path, config: Config, peer: str) -> Figures:
    _, ms = timed_ms(lambda: BUILDERS[peer](folder, config["docs"]))
    return built(ms / 1e3, folder / peer)


def query(folder: Path, config: Config, peer: str) -> Figures:
    if peer == "rank_bm25":
        return query_rank_bm25(folder, config)
    __import__(peer.removesuffix("_numpy"))
    content, raw = queries_of(folder, "content"), queries_of(folder, "raw")
    search, open_ms = timed_ms(lambda: OPENERS[peer](folder))
    _, first_ms = timed_ms(lambda: search(content[0]))
    row: Figures = {"open": open_ms, "first": first_ms, **latency("content", search, content)}
    row |= latency("raw", search, raw)
    row["top"] = [search(text) for text in content[WARM_UP:][:JUDGED]]
    return {**row, "query MB": peak_memory_mb()}


# -- bm25s -------------------------------------------------------------------------------------------------------------


def build_bm25s(folder: Path, docs: int) -> None:
    import bm25s

    index = bm25s.BM25(k1=1.2, b=0.75, method="lucene", backend="auto")
    index.index(bm25s_tokens(list(texts(folder, 0, docs))), show_progress=False)
    index.save(str(folder / "bm25s"))


def open_bm25s(folder: Path, backend: str = "auto") -> Search:
    """Numba's scorer where numba is installed ("auto")."""
    import bm25s

    index = bm25s.BM25.load(str(folder / "bm25s"), mmap=True, override_params={"backend": backend})

    def search(query: str) -> list[str]:
        words = bm25s_tokens([query], ids=False)
        found, scores = index.retrieve(words, k=K, show_progress=False)
        return [str(one) for one, score in zip(found[0].tolist(), scores[0].tolist()) if score > 0]

    return search


def bm25s_tokens(batch: list[str], ids: bool = True) -> Any:
    import bm25s

    return bm25s.tokenize(batch, token_pattern=r"\S+", stopwords=[], return_ids=ids, show_progress=False)


# -- tantivy -----------------------------------------------------------------------------------------------------------


def build_tantivy(folder: Path, docs: int) -> None:
    import tantivy

    builder = tantivy.SchemaBuilder()
    builder.add_unsigned_field("row", fast=True)
    builder.add_text_field("text", tokenizer_name="whitespace", index_option="freq")
    (folder / "tantivy").mkdir()
    index = tantivy.Index(builder.build(), str(folder / "tantivy"))
    writer = index.writer()
    for row, text in enumerate(texts(folder, 0, docs)):
        document = tantivy.Document()
        document.add_unsigned("row", row)
        document.add_text("text", text)
        writer.add_document(document)
    writer.commit()
    writer.wait_merging_threads()


def open_tantivy(folder: Path) -> Search:
    import tantivy

    index = tantivy.Index.open(str(folder / "tantivy"))
    searcher = index.searcher()

    def search(query: str) -> list[str]:
        hits = searcher.search(index.parse_query(query, ["text"]), K, count=False).hits
        return list(map(str, searcher.fast_field_values("row", [place for _, place in hits]))) if hits else []

    return search


# -- LanceDB -----------------------------------------------------------------------------------------------------------


def build_lancedb(folder: Path, docs: int) -> None:
    import lancedb
    import pyarrow as pa

    schema = pa.schema([("id", pa.string()), ("text", pa.string())])

    lines = texts(folder, 0, docs)

    def batches() -> Iterator[Any]:
        for start in range(0, docs, LANCE_BATCH):
            part = list(islice(lines, LANCE_BATCH))
            ids = map(str, range(start, start + len(part)))
            yield pa.RecordBatch.from_arrays([pa.array(ids), pa.array(part)], schema=schema)

    table = lancedb.connect(str(folder / "lancedb")).create_table("documents", batches(), schema=schema)
    table.create_fts_index(
        "text", base_tokenizer="whitespace", stem=False, remove_stop_words=False, ascii_folding=False
    )


def open_lancedb(folder: Path) -> Search:
    import lancedb

    table = lancedb.connect(str(folder / "lancedb")).open_table("documents")

    def search(query: str) -> list[str]:
        found = table.search(query, query_type="fts").select(["id"]).limit(K).to_arrow()
        return [str(id) for id in found["id"].to_pylist()]

    return search


# -- rank-bm25 ---------------------------------------------------------------------------------------------------------


def query_rank_bm25(folder: Path, config: Config) -> Figures:
    """Built and searched in one process: it has no file format."""
    import numpy as np
    from rank_bm25 import BM25Okapi

    docs = min(config["docs"], RANK_BM25_DOCS)
    index, ms = timed_ms(lambda: BM25Okapi([text.split() for text in texts(folder, 0, docs)], k1=1.2, b=0.75))

    def search(query: str) -> Any:
        scores = index.get_scores(query.split())
        return np.argpartition(-scores, K)[:K]

    row = latency("content", search, queries_of(folder, "content")[: WARM_UP + RANK_BM25_QUERIES])
    return {"docs": docs, "build s": ms / 1e3, **row, "query MB": peak_memory_mb()}


BUILDERS: dict[str, Callable[[Path, int], None]] = {
    "bm25s": build_bm25s,
    "tantivy": build_tantivy,
    "lancedb": build_lancedb,
}
OPENERS: dict[str, Callable[[Path], Search]] = {
    "bm25s": open_bm25s,
    "bm25s_numpy": lambda folder: open_bm25s(folder, "numpy"),
    "tantivy": open_tantivy,
    "lancedb": open_lancedb,
}
PARTS: dict[str, Callable[[Path, Config, str], Figures]] = {"build": build, "query": query}
