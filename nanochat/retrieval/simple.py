"""TF-IDF in numpy alone: an inverted index in a few .npy files, memory-mapped.

The weighting is SMART's lnc.ltc (Salton and Buckley 1988): a document's words weigh 1 + ln(count), a query's times
ln(1 + N / documents with the word), both vectors have length 1, and the score is their cosine, 0 to 1. Documents do
without the rarity, so what is written stays true while the collection grows.

A directory holds segments: rows in order, each segment at least four times as large as the next when it was written, so
that adding a few documents rewrites little and a search looks at few places. A segment's files are, by name:

    keys     (words,) uint64, ascending: hashes of the terms. Two of a million words share one with probability 3e-8
    starts   (words + 1,) int64: where the postings of each word begin
    docs     (postings,) int32, ascending for each word: places in `rows`
    weights  (postings,) float32
    rows     (documents,) int64, ascending
"""

from __future__ import annotations

import contextlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np

from nanochat.errors import NanochatError, UsageError
from nanochat.retrieval.analysis import Analyser
from nanochat.retrieval.document import Batch, Found, Settings
from nanochat.retrieval.index_files import link, load_array, make_directory, read_header, write_header
from nanochat.retrieval.vector_file import ArrayWriter

FORMAT = 1
RUN_POSTINGS = 1_000_000  # held in memory before a segment is written: about 60 MB
MERGE_POSTINGS = 1_000_000  # merged at a time
FACTOR = 4  # a segment smaller than so many times its successor is merged with it
_DTYPES = {"keys": "<u8", "starts": "<i8", "docs": "<i4", "weights": "<f4", "rows": "<i8"}


