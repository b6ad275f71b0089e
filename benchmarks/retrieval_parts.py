"""The parts of benchmarks/retrieval.py that measure our own knowledge bases, and what all parts share.

A part is a function (folder, config, kind) -> figures. `prepare` writes to the folder:

    texts.txt       a document a line: `docs` of them, then 2 x `n_changed` that are added or replace others
    queries.json    content and raw queries, WARM_UP more than asked for of each
    stop_words.json
    vectors.f32     a float32 vector for each text; queries.npy one for each query; truth.npy: the ten nearest
"""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from nanochat.retrieval.document import Document
from nanochat.retrieval.evaluate import latencies, peak_memory_mb
from nanochat.retrieval.knowledge_base import KnowledgeBase

K = 10
WIDTH = 384
WARM_UP = 50  # queries before the measured ones
PASSES = 2
JUDGED = 200  # queries whose answers are compared: recall, overlap
CHANGED = 1000
ENGINES = {"bm25": ("tantivy",), "dense": ("faiss",), "hybrid": ("tantivy", "faiss")}

Config = dict[str, Any]
Figures = dict[str, Any]


# -- data --------------------------------------------------------------------------------------------------------------


def prepare(folder: Path, config: Config, _: str) -> Figures:
    """Write texts, queries and vectors."""
    from benchmarks.retrieval_data import N_STOP_WORDS, vocabulary, zipf_documents, zipf_queries

    n = config["docs"] + 2 * n_changed(config)
    with open(folder / "texts.txt", "w", encoding="utf-8") as file:
        file.writelines(text + "\n" for text in zipf_documents(n))
    count = config["queries"] + WARM_UP
    queries = {"content": zipf_queries(count), "raw": zipf_queries(count, stop_words=True)}
    (folder / "queries.json").write_text(json.dumps(queries))
    (folder / "stop_words.json").write_text(json.dumps(vocabulary()[:N_STOP_WORDS]))
    if config["vectors"]:
        prepare_vectors(folder, n, config["docs"], count)
    return {}


def prepare_vectors(folder: Path, n: int, n_searched: int, n_queries: int) -> None:
    """`n` vectors; the truth is among the first `n_searched`."""
    from benchmarks.retrieval_vectors import clustered_queries, clustered_vectors, nearest

    queries = clustered_queries(n_queries, WIDTH)
    np.save(folder / "queries.npy", queries)
    with open(folder / "vectors.f32", "wb") as file:

        def searched() -> Iterator[np.ndarray]:
            start = 0
            for block in clustered_vectors(n, WIDTH):
                file.write(block.tobytes())
                if start < n_searched:
                    yield block[: n_searched - start]
                start += len(block)

        np.save(folder / "truth.npy", nearest(queries[WARM_UP:][:JUDGED], searched(), K))


