"""DenseIndex: the nearest of many unit vectors, in immutable segments (segment.py) that are merged as they become many.

A directory holds `dense.json` (which segments, and the size of each of their files), `dropped.npy` (rows that are no
longer searched) and the segments' files. A new directory shares the files of the one it continues through hard links:
adding a thousand vectors to a million writes one small segment. Segments of like size at the end are merged, each row
about log4(n) times in all (O'Neil et al. 1996), from the stored vectors: nothing is embedded again. A segment of which
a quarter is dropped is written anew without it.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from nanochat.errors import NanochatError, UsageError
from nanochat.retrieval.document import Batch, Found, Settings
from nanochat.retrieval.index_files import fsync, link, make_directory, write_json
from nanochat.retrieval.segment import DenseSettings, Segment, SegmentInfo, build_index
from nanochat.retrieval.vector_file import ArrayFile, ArrayWriter, best

FORMAT = 1
MANIFEST, DROPPED = "dense.json", "dropped.npy"
SMALLEST = 1024  # rows: segments below count as alike in size
REWRITE_SHARE = 0.25  # of dropped rows from which a segment is written anew
COPY = 16384  # rows copied at a time


@dataclass(frozen=True)
class Contents:
    """`dense.json`. `serial` numbers the segments: no name comes twice in a line of directories."""

    dimension: int = 0
    serial: int = 0
    dropped: int = 0
    segments: tuple[SegmentInfo, ...] = ()


class DenseIndex:
    """An `Index` (document.py) of vectors. Settings: `dense`, see `DenseSettings`, and `dimension`."""

    kind: ClassVar[str] = "dense"

    def __init__(self, directory: Path, settings: Settings) -> None:
        self.directory, self.settings = directory, DenseSettings.of(settings)
        contents = _read(directory)
        self.dimension = contents.dimension
        _check_dimension(self.settings.dimension, self.dimension, directory)
        self._segments = [Segment(directory, one, self.dimension, self.settings) for one in contents.segments]
        dropped = np.array(ArrayFile(directory / DROPPED, "<i8", contents.dropped).array)
        self._alive = [_alive(segment, dropped) for segment in self._segments]
        self.n_rows = sum(one.n if keep is None else int(keep.sum()) for one, keep in self._with_alive())

    @classmethod
    def open(cls, directory: Path, settings: Settings) -> DenseIndex:
        """See `Index.open`. Raises NanochatError when a file is missing or has another size than it was written with,
        UsageError when the settings ask for another dimension."""
        return cls(Path(directory), settings)

    def search(self, queries: Sequence[Any] | np.ndarray, k: int, allowed: np.ndarray | None = None) -> list[Found]:
        """See `Index.search`; `queries` is (n, d) float32. A query of zeros finds nothing."""
        if k < 1:
            raise UsageError(f"k = {k}: ask for at least 1 hit")
        matrix = np.asarray(queries, np.float32)
        if matrix.size == 0:
            return [Found.none() for _ in range(len(matrix))]
        if matrix.ndim != 2 or (self._segments and matrix.shape[1] != self.dimension):
            raise UsageError(
                f"queries of shape {matrix.shape} for vectors of dimension {self.dimension}: was the knowledge base "
                f"built with another embedder?"
            )
        if not np.isfinite(matrix).all():
            raise UsageError("a query vector has components that are not finite")
        asked = np.flatnonzero(matrix.any(axis=1))
        found = [Found.none() for _ in matrix]
        parts = [
            segment.search(matrix[asked], k, keep)
            for segment, alive in self._with_alive()
            if (keep := _keep(segment, alive, allowed)) is None or len(keep)
        ]
        for i, answers in zip(asked, zip(*parts)):
            rows, scores = best(
                np.concatenate([rows for rows, _ in answers]), np.concatenate([scores for _, scores in answers]), k
            )
            found[i] = Found(rows, scores)
        return found

    def _with_alive(self) -> Iterator[tuple[Segment, np.ndarray | None]]:
        return zip(self._segments, self._alive)

    def close(self) -> None:
        for segment in self._segments:
            segment.close()
        self._segments, self._alive = [], []

    @classmethod
    def write(
        cls,
        directory: Path,
        settings: Settings,
        batches: Iterable[Batch],
        base: Path | None = None,
        drop: np.ndarray | None = None,
    ) -> None:
        """See `Index.write`. Raises UsageError for vectors of another dimension, NanochatError when the disk fails."""
        try:
            make_directory(directory)
            _Writer(Path(directory), DenseSettings.of(settings), base, drop).run(batches)
        except OSError as error:
            raise NanochatError(f"cannot write the dense index {directory}: {error.strerror or error}") from error


class _Writer:
    """One call of `DenseIndex.write`."""

    def __init__(self, directory: Path, settings: DenseSettings, base: Path | None, drop: np.ndarray | None) -> None:
        self.directory, self.settings = directory, settings
        contents = Contents() if base is None else _read(base)
        self.dimension, self.serial = contents.dimension, contents.serial
        if contents.segments:
            _check_dimension(settings.dimension, self.dimension, base)
        else:
            self.dimension = settings.dimension
        self.sources: list[Segment] = []
        self.dropped = np.empty(0, np.int64) if drop is None else np.asarray(drop, np.int64)
        if base is not None:
            self.sources = [Segment(base, one, self.dimension, settings) for one in contents.segments]
            earlier = ArrayFile(base / DROPPED, "<i8", contents.dropped).array
            self.dropped = np.union1d(earlier, self.dropped)

    def run(self, batches: Iterable[Batch]) -> None:
        """Write the new rows, merge what is to be merged, share the rest, then say what there is."""
        fresh = self._write_raw(batches, after=self.sources[-1].info.last if self.sources else -1)
        sources = [*self.sources, *([] if fresh is None else [self._open(fresh)])]
        finished: list[SegmentInfo] = []
        dropped: list[np.ndarray] = []
        for group in self._groups(sources):
            gone = [segment.rows[segment.positions(self.dropped)] for segment in group]
            alone = group[0] if len(group) == 1 else None
            if alone is not None and len(gone[0]) < REWRITE_SHARE * alone.n:
                finished.append(self._keep(alone))
                dropped += gone
                continue
            raw = self._write_raw(_without(group, self.dropped))
            for segment in group:
                if segment.directory == self.directory:
                    self._delete(segment)
            if raw is not None:
                finished.append(self._indexed(self._open(raw)))
        with ArrayWriter(self.directory / DROPPED, "<i8") as file:
            for rows in dropped:
                file.append(rows)
        _store(self.directory, Contents(self.dimension, self.serial, file.n, tuple(finished)))

    def _write_raw(self, batches: Iterable[Batch], after: int = -1) -> SegmentInfo | None:
        """A segment without an index, of rows that ascend from above `after`; None when there are no rows."""
        self.serial += 1
        name = f"{self.serial:06d}"
        first, last = -1, after
        paths = [self.directory / f"{name}.rows.npy", self.directory / f"{name}.vectors.npy"]
        vectors_file: ArrayWriter | None = None
        with contextlib.ExitStack() as files:
            rows_file = files.enter_context(ArrayWriter(paths[0], "<i8", sync=False))
            for batch in batches:
                rows, vectors = self._checked(batch)
                if not len(rows):
                    continue
                if rows[0] <= last or (np.diff(rows) <= 0).any():
                    raise UsageError(f"rows given to a dense index must ascend: {rows[0]} comes after {last}")
                if vectors_file is None:
                    vectors_file = files.enter_context(ArrayWriter(paths[1], "<f2", self.dimension, sync=False))
                    first = int(rows[0])
                rows_file.append(rows)
                vectors_file.append(vectors)
                last = int(rows[-1])
        if vectors_file is None:
            paths[0].unlink()
            return None
        return SegmentInfo(name, "flat", rows_file.n, first, last, {path.name: path.stat().st_size for path in paths})

    def _checked(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """Rows and float16 vectors of a batch."""
        if batch.vectors is None:
            raise UsageError("a dense index needs the vectors of its rows: give the knowledge base an embedder")
        vectors = np.asarray(batch.vectors)
        if len(batch.rows) == 0:
            return batch.rows, vectors
        if vectors.ndim != 2 or len(vectors) != len(batch.rows) or self.dimension not in (0, vectors.shape[1]):
            wanted = self.dimension or "d"
            raise UsageError(
                f"vectors of shape {vectors.shape} for a dense index that expects ({len(batch.rows)}, {wanted}): the "
                f"embedder is not the one that the knowledge base was built with"
            )
        self.dimension = vectors.shape[1]
        with np.errstate(over="ignore"):
            half = vectors.astype("<f2", copy=False)
        if not np.isfinite(half).all():
            row = batch.rows[np.flatnonzero(~np.isfinite(half).all(axis=1))[0]]
            raise UsageError(f"the vector of row {row} has components that are not finite numbers below 65504")
        return batch.rows, half

    def _open(self, info: SegmentInfo) -> Segment:
        return Segment(self.directory, info, self.dimension, self.settings)

    def _groups(self, segments: list[Segment]) -> list[list[Segment]]:
        """Neighbours that are to be one segment: at the end of the list, `merge` of the same size class or more."""
        groups = [[segment] for segment in segments]
        sizes = [segment.n for segment in segments]
        top = max(map(self._size_class, sizes), default=-1)
        for size_class in range(top + 1):
            start = len(groups)
            while start and self._size_class(sizes[start - 1]) <= size_class:
                start -= 1
            if sum(self._size_class(size) == size_class for size in sizes[start:]) >= self.settings.merge:
                groups[start:] = [[segment for group in groups[start:] for segment in group]]
                sizes[start:] = [sum(sizes[start:])]
        return groups

    def _size_class(self, n: int) -> int:
        return max(0, int(math.log(n / SMALLEST, self.settings.merge))) if n > SMALLEST else 0

    def _keep(self, segment: Segment) -> SegmentInfo:
        """A segment as it is: the one written just now gets its index, one of the base is shared."""
        if segment.directory == self.directory:
            return self._indexed(segment)
        for name in segment.info.files:
            link(segment.directory / name, self.directory / name)
        return segment.info

    def _indexed(self, segment: Segment) -> SegmentInfo:
        """A segment that was written just now, with its index."""
        info = segment.info
        kind = self.settings.kind(info.n)
        with ThreadPoolExecutor(1) as background:  # the disk takes the vectors while FAISS computes
            synced = [background.submit(fsync, self.directory / name) for name in info.files]
            if kind != "flat":
                path = self.directory / f"{info.name}.faiss"
                build_index(kind, segment.vectors, path, self.settings)
                files = {**info.files, path.name: path.stat().st_size}
                info = SegmentInfo(info.name, kind, info.n, info.first, info.last, files)
            for one in synced:
                one.result()
        return info

    def _delete(self, segment: Segment) -> None:
        for name in segment.info.files:
            (self.directory / name).unlink()


def _without(segments: Iterable[Segment], dropped: np.ndarray) -> Iterator[Batch]:
    """The rows and vectors of segments, less the dropped ones."""
    for segment in segments:
        alive = _alive(segment, dropped)
        start = 0
        for vectors in segment.vectors.blocks(COPY):
            rows = segment.rows[start : start + len(vectors)]
            here = slice(None) if alive is None else alive[start : start + len(vectors)]
            yield Batch(rows[here], [], vectors[here])
            start += len(vectors)


def _alive(segment: Segment, dropped: np.ndarray) -> np.ndarray | None:
    """(n,) bool: which positions are searched; None: all."""
    gone = segment.positions(dropped)
    if not len(gone):
        return None
    alive = np.ones(segment.n, bool)
    alive[gone] = False
    return alive


def _keep(segment: Segment, alive: np.ndarray | None, allowed: np.ndarray | None) -> np.ndarray | None:
    """The positions to search; None: all."""
    if allowed is None:
        return None if alive is None else np.flatnonzero(alive)
    positions = segment.positions(allowed)
    if alive is not None:
        positions = positions[alive[positions]]
    return None if len(positions) == segment.n else positions


def _read(directory: Path) -> Contents:
    path = directory / MANIFEST
    try:
        values = json.loads(path.read_bytes())
        if values["format"] > FORMAT:
            raise UsageError(f"{path} has format {values['format']}, newer than {FORMAT}: install a newer nanochat")
        segments = tuple(SegmentInfo(**one) for one in values["segments"])
        return Contents(values["dimension"], values["serial"], values["dropped"], segments)
    except OSError as error:
        raise NanochatError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise NanochatError(f"{path} is damaged ({error}); `verify` checks all files") from error


def _store(directory: Path, contents: Contents) -> None:
    write_json(directory / MANIFEST, {"format": FORMAT, **asdict(contents)})
    with contextlib.suppress(OSError):  # a file system that cannot
        fsync(directory)


def _check_dimension(asked: int, held: int, directory: Path | None) -> None:
    if asked and held and asked != held:
        raise UsageError(f"{directory} holds vectors of dimension {held}, not {asked}: open it with its own embedder")