class SimpleIndex:
    """An `Index` (document.py) of texts. Settings: `analyser` (see Analyser.of)."""

    kind: ClassVar[str] = "simple"

    def __init__(self, directory: Path, analyser: Analyser, segments: list[_Segment]) -> None:
        self.directory = directory
        self.analyser = analyser
        self._segments: list[_Segment] | None = segments
        self._firsts = np.cumsum([0, *(len(segment.rows) for segment in segments)])  # place of each segment's first row
        self.n_rows = int(self._firsts[-1])

    @classmethod
    def write(
        cls,
        directory: Path,
        settings: Settings,
        batches: Iterable[Batch],
        base: Path | None = None,
        drop: np.ndarray | None = None,
    ) -> None:
        """See `Index.write`. Segments that hold dropped rows are rewritten without them."""
        analyser, names = Analyser.of(settings.get("analyser")), []
        if base is not None:
            analyser, header = read_header(base, cls.kind, FORMAT, settings)
            names = header["segments"]
        with _failures(f"cannot write the index {directory}"):
            make_directory(directory)
            segments = _Segments(directory)
            for name in names:
                assert base is not None
                segments.take(_Segment.open(base, name), drop)
            for run in _runs(analyser, batches):
                segments.add(run)
            write_header(directory, cls.kind, FORMAT, analyser, segments=segments.names)

    @classmethod
    def open(cls, directory: Path, settings: Settings) -> SimpleIndex:
        """See `Index.open`. Raises NanochatError for a missing or damaged directory, UsageError for another analyser
        than the one that the index was built with."""
        analyser, header = read_header(directory, cls.kind, FORMAT, settings)
        with _failures(f"cannot open the index {directory}; `verify` tells which file is damaged"):
            return cls(directory, analyser, [_Segment.open(directory, name) for name in header["segments"]])

    def search(self, queries: Sequence[str], k: int, allowed: np.ndarray | None = None) -> list[Found]:
        """See `Index.search`. Raises NanochatError for a damaged file."""
        if self._segments is None:
            raise UsageError(f"the index {self.directory} was closed")
        if isinstance(queries, str):
            raise UsageError("search takes a list of queries, not one text")
        with _failures(f"cannot search the index {self.directory}; `verify` tells which file is damaged"):
            return [self._search(self._segments, query, k, allowed) for query in queries]

    def close(self) -> None:
        """Let go of the mapped files."""
        self._segments = None

    def _search(self, segments: list[_Segment], query: str, k: int, allowed: np.ndarray | None) -> Found:
        counts = Counter(self.analyser.query_terms(query))
        keys = np.fromiter(map(_key, counts), np.uint64, len(counts))
        places = [segment.postings(keys) for segment in segments]
        found = np.sum([ends - starts for starts, ends in places], axis=0) if places else np.zeros(len(keys))
        known = np.flatnonzero(found)
        if k < 1 or not len(known):
            return Found.none()
        times = np.fromiter(counts.values(), np.float64, len(counts))
        weights = (1 + np.log(times[known])) * np.log1p(self.n_rows / found[known])
        weights /= np.sqrt(np.sum(weights * weights))
        scores = np.zeros(self.n_rows, np.float32)
        touched = []
        for term, weight in zip(known.tolist(), weights.astype(np.float32)):
            for segment, first, (starts, ends) in zip(segments, self._firsts.tolist(), places):
                docs = segment.docs[starts[term] : ends[term]]
                part = scores[first : first + len(segment.rows)]
                part[docs] += weight * segment.weights[starts[term] : ends[term]]
                touched.append(docs + np.int64(first))
        if allowed is None:
            best = _top(scores, *_candidates(scores, touched, k), k)
        else:
            best = _top(scores, self._places(segments, allowed), 1, k)
        return Found(self._rows(segments, best), scores[best])

    def _places(self, segments: list[_Segment], rows: np.ndarray) -> np.ndarray:
        """The places of those sorted rows that are here."""
        found = []
        for segment, first in zip(segments, self._firsts.tolist()):
            own = segment.rows
            if not len(own):
                continue
            inside = rows[np.searchsorted(rows, own[0]) : np.searchsorted(rows, own[-1], "right")]
            if own[-1] - own[0] + 1 == len(own):  # no gaps: no need to look
                found.append(inside - own[0] + first)
            else:
                at = np.searchsorted(own, inside)
                found.append(at[own[at] == inside] + first)
        return np.concatenate(found) if found else np.empty(0, np.int64)

    def _rows(self, segments: list[_Segment], places: np.ndarray) -> np.ndarray:
        rows = np.empty(len(places), np.int64)
        which = np.searchsorted(self._firsts, places, "right") - 1
        for i in np.unique(which).tolist():
            rows[which == i] = segments[i].rows[places[which == i] - self._firsts[i]]
        return rows


def _candidates(scores: np.ndarray, touched: list[np.ndarray], k: int) -> tuple[np.ndarray, int]:
    """Places that hold the k best, and how often one may be among them. Selecting among all scores is slow when most
    are 0, so few words give the places that they touch; many give those as good as the k-th best of a rare word's."""
    if sum(map(len, touched)) > len(scores) // 4:
        few = min((places for places in touched if len(places) >= k), key=len, default=None)
        if few is not None:
            return np.flatnonzero(scores >= np.partition(scores[few], len(few) - k)[len(few) - k]), 1
    return np.concatenate(touched), len(touched)


def _top(scores: np.ndarray, places: np.ndarray, repeats: int, k: int) -> np.ndarray:
    """The k of these places with the highest scores above 0, best first, of equal ones the lower first. Each place is
    given at most `repeats` times."""
    values = scores[places]
    if len(values) > k * repeats:  # the best k * repeats hold k different places, and their like are kept too
        cut = len(values) - k * repeats
        places = places[values >= np.partition(values, cut)[cut]]
    places = np.unique(places)
    values = scores[places]
    return places[np.lexsort((places, -values))][: min(k, np.count_nonzero(values > 0))]


# -- segments ----------------------------------------------------------------------------------------------------------


