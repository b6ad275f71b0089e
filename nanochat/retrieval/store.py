"""Segments: directories of documents that never change once written.

    documents.sqlite   documents(row, n, id, hash, title, source, metadata, content): `row` is the document's first
                       passage, `n` how many it has; passages(row, start, end, text) of those that were cut, whose
                       content is NULL: `text` runs from the passage's start (the first one's from 0) to the next one's,
                       so that nothing is stored twice; keys and fields(key, value, row): what metadata filters look up
    places.npy         (6, m) int64: row and n of each document, rows ascending; hash of the id (as uint64) and row,
                       hashes ascending, which say where an id is; and the same for contents

SQLite is written without a journal, since an unfinished segment is thrown away, and read as immutable: without locks.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import threading
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np

from nanochat.errors import NanochatError
from nanochat.retrieval.document import Document
from nanochat.retrieval.filters import Condition, field_values, matches, sql
from nanochat.retrieval.generation import describe
from nanochat.retrieval.index_files import load_array
from nanochat.retrieval.manifest import SegmentInfo, opened

DATABASE, PLACES = "documents.sqlite", "places.npy"
MOST_PASSAGES = 1 << 24  # of a document, far more than one can have: a larger number is damage
_AT_ONCE = 500  # parameters of a query
_SCHEMA = """
CREATE TABLE documents (
    row INTEGER PRIMARY KEY, n INTEGER, id TEXT, hash BLOB, title TEXT, source TEXT, metadata TEXT, content TEXT);
