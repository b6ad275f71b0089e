"""BM25 (Robertson and Zaragoza 2009; k1 = 1.2, b = 0.75) over tantivy, an index in Rust that is mapped, not loaded.

A directory holds tantivy's files, which it writes once and replaces only by new ones, and `index.json`. A new
directory shares the files of the one it continues through hard links. Scores are Lucene's BM25 times 2.2 (k1 + 1), with
lengths rounded to one byte; their statistics count dropped rows until their segment is merged.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from nanochat.errors import NanochatError, UsageError
from nanochat.retrieval.analysis import Analyser, import_tantivy
from nanochat.retrieval.document import Batch, Found, Settings
from nanochat.retrieval.index_files import copy, link, make_directory, read_header, write_header

if TYPE_CHECKING:
    import tantivy

FORMAT = 1
THREADS = 1  # beside the one that reads, analyses and stores; more where these are faster than tantivy
HEAP_BYTES = 120_000_000  # of the writer, over all its threads; when full, it becomes a segment of some 400,000 texts
SPARE = 8  # hits asked for beyond k: enough to settle most ties without a second search
K1 = 1.2  # tantivy's; a term adds less than K1 + 1 times its idf
RARE_COST = 2  # reading a text of a rare term and looking common ones up costs as much as so many of theirs
MAX_COUNTED_TERMS = 1 << 16
SAME_SCORE = 2e-6  # relative: equal sums added in another order differ by float32's rounding
ROW_COST = 8  # an allowed row inside the query costs as much as so many hits that are fetched and then filtered
_SEGMENT_FILE = re.compile(r"[0-9a-f]{32}\..+")
_WRITER_LOCK = ".tantivy-writer.lock"
_LISTS = ("meta.json", ".managed.json")


class BM25Index:
    """An `Index` (document.py) of texts. Settings: `analyser` (see Analyser.of), and for writing `threads` and
    `heap_bytes`."""

    kind: ClassVar[str] = "bm25"

    def __init__(self, index: tantivy.Index, analyser: Analyser, directory: Path) -> None:
        self.analyser = analyser
        self.directory = directory
        self._schema = index.schema
        self._searcher: tantivy.Searcher | None = index.searcher()
        self.n_rows: int = self._searcher.num_docs
        # Tantivy's statistics: also of dropped texts, until their segment is merged.
        segments = json.loads((directory / "meta.json").read_bytes())["segments"]
        self._n_texts: int = sum(segment["max_doc"] for segment in segments)
        self._n_texts_with: dict[str, int] = {}  # a term

    # -- writing -------------------------------------------------------------------------------------------------------

    @classmethod
    def write(
        cls,
        directory: Path,
        settings: Settings,
        batches: Iterable[Batch],
        base: Path | None = None,
        drop: np.ndarray | None = None,
    ) -> None:
        """See `Index.write`. Dropped rows leave the answers at once and the files when their segment is merged."""
        analyser = Analyser.of(settings.get("analyser"))
        if base is not None:
            analyser, _ = read_header(base, cls.kind, FORMAT, settings)
        with _failures(f"cannot write the BM25 index {directory}"):
            make_directory(directory)
            if base is not None:
                _share(base, directory)
            index = _tantivy_index(directory, create=base is None)
            threads = int(settings.get("threads", THREADS))
            writer = index.writer(int(settings.get("heap_bytes", HEAP_BYTES)), threads)
            _fill(writer, analyser, batches, drop)
            writer.wait_merging_threads()
            _collect_garbage(index)
            del writer, index
            (directory / _WRITER_LOCK).unlink(missing_ok=True)
            write_header(directory, cls.kind, FORMAT, analyser)

    # -- reading -------------------------------------------------------------------------------------------------------

    @classmethod
    def open(cls, directory: Path, settings: Settings) -> BM25Index:
        """See `Index.open`. Raises NanochatError for a missing or damaged directory, UsageError for another analyser
        than the one that the index was built with."""
        analyser, _ = read_header(directory, cls.kind, FORMAT, settings)
        with _failures(f"cannot open the BM25 index {directory}; `verify` tells which file is damaged"):
            return cls(_open_read_only(directory), analyser, directory)

    def search(self, queries: Sequence[str], k: int, allowed: np.ndarray | None = None) -> list[Found]:
        """See `Index.search`. Raises NanochatError for a damaged file."""
        if self._searcher is None:
            raise UsageError(f"the BM25 index {self.directory} was closed")
        if isinstance(queries, str):
            raise UsageError("search takes a list of queries, not one text")
        with _failures(f"cannot search the BM25 index {self.directory}; `verify` tells which file is damaged"):
            return [self._search(self._searcher, query, k, allowed) for query in queries]

    def close(self) -> None:
        """Let go of the mapped files."""
        self._searcher = None

    def _search(self, searcher: tantivy.Searcher, query: str, k: int, allowed: np.ndarray | None) -> Found:
        k = min(k, self.n_rows, self.n_rows if allowed is None else len(allowed))
        terms = Counter(self.analyser.query_terms(query))
        if not terms or k < 1:
            return Found.none()
        limit = k + SPARE
        if allowed is None and len(terms) > 1 and (found := self._search_rare(searcher, terms, k, limit)) is not None:
            return found
        parsed = _any_of([self._term(*one) for one in terms.items()])
        if allowed is not None:  # as many as hold k allowed ones, if these are spread evenly
            limit = int(limit * max(1.0, 1.2 * self.n_rows / len(allowed)))
        while True:
            limit = min(limit, self.n_rows)
            if allowed is not None and len(allowed) * ROW_COST < limit:
                parsed, allowed, limit = self._among(parsed, allowed), None, k + SPARE
            rows, scores = _hits(searcher, parsed, limit)
            exhausted = len(rows) < limit or limit == self.n_rows
            lowest = scores[-1] if len(scores) else 0.0
            if allowed is not None:
                kept = _isin(rows, allowed)
                rows, scores = rows[kept], scores[kept]
            # Complete when nothing is left, or when what is left scores less than the last one taken.
            if exhausted or (len(rows) >= k and lowest < scores[k - 1] * (1 - SAME_SCORE)):
                return _best(rows, scores, k)
            limit *= 4

    def _search_rare(self, searcher: tantivy.Searcher, terms: Counter[str], k: int, limit: int) -> Found | None:
        """The answer from the texts that hold one of the rare terms, the common ones only adding to their scores; None
        when that would not be faster, or when a text without any rare term might belong to it (MaxScore, Turtle and
        Flood 1995): tantivy's own pruning still reads most of what a stop word has."""
        numbers = [(self._count(searcher, term), term) for term in terms]
        numbers.sort(reverse=True)
        lowest = self._likely_lowest(numbers, limit)
        most, n_common, n_skipped = 0.0, 0, 0  # what texts with common terms alone can score at most
        for number, term in numbers[:-1]:
            more = most + terms[term] * _idf(number, self._n_texts) * (K1 + 1)
            if more > lowest:
                break
            most, n_common, n_skipped = more, n_common + 1, n_skipped + number
        n_read = sum(number for number, _ in numbers[n_common:])
        if n_skipped < RARE_COST * n_read or not n_common:
            return None
        parts = [self._term(term, terms[term]) for _, term in numbers]
        occur = import_tantivy().Occur
        query = import_tantivy().Query.boolean_query(
            [(occur.Must, _any_of(parts[n_common:])), (occur.Should, _any_of(parts[:n_common]))]
        )
        rows, scores = _hits(searcher, query, limit)
        if len(rows) < k:
            return None
        left_out = most if len(rows) < limit else max(most, float(scores[-1]))
        return _best(rows, scores, k) if left_out < scores[k - 1] * (1 - SAME_SCORE) else None

    def _likely_lowest(self, numbers: list[tuple[int, str]], limit: int) -> float:
        """About what the last of the best `limit` texts scores: as one of average length with one of the rarest terms
        that together have so many texts. Too high a guess costs a second search."""
        total = 0
        for number, _ in reversed(numbers):
            total += number
            if total >= limit:
                return _idf(number, self._n_texts)
        return 0.0

    def _count(self, searcher: tantivy.Searcher, term: str) -> int:
        """How many texts hold a term."""
        known = self._n_texts_with.get(term)
        if known is None:
            known = searcher.doc_freq("text", term)
            if len(self._n_texts_with) >= MAX_COUNTED_TERMS:
                self._n_texts_with.clear()
            self._n_texts_with[term] = known
        return known

    def _term(self, term: str, count: int) -> tantivy.Query:
        """A query for one term; one that is repeated counts as often."""
        make = import_tantivy().Query
        part = make.term_query(self._schema, "text", term, index_option="freq")
        return part if count == 1 else make.boost_query(part, float(count))

    def _among(self, query: tantivy.Query, allowed: np.ndarray) -> tantivy.Query:
        """The query within the allowed rows, its scores unchanged."""
        engine = import_tantivy()
        rows = engine.Query.term_set_query(self._schema, "row", allowed.tolist())
        must = engine.Occur.Must
        return engine.Query.boolean_query([(must, query), (must, engine.Query.const_score_query(rows, 0.0))])


