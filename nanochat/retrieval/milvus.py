"""MilvusKnowledgeBase: a knowledge base beyond one machine, with the interface of KnowledgeBase, over a Milvus cluster.

    kb = MilvusKnowledgeBase.create("http://milvus:19530", collection="facts", kind="hybrid", embedder="minilm-int8")
    kb.add([Document("moon", "The Moon has no air.")])
    kb.search("air on the moon", k=3, filter={"lang": "en"})

Milvus holds the vectors, ranks terms by BM25 (its built-in function; the analyser is ours) and fuses both by reciprocal
rank. What it does otherwise than the local knowledge base:

- the lock of a writer that was killed on another machine must be broken by hand;
- BM25 counts words over the passages of all versions, and in each segment or shard for itself: scores differ a little;
- a dense search is as exact as the cluster's index; dense_index="FLAT" makes it exact;
- `verify` compares documents with their hashes; bits in files are Milvus's own to check;
- `reindex` is not offered: an index is the cluster's, and another embedder needs another collection;
- one search gives at most 16,384 passages; an id, a title, a document's metadata at most 65,535 bytes.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nanochat.errors import UsageError
from nanochat.retrieval.document import Document, Embedder, content_hash
from nanochat.retrieval.interface import ingest_files, tag_name
from nanochat.retrieval.milvus_client import Connection, History, WriterLock
from nanochat.retrieval.milvus_reader import FORMAT, MilvusReader, shape_of
from nanochat.retrieval.milvus_rows import indexes, schema
from nanochat.retrieval.milvus_writer import MilvusWriter
from nanochat.retrieval.opening import new_settings
from nanochat.retrieval.staging import Staging
from nanochat.retrieval.writer import Change

KINDS = ("bm25", "dense", "hybrid")


class MilvusKnowledgeBase(MilvusReader):
    """Made by `create`, opened by `open`. A context manager; `close` ends the connection.

    It reads one version until `refresh`; a change moves it on. One writer at a time: a second waits. Raises UsageError
    for wrong arguments, NanochatError for what goes wrong."""

    @classmethod
    def create(
        cls,
        uri: str,
        *,
        collection: str = "knowledge",
        kind: str = "hybrid",
        embedder: Embedder | str | None = None,
        analyser: Any = None,
        chunk_words: int = 200,
        overlap_words: int = 40,
        fusion: str = "rrf",
        weights: Sequence[float] | None = None,
        depth: int = 100,
        dense_index: str | None = None,
        token: str = "",
        database: str = "",
    ) -> MilvusKnowledgeBase:
        """Make an empty knowledge base at http(s)://host:port, or in a local file that ends in .db (milvus-lite).

        `fusion`: "rrf" (Milvus fuses; with `weights` the client does) or "weighted" (the client does). `dense_index`:
        Milvus's name of an index, "FLAT" (exact; what a local file gets), "HNSW", "IVF_SQ8", "DISKANN" or "AUTOINDEX"
        (what a cluster gets). The rest as in KnowledgeBase.create. Raises UsageError for a collection that exists."""
        if kind not in KINDS:
            raise UsageError(f"unknown kind of knowledge base in Milvus {kind!r}: choose from {', '.join(KINDS)}")
        if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]{0,239}", collection):
            raise UsageError(f"collection {collection!r}: a letter, then letters, digits and underscores, at most 240")
        options = {"format": FORMAT, "kind": kind, "chunk_words": chunk_words, "overlap_words": overlap_words}
        fused = {"fusion": fusion, "weights": list(weights) if weights else None, "depth": depth}
        settings, made = new_settings(options, analyser, embedder, fused)
        with Connection(uri, token, database).closed_on_error() as connection:
            history, shape = History(connection, collection), shape_of(settings)
            if history.exists or connection("has_collection", collection):
                raise UsageError(f"collection {collection!r} exists at {uri}: open it, or choose another name")
            connection.create(collection, schema(shape), indexes(shape, dense_index, connection.local))
            history.create(settings)
            return cls(connection, collection, settings, history.find(None), made)

    def add(self, documents: Iterable[Document], on_duplicate: str = "skip", on_error: str = "raise") -> Change:
        """Add documents, all of them or none; see KnowledgeBase.add."""
        return self._write(documents, False, on_duplicate, on_error)

    def update(self, documents: Iterable[Document], on_error: str = "raise") -> Change:
        """Add documents; where the id is there, replace its document. Of equal ids the last one counts."""
        return self._write(documents, True, "keep", on_error)

    def delete(self, ids: str | Iterable[str]) -> Change:
        """Delete documents by their ids; those that are not there count as unchanged."""
        names = [ids] if isinstance(ids, str) else list(ids)
        return self._change("delete", lambda writer: writer.remove(names))

    def ingest(
        self,
        files: str | Path | Iterable[str | Path],
        on_error: str = "raise",
        commit_every: int = 50_000,
        progress: bool = True,
        update: bool = False,
        on_duplicate: str = "skip",
    ) -> Change:
        """Add the documents of JSONL files, a version for every `commit_every` of them; see KnowledgeBase.ingest."""

        def commit(documents: Iterator[Document], _: list[Path]) -> Change:
            return self._write(documents, update, on_duplicate, on_error)

        return ingest_files(files, on_error, commit_every, progress, self.version, commit)

    def tag(self, name: str, version: int | str | None = None) -> None:
        """Name a version (default: the newest), or move a name. `compact` keeps tagged versions."""
        name = tag_name(name)
        with self._alone():
            self._history.tag(self._history.find(version), name)

    def untag(self, name: str) -> None:
        """Take a name away. Raises UsageError when there is none such."""
        with self._alone():
            self._history.untag(name)

    def compact(self, keep: int | Iterable[int | str] = 1) -> int:
        """Forget all versions but the last `keep` (or those named), the newest and the tagged ones, and what only they
        held. Returns how many versions went. Readers of a version that goes find less and less."""
        with self._alone():
            return self._history.compact(keep, self.collection)

    def stage(self, texts: Sequence[str], vectors: np.ndarray) -> None:
        """Hand over vectors that were computed elsewhere, (n, dimension), for texts as `passages` gives them: adding
        documents with these passages, on this machine, takes them instead of embedding."""
        self.staging.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(Staging(self.staging, self.embedder)) as staging:
            staging.add([content_hash(text) for text in texts], vectors)

    def break_lock(self) -> None:
        """Take the right to write from a writer that is dead and ran on another machine."""
        WriterLock(self._call, self.collection).break_lock()

    def _write(self, documents: Iterable[Document], update: bool, on_duplicate: str, on_error: str) -> Change:
        if isinstance(documents, Document):
            documents = [documents]
        what = "update" if update else "add"
        return self._change(what, lambda writer: writer.write(documents, update, on_duplicate, on_error))

    def _change(self, what: str, work: Callable[[MilvusWriter], None]) -> Change:
        with self._alone():
            self.refresh()
            embedder = self.embedder if "embedder" in self.settings else None
            writer = MilvusWriter(self._call, self.collection, self.shape, embedder, self._version, self.staging)
            with contextlib.closing(writer):
                writer.recover()
                work(writer)
                self._version = writer.commit(what)
        return Change(self.version, **writer.counts)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """The right to write, or a clear error. Readers go on meanwhile."""
        if self.read_only:
            raise UsageError(f"{self!r} is read-only; open it without version and read_only to change it")
        lock = WriterLock(self._call, self.collection)
        lock.take(self.lock_timeout)
        try:
            yield
        finally:
            lock.release()
