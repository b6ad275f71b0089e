"""Segments of a dense index: some rows, their float16 vectors, and, from some thousand rows on, a FAISS index.

FAISS nominates; float64 decides. Every kind but the flat one is approximate and small: it names a few hundred
positions, and their order and scores come from the stored vectors (see vector_file.py).

    flat     every vector is compared. Exact. A copy of the vectors is kept in memory.
    scan     every vector is compared by 1 bit a dimension (RaBitQ, Gao and Long 2024, in FAISS's FastScan layout: 32
             vectors at a time in registers): 1 ms for 100,000 rows, built in a second, an eighth of the memory of SQ8
    ivf      the same codes in inverted lists around k-means centroids, of which a query visits the nearest `probe`
    ivf-sq8  inverted lists of 8-bit codes, memory-mapped: 6 times the bytes and slower; for comparison
    hnsw     a graph (Malkov and Yashunin 2016): slow to build, and no better than `scan` where it would be used

RaBitQ wants a random rotation first, so that no dimension carries more than another.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from nanochat.errors import NanochatError, UsageError
from nanochat.retrieval.document import Settings
from nanochat.retrieval.vector_file import BLOCK, ArrayFile, best, exact_scores

FACTORIES = {  # faiss.index_factory strings; {r} is the dimension rounded up to the blocks of FastScan
    "flat": "",
    "scan": "RR{r},IVF1,RaBitQfs",
    "ivf": "RR{r},IVF{lists},RaBitQfs",
    "ivf-sq8": "IVF{lists},SQ8",
    "hnsw": "HNSW16_SQfp16",
}
SPARE = 16  # fetched beyond k from an exact scan in float32, to settle ties in float64
ROUNDING = 2e-5  # by which a float32 sum of 384 products of unit vectors may be off, generously
EXACT_BELOW = 5000  # allowed rows that are compared one by one
FEWEST_BITS = 128  # of a code: vectors of few dimensions are rotated into more
ADD = 32768  # rows handed to FAISS at a time


_loaded: WeakValueDictionary[tuple[int, ...], Any] = WeakValueDictionary()  # FAISS indexes in use, by their file


@dataclass(frozen=True)
class DenseSettings:
    """How a dense index is built and searched. `probe` and `fetch` trade recall for time when it is opened; 0 chooses
    by size."""

    dimension: int = 0  # 0: that of the first vectors
    layout: str = "auto"  # a key of FACTORIES for every segment with at least `scan_from` rows
    scan_from: int = 10_000  # rows from which a segment has an index
    ivf_from: int = 150_000
    lists: int = 0  # of an inverted file; 0: twice the root of the rows
    probe: int = 0  # lists visited; 0: a fortieth (recall@10 of a million vectors 0.993, of a twentieth 0.996)
    fetch: int = 0  # rows nominated and then compared exactly; 0: 200 (more gain nothing, 150 lose 0.002)
    merge: int = 4  # segments of like size become one

    @classmethod
    def of(cls, settings: Settings) -> DenseSettings:
        """From the settings of a knowledge base's indexes: its `dimension` and what it says under `dense`. Raises
        UsageError for a name that is not a setting or a value that is none of its values."""
        own = dict(settings.get("dense") or {})
        if "dimension" in settings:
            own["dimension"] = settings["dimension"]
        names = [one.name for one in fields(cls)]
        for name, value in own.items():
            if name not in names:
                raise UsageError(f"dense index: no setting {name!r}; there are {', '.join(names)}")
            if name == "layout":
                if value not in ("auto", *FACTORIES):
                    known = ", ".join(FACTORIES)
                    raise UsageError(f"dense index: no layout {value!r}; there are auto, {known}")
            elif not isinstance(value, int) or isinstance(value, bool) or value < (2 if name == "merge" else 0):
                raise UsageError(f"dense index: {name} = {value!r} should be a number, 0 or more (merge: 2 or more)")
        return cls(**own)

    def kind(self, n: int) -> str:
        """The layout of a segment of `n` rows."""
        if n < max(self.scan_from, 1):
            return "flat"
        if self.layout != "auto":
            return self.layout
        return "scan" if n < self.ivf_from else "ivf"


@dataclass(frozen=True)
class SegmentInfo:
    """A segment as the manifest names it: `n` rows from `first` to `last`, and the size of each of its files."""

    name: str
    kind: str
    n: int
    first: int
    last: int
    files: dict[str, int] = field(default_factory=dict)  # in bytes


class Segment:
    """A segment on disk, read-only. The FAISS index is loaded when it is first needed."""

    def __init__(self, directory: Path, info: SegmentInfo, dimension: int, settings: DenseSettings) -> None:
        self.directory, self.info, self.settings = directory, info, settings
        self.n = info.n
        self._key: tuple[int, ...] = ()
        for name, size in info.files.items():
            key = _checked(directory / name, size)
            if name.endswith(".faiss"):
                self._key = key
        self._rows = ArrayFile(directory / f"{info.name}.rows.npy", "<i8", info.n)
        self.rows: np.ndarray = self._rows.array
        self.vectors = ArrayFile(directory / f"{info.name}.vectors.npy", "<f2", info.n, dimension)
        self._lock = threading.Lock()
        self._index: Any = _loaded.get(self._key)  # what an earlier directory shares with this one is loaded already

    def positions(self, rows: np.ndarray) -> np.ndarray:
        """Where those of `rows` (sorted) lie that this segment holds."""
        part = rows[np.searchsorted(rows, self.info.first) : np.searchsorted(rows, self.info.last, "right")]
        if self.info.last - self.info.first + 1 == self.n:
            return part - self.info.first
        found = np.searchsorted(self.rows, part)
        return found[self.rows[found] == part]

    def search(self, queries: np.ndarray, k: int, keep: np.ndarray | None) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each query the rows and scores of the best `k` among the positions in `keep` (None: all)."""
        n = self.n if keep is None else len(keep)
        fetch = max(self.settings.fetch or 200, 2 * k)
        flat = self.info.kind == "flat"
        if n == 0 or (keep is not None and n <= EXACT_BELOW) or (n <= 4 * fetch and not flat):
            found = self.scan(queries, k, keep)
        elif flat:
            found = self._search_flat(queries, k, keep, n)
        else:
            found = self._search_approximate(queries, k, keep, min(fetch, n))
        return [(self.rows[positions], scores) for positions, scores in found]

    def scan(self, queries: np.ndarray, k: int, keep: np.ndarray | None) -> list[tuple[np.ndarray, np.ndarray]]:
        """The exact answer, from every vector in float64: (positions, scores) for each query."""
        found = [(np.empty(0, np.int64), np.empty(0, np.float32)) for _ in queries]
        wide = queries.astype(np.float64).T
        n = self.n if keep is None else len(keep)
        for start in range(0, n, BLOCK):
            stop = min(start + BLOCK, n)
            here = np.arange(start, stop) if keep is None else keep[start:stop]
            block = self.vectors.gather(here) if keep is not None else self.vectors.slice(start, stop)
            scores = (block.astype(np.float64) @ wide).astype(np.float32)
            for i, (positions, known) in enumerate(found):
                new = scores[:, i]
                if len(known) >= k:
                    better = new > known[-1]  # an equal one has a higher position: it loses
                    if not better.any():
                        continue
                    found[i] = best(np.append(positions, here[better]), np.append(known, new[better]), k)
                else:
                    found[i] = best(np.append(positions, here), np.append(known, new), k)
        return found

    def _search_flat(
        self, queries: np.ndarray, k: int, keep: np.ndarray | None, n: int
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Exact: float32 finds the candidates, and those that rounding could have kept out are looked for too."""
        faiss = import_faiss()
        selector, bits = (None, None) if keep is None else _selector(keep, self.n)
        parameters = faiss.SearchParameters(sel=selector)
        found = []
        for query in queries:
            fetch = min(k + SPARE, n)
            while True:
                scores, positions = self._faiss_search(query[None], fetch, parameters)
                reach = float(np.abs(scores[0]).max(initial=1.0)) * ROUNDING
                if fetch == n or scores[0, min(k, n) - 1] - scores[0, -1] > reach:
                    break
                fetch = min(4 * fetch, n)
            found.append(self._settle(query, positions[0], k))
        del bits  # FAISS only points at them
        return found

    def _search_approximate(
        self, queries: np.ndarray, k: int, keep: np.ndarray | None, fetch: int
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        share = 1.0 if keep is None else len(keep) / self.n
        selector, bits = (None, None) if keep is None else _selector(keep, self.n)
        parameters = self._parameters(selector, share, fetch)
        _, nominated = self._faiss_search(queries, fetch, parameters)
        del bits  # FAISS only points at them
        n = self.n if keep is None else len(keep)
        found = []
        for query, positions in zip(queries, nominated):
            settled = self._settle(query, positions[positions >= 0], k)
            found.append(settled if len(settled[0]) >= min(k, n) else self.scan(query[None], k, keep)[0])
        return found

    def _settle(self, query: np.ndarray, positions: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        positions = np.sort(positions)  # neighbours on disk are read together
        return best(positions, exact_scores(self.vectors.gather(positions), query), k)

    def _faiss_search(self, queries: np.ndarray, k: int, parameters: Any) -> tuple[np.ndarray, np.ndarray]:
        faiss, index = import_faiss(), self.index()
        # Starting threads costs more than they save on few queries. The setting is this thread's own.
        faiss.omp_set_num_threads(1 if len(queries) < 4 else _threads())
        scores, positions = index.search(np.ascontiguousarray(queries, np.float32), k, params=parameters)
        return scores, positions

    def _parameters(self, selector: Any, share: float, fetch: int) -> Any:
        """FAISS's search parameters. When only a share of the rows counts, as many more of them are visited."""
        faiss = import_faiss()
        kind = self.info.kind
        if kind == "hnsw":
            return faiss.SearchParametersHNSW(efSearch=int(fetch / share), sel=selector)
        lists = faiss.extract_index_ivf(self.index()).nlist
        probe = self.settings.probe or max(lists // 40, 1)
        lists_visited = min(lists, int(np.ceil(probe / share)))
        if kind == "ivf-sq8":
            return faiss.SearchParametersIVF(nprobe=lists_visited, sel=selector)
        inner = faiss.IVFRaBitQSearchParameters(nprobe=lists_visited, sel=selector)
        return faiss.SearchParametersPreTransform(index_params=inner)

    def index(self) -> Any:
        """The FAISS index. Raises NanochatError when its file is damaged in a way that FAISS sees."""
        with self._lock:
            if self._index is None:
                self._index = self._flat_index() if self.info.kind == "flat" else self._read_index()
                if self._key:
                    _loaded[self._key] = self._index
            return self._index

    def _flat_index(self) -> Any:
        faiss = import_faiss()
        index = faiss.IndexScalarQuantizer(
            self.vectors.width, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
        )
        data = self.vectors.array
        index.codes.resize(data.nbytes)
        faiss.memcpy(index.codes.data(), faiss.swig_ptr(data.reshape(-1).view(np.uint8)), data.nbytes)
        index.ntotal = self.n
        self.vectors.release()
        return index

    def _read_index(self) -> Any:
        faiss = import_faiss()
        path = self.directory / f"{self.info.name}.faiss"
        mapped = faiss.IO_FLAG_MMAP if self.info.kind == "ivf-sq8" else faiss.IO_FLAG_MMAP_IFC
        try:
            index = faiss.read_index(str(path), mapped)
        except RuntimeError as error:
            raise NanochatError(f"{path} is damaged: {_reason(error)}; `verify` checks all files") from error
        if index.ntotal != self.n or index.d != self.vectors.width:
            raise NanochatError(f"{path} is damaged: it holds {index.ntotal} rows of {index.d}, not {self.n}")
        return index

    def close(self) -> None:
        """Let go of the maps."""
        self._index = None
        self.rows = np.empty(0, np.int64)
        self._rows.close()
        self.vectors.close()


def n_lists(kind: str, n: int, settings: DenseSettings) -> int:
    """How many inverted lists a segment of `n` rows has."""
    if kind not in ("ivf", "ivf-sq8"):
        return 1
    return min(settings.lists or max(int(2 * np.sqrt(n)) // 64 * 64, 1), n)


def build_index(kind: str, vectors: ArrayFile, path: Path, settings: DenseSettings) -> None:
    """Write the FAISS index over `vectors`. Memory: the codes, and about 150 MB. Raises NanochatError."""
    faiss = import_faiss()
    width = vectors.width or 0
    lists = n_lists(kind, vectors.n, settings)
    recipe = FACTORIES[kind].format(r=max(-(-width // 32) * 32, FEWEST_BITS), lists=lists)
    faiss.omp_set_num_threads(_threads())
    try:
        index = faiss.index_factory(width, recipe, faiss.METRIC_INNER_PRODUCT)
        if kind == "hnsw":
            index.hnsw.efConstruction = 80
        elif kind in ("ivf", "ivf-sq8", "scan"):
            clustering = faiss.extract_index_ivf(index).cp
            clustering.niter, clustering.min_points_per_centroid = 6, 1
        n = min(vectors.n, max(40 * lists, 20_000))
        sample = np.sort(np.random.default_rng(0).choice(vectors.n, n, replace=False))
        index.train(vectors.gather(sample).astype(np.float32))
        for start in range(0, vectors.n, ADD):
            index.add(vectors.slice(start, min(start + ADD, vectors.n)).astype(np.float32))
        faiss.write_index(index, str(path))
    except RuntimeError as error:
        raise NanochatError(f"cannot write {path}: {_reason(error)}") from error
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


@cache
def import_faiss() -> ModuleType:
    """FAISS, or a UsageError that says how to get it."""
    try:
        import faiss
    except ImportError as error:
        raise UsageError("dense indexes need faiss-cpu: pip install 'nanochat[rag]'") from error
    if not hasattr(faiss, "IndexIVFRaBitQFastScan"):
        raise UsageError(f"dense indexes need faiss-cpu 1.15, this is {faiss.__version__}: pip install 'nanochat[rag]'")
    return faiss


@cache
def _threads() -> int:
    return int(import_faiss().omp_get_max_threads())


def _selector(keep: np.ndarray, n: int) -> tuple[Any, np.ndarray]:
    """A selector for positions, and the bits that it points at: they must live as long."""
    faiss = import_faiss()
    mask = np.zeros(n, bool)
    mask[keep] = True
    bits = np.packbits(mask, bitorder="little")
    return faiss.IDSelectorBitmap(len(bits), faiss.swig_ptr(bits)), bits


def _checked(path: Path, size: int) -> tuple[int, ...]:
    """What identifies the file, whatever its name. Raises NanochatError when it is missing or has another size."""
    try:
        found = path.stat()
    except OSError as error:
        raise NanochatError(f"cannot read {path}: {error.strerror}") from error
    if found.st_size != size:
        raise NanochatError(f"{path} is damaged: it has {found.st_size:,} bytes, not {size:,}")
    return found.st_dev, found.st_ino, size, found.st_mtime_ns


def _reason(error: RuntimeError) -> str:
    """FAISS's message without the C++ signature and file name."""
    return str(error).rsplit("Error: ", 1)[-1][:200]
