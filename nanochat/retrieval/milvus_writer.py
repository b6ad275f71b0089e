"""One change to a knowledge base in Milvus: rows of the next version written, rows of documents that go marked, then
the version's record inserted, which is the commit."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np

from nanochat.errors import UsageError
from nanochat.retrieval.document import Document, Embedder, clean_text
from nanochat.retrieval.manifest import Version
from nanochat.retrieval.milvus_client import Connection, History
from nanochat.retrieval.milvus_rows import FOREVER, Passage, Shape, any_of, key_of, passages, row_of, visible
from nanochat.retrieval.prepare import check, check_text, slices
from nanochat.retrieval.staging import Staging
from nanochat.retrieval.writer import ON_DUPLICATE

log = logging.getLogger("nanochat")
T = TypeVar("T")
AT_ONCE = 256  # documents that are looked up, embedded and sent together
_SENT_ROWS, _SENT_BYTES = 1000, 8 << 20  # a request; Milvus takes 64 MB


Ready: TypeAlias = tuple[Document, str, list[Passage]]  # with the hash of its content


class Stored(NamedTuple):
    """What the writer needs to know of a document that is there: its first row, its number of rows, and its content."""

    first: int
    parts: int
    hash: str
    source: str


class MilvusWriter:
    """Makes the version after `head`. The caller holds the lock, and calls `recover` first."""

    def __init__(
        self, call: Connection, name: str, shape: Shape, embedder: Embedder | None, head: Version, staging: Path
    ) -> None:
        self._call, self._name, self._shape, self._embedder, self._head = call, name, shape, embedder, head
        self._number = head.number + 1
        self._next = head.last_row + 1
        self._documents, self._passages = head.documents, head.passages
        self._fresh: dict[str, Stored] = {}  # key -> documents of this change
        self._hashes: set[str] = set()  # of this change
        self._gone: dict[str, Stored] = {}  # key -> older documents that this change removes
        self._directory, self._committed = staging, False
        self._staging: Staging | None = None
        self.counts = dict.fromkeys(("added", "updated", "deleted", "unchanged", "duplicates", "skipped"), 0)

    def recover(self) -> None:
        """Undo what a writer that died had done after the last commit; nobody has seen it."""
        head = self._head.number
        self._call("delete", self._name, filter=f"added > {head}")
        marked = f"removed > {head} and removed < {FOREVER}"
        self._mark(self._call.rows(self._name, marked, self._shape.fields), FOREVER)

    def write(self, documents: Iterable[Document], update: bool, on_duplicate: str, on_error: str) -> None:
        """Take in documents, as the local Writer does. Raises UsageError for a bad one, unless on_error="skip"."""
        if on_duplicate not in ON_DUPLICATE:
            raise UsageError(f"on_duplicate={on_duplicate!r}: choose from {', '.join(ON_DUPLICATE)}")
        for batch in (part[i : i + AT_ONCE] for part in slices(documents) for i in range(0, len(part), AT_ONCE)):
            ready: list[Ready] = []
            for document in batch:
                try:
                    clean = check(document)
                    ready.append((clean.document, clean.hash.hex(), passages(clean.document, self._shape)))
                except UsageError as error:
                    self._refuse(str(error), on_error)
            self._insert(self._choose(ready, update, on_duplicate, on_error))

    def _refuse(self, message: str, on_error: str) -> None:
        if on_error == "raise":
            raise UsageError(message)
        self.counts["skipped"] += 1
        log.warning("skipped: %s", message)

    def _choose(
        self, ready: list[Ready], update: bool, on_duplicate: str, on_error: str
    ) -> list[Ready]:
        """Those of the documents that are to be stored; what they replace is marked as gone."""
        known = dict(self._look_up("key", [key_of(document.id) for document, _, _ in ready]))
        known = {key: stored for key, stored in known.items() if key not in self._gone} | self._fresh
        same = self._look_up("hash", [hash for _, hash, _ in ready]) if on_duplicate != "keep" else []
        contents = {stored.hash for key, stored in same if key not in self._gone} | self._hashes
        chosen: dict[str, Ready] = {}
        for one in ready:
            document, hash, _ = one
            key = key_of(document.id)
            name = f"document {document.id!r:.80}"
            stored = known.get(key)
            old = (stored.hash, stored.source) if stored else None
            if key in chosen:
                old = (chosen[key][1], chosen[key][0].source)
            if old == (hash, document.source):
                self.counts["unchanged"] += 1
            elif old and not update:
                self._refuse(f"{name} is already there with other content: `update` replaces it", on_error)
            elif old:
                if stored and key not in chosen:
                    self._forget(key, stored)
                    self.counts["updated"] += 1
                contents.discard(old[0])
                chosen[key] = one
                contents.add(hash)
            elif hash in contents and on_duplicate != "keep":
                if on_duplicate == "raise":
                    self._refuse(f"{name} has the title, content and metadata of another one", on_error)
                else:
                    self.counts["duplicates"] += 1
            else:
                chosen[key] = one
                contents.add(hash)
                self.counts["added"] += 1
        return list(chosen.values())

    def remove(self, ids: Iterable[str]) -> None:
        """Remove documents; ids that are not there count as unchanged."""
        for batch in _batches(dict.fromkeys(clean_text(check_text(id, "an id")) for id in ids), AT_ONCE):
            known = self._look_up("key", list(map(key_of, batch)))
            found = [(key, stored) for key, stored in known if key not in self._gone]
            for key, stored in found:
                self._forget(key, stored)
            self.counts["deleted"] += len(found)
            self.counts["unchanged"] += len(batch) - len(found)

    def commit(self, note: str) -> Version:
        """Mark what goes, then insert the version's record. Returns the head as it was when nothing changed."""
        if not any(self.counts[name] for name in ("added", "updated", "deleted")):
            return self._head
        for batch in _batches(self._gone.values(), AT_ONCE):
            ranges = " or ".join(f"(row >= {one.first} and row < {one.first + one.parts})" for one in batch)
            self._mark(self._call.rows(self._name, ranges, self._shape.fields), self._number)
        changed = sum(self.counts[name] for name in ("added", "updated", "deleted"))
        note = f"{note} {changed:,}"
        if self._call.local and self._next > self._head.last_row + _SENT_ROWS:
            self._call("flush", self._name)  # milvus-lite indexes rows that were flushed; a cluster does so by itself
        version = Version(self._number, time.time(), note, self._documents, self._passages, self._next - 1)
        History(self._call, self._name).put(version)
        self._committed = True
        return version

    # -- rows ----------------------------------------------------------------------------------------------------------

    def _look_up(self, field: str, hexes: Sequence[str]) -> list[tuple[str, Stored]]:
        """(key, document) of those at the head with such a key or hash."""
        where = f"{any_of(field, dict.fromkeys(hexes))} and part == 0 and {visible(self._head.number)}"
        fields = ["row", "key", "parts", "hash", "source"]
        rows = self._call.rows(self._name, where, fields)
        return [(r["key"], Stored(int(r["row"]), int(r["parts"]), r["hash"], r["source"])) for r in rows]

    def _forget(self, key: str, stored: Stored) -> None:
        """Take a document out of the next version: at once when this change wrote it, else by a mark at the commit."""
        if key in self._fresh:
            del self._fresh[key]
            self._hashes.discard(stored.hash)
            self._call("delete", self._name, filter=f"row >= {stored.first} and row < {stored.first + stored.parts}")
        else:
            self._gone[key] = stored
        self._documents -= 1
        self._passages -= stored.parts

    def _insert(self, documents: Sequence[Ready]) -> None:
        """Write new documents, given with their hashes and passages."""
        todo: list[tuple[Passage, str, int]] = []
        for document, hash, pieces in documents:
            self._fresh[key_of(document.id)] = Stored(self._next, len(pieces), hash, document.source)
            self._hashes.add(hash)
            todo += [(piece, hash, self._next + i) for i, piece in enumerate(pieces)]
            self._next += len(pieces)
            self._documents += 1
            self._passages += len(pieces)
        for some in _batches(todo, AT_ONCE):
            vectors = self._embed([piece.document.text for piece, _, _ in some])
            rows = [
                row_of(piece, hash, number, self._number, self._shape, None if vectors is None else vectors[i])
                for i, (piece, hash, number) in enumerate(some)
            ]
            self._send("insert", rows)

    def _embed(self, texts: list[str]) -> np.ndarray | None:
        """(n, dimension) float32; zeros for texts without a word. What was staged is not embedded again."""
        if self._embedder is None:
            return None
        if self._staging is None:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._staging = Staging(self._directory, self._embedder)
        return self._staging.vectors(self._staging.place(texts))

    def close(self) -> None:
        """Vectors of a change that was not committed stay staged."""
        if self._staging is not None:
            self._staging.close(self._committed)

    def _mark(self, rows: Iterable[dict[str, Any]], removed: int) -> None:
        """Write rows again with another end of life: Milvus replaces a row in one step."""
        for batch in _batches(rows, _SENT_ROWS):
            self._send("upsert", [{**row, "removed": removed} for row in batch])

    def _send(self, request: str, rows: Iterable[dict[str, Any]]) -> None:
        """In requests that are small enough."""
        some: list[dict[str, Any]] = []
        size = 0
        for row in rows:
            some.append(row)
            size += 4 * (self._shape.dimension or 0) + sum(
                4 * len(value) for value in row.values() if isinstance(value, str)
            )
            if len(some) >= _SENT_ROWS or size >= _SENT_BYTES:
                self._call(request, self._name, some)
                some, size = [], 0
        if some:
            self._call(request, self._name, some)


def _batches(things: Iterable[T], n: int) -> Iterator[list[T]]:
    iterator = iter(things)
    while batch := list(islice(iterator, n)):
        yield batch