class _Segment(NamedTuple):
    """The arrays of a segment, in memory or mapped, and where its files lie."""

    keys: np.ndarray
    starts: np.ndarray
    docs: np.ndarray
    weights: np.ndarray
    rows: np.ndarray
    home: tuple[Path, int] | None = None

    @classmethod
    def open(cls, directory: Path, name: int) -> _Segment:
        arrays = {part: _load(_file(directory, name, part), dtype) for part, dtype in _DTYPES.items()}
        segment = cls(**arrays, home=(directory, name))
        good = len(segment.starts) == len(segment.keys) + 1 and len(segment.docs) == len(segment.weights)
        if not good or segment.starts[-1] != len(segment.docs):
            raise ValueError(f"the files of segment {name} do not belong together")
        return segment

    def save(self, directory: Path, name: int) -> None:
        for part in _DTYPES:
            with ArrayWriter(_file(directory, name, part), _DTYPES[part]) as file:
                file.append(getattr(self, part))

    def postings(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the postings of each key start and end; equal when the key is not here."""
        if not len(self.keys):
            return np.zeros(len(keys), np.int64), np.zeros(len(keys), np.int64)
        at = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        starts = self.starts[at]
        return starts, np.where(self.keys[at] == keys, self.starts[at + 1], starts)


class _Segments:
    """The segments of a directory while it is written."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.names: list[int] = []
        self._next = 0

    def take(self, segment: _Segment, drop: np.ndarray | None) -> None:
        """Share a segment of the base, or rewrite it without the rows to drop."""
        keep = None if drop is None or not len(drop) else ~np.isin(segment.rows, drop)
        if keep is None or keep.all():
            assert segment.home is not None
            home, name = segment.home
            for part in _DTYPES:
                link(_file(home, name, part), _file(self.directory, name, part))
            self.names.append(name)
            self._next = max(self._next, name + 1)
        elif keep.any():
            self._merge([segment], [keep])

    def add(self, segment: _Segment) -> None:
        """Write a segment, then merge it with those before it that have become too small."""
        segment.save(self.directory, self._next)
        self.names.append(self._next)
        self._next += 1
        opened = [_Segment.open(self.directory, name) for name in self.names]
        first = len(opened) - 1
        while first and len(opened[first - 1].rows) < FACTOR * sum(len(s.rows) for s in opened[first:]):
            first -= 1
        if first < len(opened) - 1:
            old, self.names = self.names[first:], self.names[:first]
            self._merge(opened[first:], [None] * len(old))
            for name in old:
                for part in _DTYPES:
                    _file(self.directory, name, part).unlink()

    def _merge(self, segments: list[_Segment], keeps: Sequence[np.ndarray | None]) -> None:
        name, self._next = self._next, self._next + 1
        with contextlib.ExitStack() as stack:
            files = {
                part: stack.enter_context(ArrayWriter(_file(self.directory, name, part), dtype))
                for part, dtype in _DTYPES.items()
            }
            _merge(segments, keeps, files)
        self.names.append(name)


def _merge(segments: list[_Segment], keeps: Sequence[np.ndarray | None], files: Mapping[str, ArrayWriter]) -> None:
    """Write one segment that holds those of `segments`, of each the documents to keep (None: all), a few million
    postings at a time."""
    first = 0
    numbers = []  # of each old document its new one, -1 without
    for segment, keep in zip(segments, keeps):
        kept = np.ones(len(segment.rows), bool) if keep is None else keep
        numbers.append(np.where(kept, np.cumsum(kept) - 1 + first, -1).astype(np.int32))
        files["rows"].append(segment.rows[kept])
        first += int(kept.sum())
    keys = np.unique(np.concatenate([segment.keys for segment in segments]))
    sizes = np.zeros(len(keys), np.int64)
    for segment in segments:
        sizes[np.searchsorted(keys, segment.keys)] += np.diff(segment.starts)
    cuts = np.flatnonzero(np.diff(np.cumsum(sizes) // MERGE_POSTINGS)) + 1
    total = 0
    files["starts"].append(np.zeros(1, np.int64))
    for words in np.split(keys, cuts):
        of_word, docs, weights = _postings_of(words, segments, numbers)
        order = np.argsort(of_word, kind="stable")  # by word, then as the segments have them: by document
        counts = np.bincount(of_word, minlength=len(words))
        counts, words = counts[counts > 0], words[counts > 0]
        files["keys"].append(words)
        files["starts"].append(total + np.cumsum(counts))
        files["docs"].append(docs[order])
        files["weights"].append(weights[order])
        total += len(docs)


def _postings_of(
    words: np.ndarray, segments: list[_Segment], numbers: list[np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The postings of neighbouring keys in several segments: places in `words`, new numbers of documents, weights."""
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for segment, number in zip(segments, numbers):
        low, high = np.searchsorted(segment.keys, words[:1]), np.searchsorted(segment.keys, words[-1:], "right")
        own = slice(int(low.sum()), int(high.sum()))  # the sum of one, or of none
        starts = segment.starts[own.start : own.stop + 1]
        of_word = np.repeat(np.searchsorted(words, segment.keys[own]), np.diff(starts))
        docs = number[segment.docs[starts[0] : starts[-1]]]
        kept = docs >= 0
        parts.append((of_word[kept], docs[kept], segment.weights[starts[0] : starts[-1]][kept]))
    of_word, docs, weights = map(np.concatenate, zip(*parts))
    return of_word, docs, weights


def _runs(analyser: Analyser, batches: Iterable[Batch]) -> Iterator[_Segment]:
    """Segments in memory of about RUN_POSTINGS words."""
    ids: dict[str, int] = {}
    words, lengths, rows = array("i"), array("i"), array("q")
    for batch in batches:
        for row, text in zip(batch.rows.tolist(), batch.texts, strict=True):
            terms = analyser.terms(text)
            words.extend([ids.setdefault(term, len(ids)) for term in terms])
            lengths.append(len(terms))
            rows.append(row)
        if len(words) >= RUN_POSTINGS:
            yield _segment(ids, words, lengths, rows)
            ids, words, lengths, rows = {}, array("i"), array("i"), array("q")
    if rows:
        yield _segment(ids, words, lengths, rows)


def _segment(ids: Mapping[str, int], words: array[int], lengths: array[int], rows: array[int]) -> _Segment:
    """A segment of documents whose words lie one after the other, as numbers in `ids`."""
    keys = np.fromiter(map(_key, ids), np.uint64, len(ids))
    keys, place = np.unique(keys, return_inverse=True)
    doc = np.repeat(np.arange(len(lengths)), np.frombuffer(lengths, np.int32))
    pairs = place[np.frombuffer(words, np.int32)] * len(lengths) + doc if len(words) else np.empty(0, np.int64)
    pairs, counts = np.unique(pairs, return_counts=True)  # by word, then by document
    of_word, doc = np.divmod(pairs, len(lengths))
    weights = 1 + np.log(counts)
    norms = np.sqrt(np.bincount(doc, weights * weights, minlength=len(lengths)))
    return _Segment(
        keys=keys,
        starts=np.concatenate([[0], np.cumsum(np.bincount(of_word, minlength=len(keys)))]),
        docs=doc,
        weights=weights / norms[doc],
        rows=np.frombuffer(rows, np.int64),
    )


def _key(term: str) -> int:
    return int.from_bytes(blake2b(term.encode(), digest_size=8).digest(), "little")


# -- files -------------------------------------------------------------------------------------------------------------


def _file(directory: Path, name: int, part: str) -> Path:
    return directory / f"{name}.{part}.npy"


def _load(path: Path, dtype: str) -> np.ndarray:
    """A mapped array. Raises ValueError for a file that is none of this type."""
    values = load_array(path, mapped=True)
    if values.ndim != 1 or values.dtype != np.dtype(dtype):
        raise ValueError(f"{path.name} is no list of {dtype}")
    return values


@contextlib.contextmanager
def _failures(what: str) -> Iterator[None]:
    """What damaged or missing files and full disks raise, as one NanochatError."""
    try:
        yield
    except (OSError, ValueError, IndexError, KeyError, TypeError, EOFError, MemoryError) as error:
        raise NanochatError(f"{what}: {error!r}" if isinstance(error, KeyError) else f"{what}: {error}") from error
