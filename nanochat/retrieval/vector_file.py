"""Arrays on disk for dense indexes: .npy files that are written as a stream and read by memory map.

Vectors are kept as float16: half the bytes of float32, and 11 bits of each component, so that inner products of unit
vectors are off by less than 0.001. Scores are computed from these vectors in float64: two rows with the same vector
have exactly the same score, wherever they lie.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from nanochat.errors import NanochatError

HEADER = 128  # bytes: fixed, so that the number of rows can be filled in at the end
BLOCK = 1024  # rows decoded at a time: 3 MB of float64 at 384 dimensions, which the cache holds
RESIDENT = 16 << 20  # bytes of touched pages after which they are given back


class ArrayWriter:
    """An .npy file of `dtype`, (n,) or (n, width), whose n is known only when it is closed. Closing waits until the
    disk has it all, unless the caller sees to that (`sync=False`)."""

    def __init__(self, path: Path, dtype: str, width: int | None = None, sync: bool = True) -> None:
        self.path, self.dtype, self.width, self.n = path, np.dtype(dtype), width, 0
        self._sync = sync
        self._file = open(path, "xb")  # noqa: SIM115 - closed by close
        self._file.write(b"\0" * HEADER)

    def append(self, block: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(block, dtype=self.dtype).data)
        self.n += len(block)

    def close(self) -> None:
        """Fill in the header."""
        self._file.seek(0)
        self._file.write(_header(self.dtype, self.n, self.width))
        self._file.flush()
        if self._sync:
            os.fsync(self._file.fileno())
        self._file.close()

    def __enter__(self) -> ArrayWriter:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()


class ArrayFile:
    """An .npy file made by `ArrayWriter`, memory-mapped. Raises NanochatError when its size or header is another."""

    def __init__(self, path: Path, dtype: str, n: int, width: int | None = None) -> None:
        self.path, self.n, self.width = path, n, width
        kind = np.dtype(dtype)
        expected = HEADER + n * (width or 1) * kind.itemsize
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size != expected or file.read(HEADER) != _header(kind, n, width):
                    raise NanochatError(f"{path} is damaged: {size:,} bytes or its header are not those of {n:,} rows")
                self._map = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
                self._file = os.dup(file.fileno())
        except OSError as error:
            raise NanochatError(f"cannot read {path}: {error.strerror}") from error
        array = np.frombuffer(self._map, kind, offset=HEADER)
        self.array = array if width is None else array.reshape(n, width)
        self._touched = 0

    def gather(self, positions: np.ndarray) -> np.ndarray:
        """The rows at `positions`. Read, not mapped: a page fault costs several reads and maps up to 2 MB."""
        size = self.array[:1].nbytes
        offsets = (positions * size + HEADER).tolist()
        data = b"".join([os.pread(self._file, size, offset) for offset in offsets])
        if len(data) != size * len(offsets):
            raise NanochatError(f"{self.path} has become shorter; `verify` checks all files")
        return np.frombuffer(data, self.array.dtype).reshape(-1, *self.array.shape[1:])

    def slice(self, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop`, as a view of the file."""
        self._release((stop - start) * self.array.itemsize * (self.width or 1))
        return self.array[start:stop]

    def blocks(self, size: int) -> Iterator[np.ndarray]:
        """All rows in order, as views of the file."""
        return (self.slice(start, min(start + size, self.n)) for start in range(0, self.n, size))

    def release(self) -> None:
        """Unmap what was read (it stays in the page cache): queries must not make the whole file resident. Another
        thread that reads meanwhile only maps its pages again."""
        self._touched = 0
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def _release(self, touched: int) -> None:
        self._touched += touched
        if self._touched > RESIDENT:
            self.release()

    def close(self) -> None:
        """The map itself ends with the last array that looks into it."""
        self.array = self.array[:0].copy()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __del__(self) -> None:
        if getattr(self, "_file", -1) >= 0:
            self.close()


def exact_scores(vectors: np.ndarray, query: np.ndarray) -> np.ndarray:
    """(n,) float32 inner products of float16 vectors with a float32 query, summed in float64."""
    return (vectors.astype(np.float64) @ query.astype(np.float64)).astype(np.float32)


def best(positions: np.ndarray, scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The `k` best, best first; of equal scores the lower position first."""
    order = np.lexsort((positions, -scores))[:k]
    return positions[order], scores[order]


def _header(dtype: np.dtype, n: int, width: int | None) -> bytes:
    """The header of an .npy file, version 1.0 (numpy.lib.format), padded to `HEADER` bytes."""
    shape = f"({n},)" if width is None else f"({n}, {width})"
    text = f"{{'descr': '{dtype.str}', 'fortran_order': False, 'shape': {shape}, }}"
    room = HEADER - 10
    return b"\x93NUMPY\x01\x00" + room.to_bytes(2, "little") + text.ljust(room - 1).encode() + b"\n"