def n_changed(config: Config) -> int:
    return min(CHANGED, int(config["docs"]) // 10)


def texts(folder: Path, start: int, stop: int) -> Iterator[str]:
    with open(folder / "texts.txt", encoding="utf-8") as file:
        for line in islice(file, start, stop):
            yield line.rstrip("\n")


def documents(folder: Path, start: int, stop: int) -> Iterator[Document]:
    for i, text in enumerate(texts(folder, start, stop), start):
        yield Document(str(i), text)


def queries_of(folder: Path, kind: str) -> list[str]:
    found: list[str] = json.loads((folder / "queries.json").read_text())[kind]
    return found


class Prepared:
    """An embedder that hands out the prepared vectors: the next ones for documents, which come in order, and for the
    i-th query of any kind the i-th. Read by pieces, so that they are not counted as memory of the index."""

    name = "prepared"
    dimension = WIDTH

    def __init__(self, folder: Path, start: int = 0) -> None:
        self.path, self.next = folder / "vectors.f32", start
        self.queries = dict[str, np.ndarray]()
        vectors = np.load(folder / "queries.npy")
        for kind in ("content", "raw"):
            self.queries |= zip(queries_of(folder, kind), vectors)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        vectors = np.fromfile(self.path, np.float32, len(texts) * WIDTH, offset=self.next * WIDTH * 4)
        self.next += len(texts)
        return vectors.reshape(len(texts), WIDTH)

    def embed_queries(self, texts: Sequence[str]) -> np.ndarray:
        return np.stack([self.queries[text] for text in texts])


# -- measuring ---------------------------------------------------------------------------------------------------------


def latency(name: str, search: Callable[[Any], object], queries: Sequence[Any]) -> Figures:
    """`<name> p50` and `<name> p99` in ms, of all queries but the WARM_UP first. Of the PASSES over all queries the
    faster time counts for each: what else runs on the machine can only add some."""
    seconds = np.zeros((PASSES, len(queries)))
    for i in range(PASSES):
        for j, query in enumerate(queries):
            began = time.perf_counter()
            search(query)
            seconds[i, j] = time.perf_counter() - began
    found = latencies(seconds.min(axis=0)[WARM_UP:].tolist())
    return {f"{name} p50": found["p50"], f"{name} p99": found["p99"]}


def timed_ms(function: Callable[[], Any]) -> tuple[Any, float]:
    began = time.perf_counter()
    value = function()
    return value, (time.perf_counter() - began) * 1e3


def built(seconds: float, directory: Path) -> Figures:
    """What this process, which did nothing else, took to build what is in the directory."""
    cpu, memory = time.process_time(), peak_memory_mb()
    return {"build s": seconds, "cpu s": cpu, "build MB": memory, "disk MB": disk_mb(directory)}


def disk_mb(directory: Path) -> float:
    """A file counts once, however many links it has."""
    files = [path.stat() for path in directory.rglob("*") if path.is_file()]
    return sum({one.st_ino: one.st_size for one in files}.values()) / 1e6


# -- parts -------------------------------------------------------------------------------------------------------------


def build(folder: Path, config: Config, kind: str) -> Figures:
    options: dict[str, Any] = {"kind": kind}
    if kind != "bm25":
        options["embedder"] = Prepared(folder)
    if kind != "dense":
        options["analyser"] = {"stop_words": json.loads((folder / "stop_words.json").read_text())}
    began = time.perf_counter()
    with KnowledgeBase.create(folder / kind, **options) as kb:
        change = kb.add(documents(folder, 0, config["docs"]))
    seconds = time.perf_counter() - began
    assert change.added == config["docs"], change
    return built(seconds, folder / kind)


def query(folder: Path, config: Config, kind: str) -> Figures:
    for engine in ENGINES[kind]:
        importlib.import_module(engine)
    content, raw = queries_of(folder, "content"), queries_of(folder, "raw")
    embedder = None if kind == "bm25" else Prepared(folder)
    kb, open_ms = timed_ms(lambda: KnowledgeBase.open(folder / kind, embedder=embedder))
    _, first_ms = timed_ms(lambda: kb.search(content[0], K))
    row: Figures = {"open": open_ms, "first": first_ms, **latency("content", lambda text: kb.search(text, K), content)}
    answers = [[hit.id for hit in kb.search(text, K)] for text in content[WARM_UP:][:JUDGED]]
    if kind == "dense":
        row["query MB"] = peak_memory_mb()
        row["recall"] = recall(answers, np.load(folder / "truth.npy"))
        row["settings"] = dense_settings(folder, config)
        return row
    if kind == "hybrid":
        row |= latency("fused", lambda text: kb.search(text, K, reranker=None), content)
    row |= latency("stop", lambda text: kb.search(text, K), raw)
    # The index holds all words, and queries drop the stop words: so this is the index of an analyser without any.
    generation = kb._view.generation
    assert generation is not None
    index: Any = generation.indexes["bm25"]
    index.analyser = type(index.analyser).of({**index.analyser.settings(), "stop_words": []})
    row |= latency("raw", lambda text: kb.search(text, K), raw)
    return {**row, "query MB": peak_memory_mb(), "top": answers}


def recall(answers: Sequence[Sequence[str | int]], truth: np.ndarray) -> float:
    """Share of the ten nearest that were found; a document's id is the number of its vector."""
    return float(np.mean([len({int(one) for one in a} & set(t)) / len(t) for a, t in zip(answers, truth.tolist())]))


def dense_settings(folder: Path, config: Config) -> list[Figures]:
    """Recall and latency of the dense index alone with more and less of it searched. Rescoring is never off: the least
    that can be nominated for K hits is 2 K."""
    from nanochat.retrieval.dense import DenseIndex
    from nanochat.retrieval.segment import DenseSettings, n_lists

    defaults = DenseSettings()
    lists = n_lists(defaults.kind(config["docs"]), config["docs"], defaults)
    tried = [{"fetch": fetch, "probe": 0} for fetch in (2 * K, 100, 200, 1000)]
    if lists > 1:
        tried += [{"fetch": 200, "probe": max(lists // part, 1)} for part in (80, 20, 5)]
    [directory] = (folder / "dense").glob("gen-*/dense")
    vectors, truth = np.load(folder / "queries.npy"), np.load(folder / "truth.npy")
    found = []
    for settings in tried:
        index = DenseIndex.open(directory, {"dense": settings, "dimension": WIDTH})
        search = partial(index.search, k=K)
        row = latency("content", search, [one[None] for one in vectors])
        answers = [search(one[None])[0].rows.tolist() for one in vectors[WARM_UP:][:JUDGED]]
        row["recall"] = recall(answers, truth)
        found.append({"side": "dense index alone", "docs": config["docs"], **settings, **row})
        index.close()
    return found


def changes(folder: Path, config: Config, kind: str) -> Figures:
    """Add, replace and delete documents, then compare the latency of the versions."""
    n, size = config["docs"], n_changed(config)
    embedder = None if kind == "bm25" else Prepared(folder, n)
    ids = [str(i) for i in range(0, n, n // (2 * size))]
    fresh = list(documents(folder, n, n + 2 * size))
    replacing = [Document(id, one.content) for id, one in zip(ids[0::2], fresh[size:])]
    added = [Document(one.id, f"{one.content} added{one.id}") for one in fresh[:size]]
    row: Figures = {}
    with KnowledgeBase.open(folder / kind, embedder=embedder) as kb:
        if embedder is not None:  # the vector of the document for the word that names it
            names = [f"added{one.id}" for one in added[:K]]
            embedder.queries |= zip(names, Prepared(folder, n).embed(names))
        began = time.perf_counter()
        kb.add(added)
        for one in added[:K]:
            assert one.id in {hit.id for hit in kb.search(f"added{one.id}", K)}
        row["add_1000_s"] = time.perf_counter() - began
        row["update_1000_s"] = timed_ms(lambda: kb.update(replacing))[1] / 1e3
        row["delete_1000_s"] = timed_ms(lambda: kb.delete(ids[1::2][:size]))[1] / 1e3
        assert len(kb) == n, len(kb)
        row["old_vs_newest"] = old_vs_newest(kb, queries_of(folder, "content"))
    return row


def old_vs_newest(kb: KnowledgeBase, queries: Sequence[str]) -> float:
    """p50 of the slowest earlier version with documents over the newest's; the versions take turns at every query."""
    versions = [one.number for one in kb.versions() if one.documents]
    views = [kb.at(number) for number in versions]
    seconds = np.zeros((PASSES, len(views), len(queries)))
    for n in range(PASSES):
        for j, text in enumerate(queries):
            for i, view in enumerate(views):
                began = time.perf_counter()
                view.search(text, K)
                seconds[n, i, j] = time.perf_counter() - began
    for view in views:
        view.close()
    p50 = np.median(seconds.min(axis=0)[:, WARM_UP:], axis=1)
    return float(p50[:-1].max() / p50[-1])


PARTS: dict[str, Callable[[Path, Config, str], Figures]] = {
    "prepare": prepare,
    "build": build,
    "query": query,
    "changes": changes,
}