def _any_of(parts: list[tantivy.Query]) -> tantivy.Query:
    """Texts that match any of the queries, which are one at least; scores add up."""
    if len(parts) == 1:
        return parts[0]
    should = import_tantivy().Occur.Should
    return import_tantivy().Query.boolean_query([(should, part) for part in parts])


def _idf(number: int, n_texts: int) -> float:
    """As tantivy has it, for a term that so many of the texts hold."""
    return math.log(1 + (n_texts - number + 0.5) / (number + 0.5))


def _hits(searcher: tantivy.Searcher, query: tantivy.Query, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and scores of the best `limit`, best first."""
    hits = searcher.search(query, limit, count=False).hits
    if not hits:
        return Found.none()
    scores, places = zip(*hits)
    rows = searcher.fast_field_values("row", list(places))
    return np.array(rows, dtype=np.int64), np.array(scores, dtype=np.float32)


def _best(rows: np.ndarray, scores: np.ndarray, k: int) -> Found:
    """The first k of hits that come best first; scores that differ by rounding become equal, and then rows decide."""
    if not len(rows):
        return Found.none()
    starts = np.ones(len(scores), bool)
    starts[1:] = scores[1:] < scores[:-1] * (1 - SAME_SCORE)
    if starts.all():
        return Found(rows[:k], scores[:k])
    group = np.cumsum(starts) - 1
    order = np.lexsort((rows, group))[:k]
    return Found(rows[order], scores[starts][group[order]])


def _isin(rows: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """Which rows are among the allowed ones, sorted and at least one."""
    places = np.searchsorted(allowed, rows)
    return allowed[np.minimum(places, len(allowed) - 1)] == rows


# -- tantivy -----------------------------------------------------------------------------------------------------------


def _tantivy_index(directory: Path, create: bool) -> tantivy.Index:
    """The index for writing."""
    engine = import_tantivy()
    if create:
        builder = engine.SchemaBuilder()
        builder.add_integer_field("row", indexed=True, fast=True)  # signed: unsigned ones are not found for deletion
        builder.add_text_field("text", tokenizer_name="whitespace", index_option="freq")
        index = engine.Index(builder.build(), str(directory))
    else:
        index = engine.Index.open(str(directory))
    return index


def _fill(
    writer: tantivy.IndexWriter, analyser: Analyser, batches: Iterable[Batch], drop: np.ndarray | None
) -> None:
    """Drop and add, then commit: tantivy fsyncs each file and the directory before it replaces meta.json."""
    document = import_tantivy().Document
    for row in () if drop is None else drop.tolist():
        writer.delete_documents_by_term("row", row)
    for batch in batches:
        for row, text in zip(batch.rows.tolist(), batch.texts, strict=True):
            record = document()
            record.add_integer("row", row)
            record.add_text("text", " ".join(analyser.terms(text)))
            writer.add_document(record)
    writer.commit()


def _collect_garbage(index: tantivy.Index) -> None:
    """Remove the files of merged segments: the index that merged them held them open."""
    index.reload()
    writer = index.writer(15_000_000, 1)
    writer.garbage_collect_files()
    writer.wait_merging_threads()


def _open_read_only(directory: Path) -> tantivy.Index:
    """Tantivy locks a file in the directory when it opens it; where nothing may be written, it opens links to it."""
    engine = import_tantivy()
    try:
        return engine.Index.open(str(directory))
    except Exception:
        if os.access(directory, os.W_OK) or not directory.is_dir():
            raise
        # tantivy's watcher may make its lock file there again at any moment, also while the directory is being deleted
        with tempfile.TemporaryDirectory(prefix="nanochat-bm25-", ignore_cleanup_errors=True) as links:
            for file in directory.iterdir():
                if _SEGMENT_FILE.fullmatch(file.name) or file.name in _LISTS:
                    os.symlink(file.resolve(), Path(links, file.name))
            return engine.Index.open(links)


@contextlib.contextmanager
def _failures(what: str) -> Iterator[None]:
    """Tantivy's errors, and the panics of its Rust code, which are no Exceptions, as one NanochatError."""
    try:
        yield
    except (NanochatError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        known = isinstance(error, OSError | ValueError | TypeError | RuntimeError)
        if not known and type(error).__name__ != "PanicException":
            raise
        raise NanochatError(f"{what}: {error}") from error


def _share(base: Path, directory: Path) -> None:
    """Links to the segments, which never change, and copies of the two lists of files, which tantivy replaces."""
    for file in base.iterdir():
        if _SEGMENT_FILE.fullmatch(file.name):
            link(file, directory / file.name)
        elif file.name in _LISTS:
            copy(file, directory / file.name)
