"""Vectors that were computed but not committed yet, so that an interrupted ingestion embeds nothing twice.

`vectors.staged`: one line that names the embedder, then records of equal length that are only appended: the hash of the
text (16 bytes), the vector (float32), CRC-32 of both. Records after the first damaged or unfinished one do not count.
"""

from __future__ import annotations

import json
import os
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from nanochat.errors import NanochatError, UsageError
from nanochat.retrieval.document import Embedder, content_hash

NAME = "vectors.staged"
EMBED_AT_ONCE = 256  # texts; what a kill can cost
SYNC_SECONDS = 10.0  # of the embedder's time after which its vectors are written through: a power cut costs no more


def _head(embedder: str, dimension: int) -> bytes:
    return json.dumps({"vectors": 1, "embedder": embedder, "dimension": dimension}).encode() + b"\n"


class Staging:
    """Vectors by the hash of their text. Raises OSError when the disk is full."""

    def __init__(self, directory: Path, embedder: Embedder) -> None:
        self.path = directory / NAME
        self.embedder = embedder
        self.n_embedded = 0
        self._dtype = _record(embedder.dimension)
        self._head = _head(embedder.name, embedder.dimension)
        self._places: dict[bytes, int] = {}
        self._used: set[int] = set()
        records = _whole_records(self.path, self._head, self._dtype)
        if records is None:
            self.path.write_bytes(self._head)
        else:
            self._places = {bytes(hash): i for i, hash in enumerate(records["hash"].tolist())}
            del records
            os.truncate(self.path, len(self._head) + len(self._places) * self._dtype.itemsize)
        self._n = len(self._places)
        self._unsafe = 0.0  # seconds of the embedder that a power cut would cost
        self._file = open(self.path, "ab")  # noqa: SIM115 - closed by `close`

    def __len__(self) -> int:
        return self._n

    def place(self, texts: Sequence[str]) -> np.ndarray:
        """Where the vectors of the texts are, (n,) int64; those not known yet are embedded first. Raises UsageError
        for an embedder that gives something else than it promises."""
        hashes = [content_hash(text) for text in texts]
        missing = {hash: text for hash, text in zip(hashes, texts) if hash not in self._places}
        names = list(missing)
        for start in range(0, len(names), EMBED_AT_ONCE):
            part = names[start : start + EMBED_AT_ONCE]
            began = time.monotonic()
            vectors = self.embedder.embed([missing[name] for name in part])
            self._unsafe += time.monotonic() - began
            self.add(part, vectors)
            self.n_embedded += len(part)
            if self._unsafe > SYNC_SECONDS:
                self._sync()
        places = [self._places[hash] for hash in hashes]
        self._used.update(places)
        return np.array(places, np.int64)

    def add(self, hashes: Sequence[bytes], vectors: np.ndarray) -> None:
        """Append vectors, (n, dimension), of texts with these hashes."""
        vectors = check_vectors(vectors, len(hashes), self.embedder)
        fresh: dict[bytes, int] = {}
        for i, hash in enumerate(hashes):
            if hash not in self._places:
                fresh.setdefault(hash, i)
        if not fresh:
            return
        records = np.zeros(len(fresh), self._dtype)
        records["hash"] = np.frombuffer(b"".join(fresh), "V16")
        records["vector"] = vectors[list(fresh.values())]
        records["crc"] = [zlib.crc32(line) for line in _bytes(records)[:, :-4]]
        self._file.write(records.data)
        self._file.flush()
        self._places.update(zip(fresh, range(self._n, self._n + len(fresh))))
        self._n += len(fresh)

    def vectors(self, places: np.ndarray) -> np.ndarray:
        """(n, dimension) float32."""
        if len(places) and places[-1] - places[0] == len(places) - 1 and (np.diff(places) == 1).all():
            start = len(self._head) + int(places[0]) * self._dtype.itemsize
            records = np.fromfile(self.path, self._dtype, len(places), offset=start)  # read: no pages to be mapped
            return np.ascontiguousarray(records["vector"])
        records = np.memmap(self.path, self._dtype, "r", offset=len(self._head), shape=(self._n,))
        return np.array(records["vector"][places])

    def _sync(self) -> None:
        os.fsync(self._file.fileno())
        self._unsafe = 0.0

    def close(self, committed: bool = False) -> None:
        """After a commit that used all that is here, the file is not needed any more."""
        needed = not committed or len(self._used) < self._n
        with self._file:
            if needed:
                self._sync()
        if not needed:
            self.path.unlink(missing_ok=True)


def check_vectors(vectors: np.ndarray, n: int, embedder: Embedder) -> np.ndarray:
    """The vectors as little-endian float32. Raises UsageError unless they are `n` finite ones of its dimension."""
    found = np.asarray(vectors)
    if found.shape != (n, embedder.dimension):
        raise UsageError(
            f"the embedder {embedder.name!r} gave an array of shape {found.shape} for {n} texts; with its dimension of "
            f"{embedder.dimension} it should be {(n, embedder.dimension)}"
        )
    found = np.ascontiguousarray(found, "<f4")
    if not np.isfinite(found).all():
        raise UsageError(f"the embedder {embedder.name!r} gave values that are no finite numbers")
    return found


def problems(directory: Path, embedder: str, dimension: int) -> Iterator[str]:
    """What is wrong with the staged vectors, if there are any, as sentences."""
    path = directory / NAME
    if not path.exists():
        return
    head, dtype = _head(embedder, dimension), _record(dimension)
    whole = _whole_records(path, head, dtype)
    if whole is None:
        yield f"{path} is damaged or of another embedder; delete it: its vectors will be computed again."
    elif len(whole) < (path.stat().st_size - len(head)) // dtype.itemsize:
        yield f"{path} is damaged after {len(whole)} vectors; the rest will be computed again."


def _record(dimension: int) -> np.dtype:
    return np.dtype([("hash", "V16"), ("vector", "<f4", (dimension,)), ("crc", "<u4")])


def _bytes(records: np.ndarray) -> np.ndarray:
    """(n, bytes of a record) uint8: the same memory."""
    return records.view(np.uint8).reshape(len(records), records.dtype.itemsize)


def _whole_records(path: Path, head: bytes, dtype: np.dtype) -> np.ndarray | None:
    """The records up to the first damaged one; None when the file is missing or begins otherwise."""
    try:
        with open(path, "rb") as file:
            if file.read(len(head)) != head:
                return None
            n = (os.fstat(file.fileno()).st_size - len(head)) // dtype.itemsize
    except FileNotFoundError:
        return None
    except OSError as error:
        raise NanochatError(f"cannot read {path}: {error.strerror}") from error
    if not n:
        return np.empty(0, dtype)
    records = np.memmap(path, dtype, "r", offset=len(head), shape=(n,))
    raw = _bytes(records)
    for i in range(n):
        if zlib.crc32(raw[i, :-4].data) != int(records["crc"][i]):
            return records[:i]
    return records