CREATE INDEX titles ON documents(title) WHERE title != '';
CREATE INDEX sources ON documents(source) WHERE source != '';
CREATE TABLE passages (row INTEGER PRIMARY KEY, start INTEGER, end INTEGER, text TEXT);
CREATE TABLE keys (key INTEGER PRIMARY KEY, name TEXT UNIQUE);
CREATE TABLE fields (key INTEGER, value, row INTEGER, PRIMARY KEY (key, value, row)) WITHOUT ROWID;
CREATE TEMP TABLE loose (key INTEGER, value, row INTEGER);
"""


class Known(NamedTuple):
    """What the writer needs to know of a stored document."""

    row: int
    n: int
    hash: bytes
    source: str


def hash_id(id: str) -> bytes:
    """8 bytes that stand for an id in `places.npy`; equal ones are told apart by the id itself."""
    return blake2b(id.encode(), digest_size=8).digest()


def numbers(hashes: Sequence[bytes]) -> np.ndarray:
    """(n,) uint64: the first 8 bytes of each hash; all are of one length."""
    joined = np.frombuffer(b"".join(hashes), "<u8")
    return joined.reshape(len(hashes), -1)[:, 0].astype(np.uint64) if len(hashes) else joined


class SegmentWriter:
    """Fills a new directory with documents in ascending order of their rows. Raises OSError and sqlite3.Error."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True)
        self.directory = directory
        self.rows, self.counts = array("q"), array("q")
        self.ids, self.hashes = array("Q"), array("Q")
        self._keys: dict[str, int] = {}
        self._connection = sqlite3.connect(directory.resolve() / DATABASE, isolation_level=None, uri=True)
        pragmas = "page_size=8192; journal_mode=OFF; synchronous=OFF; locking_mode=EXCLUSIVE; cache_size=-16000"
        for pragma in pragmas.split("; "):
            self._connection.execute(f"PRAGMA {pragma}").fetchall()
        self._connection.executescript(_SCHEMA)
        self._connection.execute("BEGIN")

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def n_passages(self) -> int:
        return sum(self.counts)

    def add(
        self,
        documents: Sequence[tuple[int, int, str, bytes, str, str, str, str | None]],
        id_hashes: Sequence[bytes],
        passages: Sequence[tuple[int, int, int, str]],
        fields: Iterable[tuple[int, Mapping[str, Any]]],
    ) -> None:
        """Documents and passages as rows of their tables (content None where passages hold it); `fields` gives the row
        and metadata of those that have any."""
        execute = self._connection.executemany
        execute("INSERT INTO documents VALUES (?, ?, ?, ?, ?, ?, ?, ?)", documents)
        if passages:
            execute("INSERT INTO passages VALUES (?, ?, ?, ?)", passages)
        loose = [
            (self._key(name), value, row)
            for row, metadata in fields
            for name, raw in metadata.items()
            for value in field_values(raw)
        ]
        if loose:
            execute("INSERT INTO loose VALUES (?, ?, ?)", loose)
        self.rows.extend([document[0] for document in documents])
        self.counts.extend([document[1] for document in documents])
        self.hashes.frombytes(numbers([document[3] for document in documents]).tobytes())
        self.ids.frombytes(numbers(id_hashes).tobytes())

    def known(self, rows: Sequence[int]) -> dict[int, tuple[str, Known]]:
        """As `Segment.known`, while it is being filled."""
        return _known(self._connection, rows)

    def _key(self, name: str) -> int:
        if name not in self._keys:
            self._keys[name] = len(self._keys)
            self._connection.execute("INSERT INTO keys VALUES (?, ?)", (self._keys[name], name))
        return self._keys[name]

    def take(self, segment: Segment, dead: np.ndarray) -> None:
        """Copy the documents of a segment, whose rows are greater than all so far, but those in `dead` (sorted)."""
        connection = self._connection
        table = np.asarray(segment.rows)
        alive = ~np.isin(table[0], dead)
        connection.execute("COMMIT")
        connection.execute("ATTACH ? AS old", (_uri(segment.directory),))
        connection.execute("CREATE TEMP TABLE gone (row INTEGER PRIMARY KEY)")
        connection.execute("BEGIN")
        gone = [(r,) for row, n in table[:, ~alive].T.tolist() for r in range(row, row + n)]
        connection.executemany("INSERT INTO gone VALUES (?)", gone)
        names = {name: self._key(name) for (name,) in connection.execute("SELECT name FROM old.keys").fetchall()}
        where = "WHERE row NOT IN (SELECT row FROM gone)" if gone else ""
        connection.execute(f"INSERT INTO documents SELECT * FROM old.documents {where} ORDER BY row")
        connection.execute(f"INSERT INTO passages SELECT * FROM old.passages {where} ORDER BY row")
        if names:
            connection.execute(
                "INSERT INTO loose SELECT new.key, f.value, f.row FROM old.fields AS f JOIN old.keys AS k "
                f"ON k.key = f.key JOIN main.keys AS new ON new.name = k.name {where}"
            )
        connection.execute("COMMIT")
        connection.execute("DROP TABLE gone")
        connection.execute("DETACH old")
        connection.execute("BEGIN")
        for target, values in ((self.rows, table[0]), (self.counts, table[1])):
            target.extend(values[alive].tolist())
        for target, (hashes, rows) in ((self.ids, segment.ids), (self.hashes, segment.hashes)):
            target.extend(hashes.view(np.uint64)[np.argsort(rows)][alive].tolist())

    def finish(self) -> None:
        """Sort what is looked up, write all and close."""
        execute = self._connection.execute
        execute("INSERT OR IGNORE INTO fields SELECT key, value, row FROM loose ORDER BY key, value, row")
        execute("COMMIT")
        self.close()
        rows = np.array(self.rows, np.int64)
        lines = [rows, np.array(self.counts, np.int64)]
        for values in (self.ids, self.hashes):
            hashes = np.array(values, np.uint64)
            order = np.argsort(hashes, kind="stable")
            lines += [hashes[order].view(np.int64), rows[order]]
        with open(self.directory / PLACES, "wb") as file:
            np.save(file, np.stack(lines), allow_pickle=False)

    def describe(self) -> SegmentInfo:
        """What the manifest says of it, once it is finished. Waits until the disk has all of it: in another thread,
        if need be."""
        for name in (DATABASE, PLACES):
            with opened(self.directory / name) as descriptor:
                os.fsync(descriptor)
        end = self.rows[-1] + self.counts[-1] - 1
        return SegmentInfo(
            self.directory.name, len(self), self.n_passages, self.rows[0], end, describe(self.directory)
        )

    def close(self) -> None:
        self._connection.close()


def merge(directory: Path, target: Path, names: Sequence[str], dead: np.ndarray) -> SegmentInfo | None:
    """Several segments as a new one, without the documents whose first rows are in `dead` (sorted); None when nothing
    is left."""
    writer = SegmentWriter(target)
    try:
        for name in names:
            with contextlib.closing(Segment(directory / name)) as segment:
                writer.take(segment, dead)
        if not len(writer):
            return None
        writer.finish()
    finally:
        writer.close()
    return writer.describe()


def _uri(directory: Path) -> str:
    return f"file:{quote(str((directory / DATABASE).resolve()))}?mode=ro&immutable=1"


class Segment:
    """A segment opened for reading, by several threads if need be. Raises NanochatError where a file is damaged, and
    FileNotFoundError where it is missing."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        try:
            places = _load(directory / PLACES)
        except FileNotFoundError:
            raise FileNotFoundError(directory / PLACES) from None
        except (ValueError, EOFError) as error:
            raise NanochatError(f"{directory} is damaged ({error}); `verify` tells which file") from error
        self.rows, self.ids, self.hashes = places[:2], places[2:4], places[4:]
        if not (directory / DATABASE).exists():
            raise FileNotFoundError(directory / DATABASE)
        self._lock = threading.Lock()
        with self._reading():
            self._connection = sqlite3.connect(_uri(directory), uri=True, isolation_level=None, check_same_thread=False)
            self._connection.execute("SELECT 1 FROM documents LIMIT 1").fetchone()  # opens the file: it may be removed

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            with self._lock:
                yield
        except sqlite3.Error as error:
            raise self._damage(error) from error

    def close(self) -> None:
        self._connection.close()

    def __del__(self) -> None:
        if hasattr(self, "_connection"):
            self._connection.close()

    # -- where things are ----------------------------------------------------------------------------------------------

    def places(self, rows: np.ndarray) -> np.ndarray:
        """The numbers of the documents, (n,) int64, that passages belong to; -1 for rows that are not here."""
        firsts, counts = self.rows
        at = np.searchsorted(firsts, rows, side="right") - 1
        return np.where((at >= 0) & (rows < firsts[at] + counts[at]), at, -1)

    def expand(self, rows: np.ndarray) -> np.ndarray:
        """All passages, sorted, of the documents with these (sorted) first rows."""
        if not len(rows):
            return rows
        firsts, all_counts = self.rows
        at = np.minimum(np.searchsorted(firsts, rows), len(firsts) - 1)
        counts = all_counts[at]
        overlap = (rows[:-1] + counts[:-1] > rows[1:]).any()
        if overlap or (firsts[at] != rows).any() or counts.min() < 1 or counts[-1] > MOST_PASSAGES:
            raise NanochatError(f"{self.directory / PLACES} is damaged; `verify` tells more")
        if counts.max() == 1:
            return rows
        starts = np.cumsum(counts) - counts
        return np.repeat(rows - starts, counts) + np.arange(counts.sum())

    def with_ids(self, hashes: np.ndarray) -> list[tuple[int, int]]:
        """(place in `hashes`, first row) of the documents whose id has such a hash, (n,) uint64."""
        return _look_up(self.ids, hashes)

    def with_hashes(self, hashes: np.ndarray) -> list[tuple[int, int]]:
        """(place in `hashes`, first row) of the documents whose content has such a hash, (n,) uint64."""
        return _look_up(self.hashes, hashes)

    # -- what they hold ------------------------------------------------------------------------------------------------

    def known(self, rows: Sequence[int]) -> dict[int, tuple[str, Known]]:
        """First row -> id and what the writer needs, for documents of this segment."""
        with self._reading():
            return _known(self._connection, rows)

    def fetch(self, rows: Sequence[int]) -> dict[int, Document]:
        """Row -> the passage as a document, for rows of this segment; others are left out."""
        columns = "SELECT row, id, title, source, metadata, content FROM documents WHERE row IN"
        documents: dict[int, Document] = {}
        for row, id, title, source, metadata, content in self._select(columns, rows):
            if content is not None:
                documents[row] = Document(id, content, title, source, json.loads(metadata) if metadata else {})
        if len(documents) < len(rows):
            documents.update(self._fetch_passages([row for row in rows if row not in documents], columns))
        return documents

    def _fetch_passages(self, rows: Sequence[int], columns: str) -> Iterator[tuple[int, Document]]:
        """Of the rows, those that are passages of documents that were cut."""
        places = self.places(np.array(rows, np.int64))
        firsts = {row: int(self.rows[0][place]) for row, place in zip(rows, places.tolist()) if place >= 0}
        found = {values[0]: values[1:] for values in self._select(columns, list(set(firsts.values())))}
        for row, (start, end, text) in self._cut_out(firsts).items():
            id, title, source, metadata, _ = found[firsts[row]]
            yield row, Document(id, text, title, source, json.loads(metadata) if metadata else {}, (start, end))

    def _cut_out(self, firsts: Mapping[int, int]) -> dict[int, tuple[int, int, str]]:
        """Row -> start, end and text of passages, which may reach into the texts stored with the following ones; given
        are the first rows of their documents."""
        query = "SELECT row, start, end, text FROM passages WHERE row IN"
        pieces = {v[0]: v[1:] for v in self._select(query, list({*firsts, *(row + 1 for row in firsts)}))}
        found = {}
        for row, first in firsts.items():
            start, end, text = pieces[row]
            skip = start if row == first else 0
            following = row
            while len(text) < skip + end - start:
                following += 1
                if following not in pieces:
                    pieces.update((v[0], v[1:]) for v in self._select(query, [following]))
                text += pieces[following][2]
            found[row] = start, end, text[skip : skip + end - start]
        return found

    def whole(self, row: int) -> Document:
        """The whole document with this first row."""
        columns = "SELECT n, id, title, source, metadata, content FROM documents WHERE row IN"
        [(n, id, title, source, metadata, content)] = self._select(columns, [row])
        if content is None:
            with self._reading():
                texts = self._connection.execute(
                    "SELECT text FROM passages WHERE row >= ? AND row < ? ORDER BY row", (row, row + n)
                ).fetchall()
            content = "".join([text for (text,) in texts])
        return Document(id, content, title, source, json.loads(metadata) if metadata else {})

    def matching(self, conditions: Mapping[str, Condition]) -> np.ndarray:
        """The first rows, sorted, of the documents that pass the filter."""
        rows: np.ndarray | None = None
        for key, condition in conditions.items():
            if key == "id" and condition.keys() <= {"eq", "in"}:
                one = self._matching_ids(condition)
            else:
                parts = []
                for query, values in sql(key, condition):
                    with self._reading():
                        parts += self._connection.execute(query, values).fetchall()
                one = np.unique(np.fromiter((row for (row,) in parts), np.int64, len(parts)))
            rows = one if rows is None else np.intersect1d(rows, one, assume_unique=True)
            if not len(rows):
                break
        return np.asarray(self.rows[0]) if rows is None else rows

    def _matching_ids(self, condition: Condition) -> np.ndarray:
        ids = {id for id in (*condition.get("in", ()), condition.get("eq")) if isinstance(id, str) and id}
        hashes = numbers([hash_id(id) for id in ids])
        found = self.known([row for _, row in self.with_ids(hashes)])
        rows = [row for row, (id, _) in found.items() if matches(Document(id, ""), {"id": condition})]
        return np.array(sorted(rows), np.int64)

    def _select(self, query: str, rows: Sequence[int]) -> list[tuple[Any, ...]]:
        try:
            with self._lock:
                return _select(self._connection, query, rows)
        except sqlite3.Error as error:
            raise self._damage(error) from error

    def _damage(self, error: sqlite3.Error) -> NanochatError:
        return NanochatError(f"cannot read {self.directory} ({error}); `verify` tells what is damaged")


def _known(connection: sqlite3.Connection, rows: Sequence[int]) -> dict[int, tuple[str, Known]]:
    columns = "SELECT row, n, id, hash, source FROM documents WHERE row IN"
    return {row: (id, Known(row, n, h, source)) for row, n, id, h, source in _select(connection, columns, rows)}


def _select(connection: sqlite3.Connection, query: str, rows: Sequence[int]) -> list[tuple[Any, ...]]:
    if len(rows) <= _AT_ONCE:
        return connection.execute(f"{query} ({','.join('?' * len(rows))})", rows).fetchall()
    found: list[tuple[Any, ...]] = []
    for start in range(0, len(rows), _AT_ONCE):
        part = rows[start : start + _AT_ONCE]
        found += _select(connection, query, part)
    return found


def _look_up(table: np.ndarray, hashes: np.ndarray) -> list[tuple[int, int]]:
    keys, rows = table[0].view(np.uint64), table[1]
    left = np.searchsorted(keys, hashes, side="left")
    found = []
    for i in np.flatnonzero(keys[np.minimum(left, len(keys) - 1)] == hashes).tolist():
        at = int(left[i])
        while at < len(keys) and keys[at] == hashes[i]:
            found.append((i, int(rows[at])))
            at += 1
    return found


def _load(path: Path) -> np.ndarray:
    """Six lines of equal length, mapped. Raises ValueError for anything else."""
    values = load_array(path, mapped=True)
    if values.ndim != 2 or values.shape[0] != 6 or not values.shape[1] or values.dtype != np.int64:
        raise ValueError(f"{path.name} has the shape {values.shape}")
    return values.view(np.ndarray)
