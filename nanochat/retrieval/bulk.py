"""Bulk ingestion: JSONL files embedded by a pool of Ray workers, then added to a knowledge base.

    kb = KnowledgeBase.open("kb")                        # or a MilvusKnowledgeBase
    bulk_ingest(kb, ["documents.jsonl"], workers=64, gpus=0.25, address="auto")

Embedding takes hours where everything else takes minutes, so that is what is spread. The files are cut into ranges of
bytes; Ray Data hands these to a pool of actors, which read, cut and embed on their own and send texts and vectors back;
they are staged with the knowledge base (`stage`), and a note says which ranges are done. Then `ingest` runs here and
finds the vectors ready. Interrupted at any point, the same call goes on: only ranges under way are embedded again.

Workers on other machines must see the files and the embedder under the same paths (a shared file system).
"""

from __future__ import annotations

import gzip
import importlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tqdm import tqdm

from nanochat.errors import NanochatError, UsageError
from nanochat.retrieval.chunk import spans
from nanochat.retrieval.document import Document, Embedder
from nanochat.retrieval.jsonl import ADVICE, ON_ERROR, file_list, parse
from nanochat.retrieval.knowledge_base import KnowledgeBase
from nanochat.retrieval.prepare import check, passage_texts
from nanochat.retrieval.text_files import is_text_file
from nanochat.retrieval.writer import Change

if TYPE_CHECKING:
    from nanochat.retrieval.milvus import MilvusKnowledgeBase

log = logging.getLogger("nanochat")
RANGE_BYTES = 1 << 20  # of a file, for one task; what an interruption can cost, times the workers
PART_TEXTS = 2048  # passages that a worker embeds and sends together
STAGE_TEXTS = 16_384  # passages that are staged together
STORE_BYTES = 200 << 20  # of Ray's object store, when a local Ray is started

Cut = Callable[[Document], list[str]]  # the passages of a document, as texts


class Range(NamedTuple):
    """The lines of a file that start in [start, end), of which the first has the number `line`."""

    file: str
    start: int
    end: int
    line: int


def bulk_ingest(
    kb: KnowledgeBase | MilvusKnowledgeBase,
    files: str | Path | Iterable[str | Path],
    *,
    workers: int = 2,
    cpus: float = 1.0,
    gpus: float = 0.0,
    address: str | None = None,
    on_error: str = "raise",
    on_duplicate: str = "skip",
    update: bool = False,
    range_bytes: int = RANGE_BYTES,
    progress: bool = True,
) -> Change:
    """Embed the documents of JSONL files with `workers` Ray actors, then ingest them.

    Each worker takes `cpus` and `gpus` of the Ray cluster at `address` ("auto": the running one; None: one of its own
    on this machine, which ends with this call). The rest as in `KnowledgeBase.ingest`. Raises UsageError for a line
    that is no document, unless on_error="skip", as soon as a worker meets it; what was embedded stays staged."""
    if workers < 1 or range_bytes < 1:
        raise UsageError(f"workers={workers}, range_bytes={range_bytes}: both must be 1 or more")
    if on_error not in ON_ERROR:
        raise UsageError(f"on_error={on_error!r}: choose from {', '.join(ON_ERROR)}")
    paths = file_list(files)
    embed_files(
        kb, paths, workers=workers, cpus=cpus, gpus=gpus, address=address, on_error=on_error,
        range_bytes=range_bytes, progress=progress,
    )  # fmt: skip
    return kb.ingest(paths, on_error, progress=progress, update=update, on_duplicate=on_duplicate)


def embed_files(
    kb: KnowledgeBase | MilvusKnowledgeBase,
    paths: Sequence[Path],
    *,
    workers: int,
    cpus: float = 1.0,
    gpus: float = 0.0,
    address: str | None = None,
    on_error: str = "raise",
    range_bytes: int = RANGE_BYTES,
    progress: bool = True,
) -> int:
    """Stage the vectors of all passages that the JSONL files hold; how many were computed. See `bulk_ingest`."""
    embedder = kb.embedder  # raises for a kind that has none
    notes = Notes(kb)
    todo = [one for path in paths if not is_text_file(path) for one in notes.missing(ranges(path, range_bytes))]
    if not todo:
        return 0
    described = kb.settings["embedder"]
    task = {
        "embedder": embedder if described["spec"] is None else described["spec"],
        "name": embedder.name,
        "cut": _cutter(kb),
    }
    total = sum(one.end - one.start for one in todo)
    n = 0
    with (
        _Ray(address, workers, cpus, gpus) as engine,
        tqdm(total=total, unit="B", unit_scale=True, desc=f"embed, {workers} workers", disable=not progress) as bar,
        _Stage(kb, notes) as stage,
    ):
        for part in _parts(engine, todo, task, workers, cpus, gpus):
            if part["failure"]:
                raise NanochatError(f"a worker failed at {todo[part['range']].file}: {part['failure']}")
            for message in part["errors"]:
                if on_error == "raise":
                    raise UsageError(f"{message}; {ADVICE}")
            one = todo[part["range"]]
            n += len(part["texts"])
            if stage.add(one, part):
                bar.update(one.end - one.start)
                bar.set_postfix_str(f"{n:,} passages", refresh=False)
    return n


# -- what there is to do -----------------------------------------------------------------------------------------------


def ranges(path: Path, size: int = RANGE_BYTES) -> Iterator[Range]:
    """A file cut at line ends into ranges of at least `size` bytes; a gzipped one stays whole. Raises NanochatError."""
    total = path.stat().st_size
    if path.suffix == ".gz":
        yield Range(str(path.resolve()), 0, total, 1)
        return
    try:
        with open(path, "rb") as file:
            start, line = 0, 1
            while start < total:
                block = file.read(size)
                block += file.readline()
                yield Range(str(path.resolve()), start, start + len(block), line)
                start += len(block)
                line += block.count(b"\n")
    except OSError as error:
        raise NanochatError(f"cannot read {path}: {error.strerror}") from error


class Notes:
    """Which ranges of which files are done: one line of JSON each, beside the knowledge base, only appended. A file
    that changed (size or time), or a knowledge base that was made anew, starts over."""

    def __init__(self, kb: KnowledgeBase | MilvusKnowledgeBase) -> None:
        place = kb.path if isinstance(kb, KnowledgeBase) else kb.staging
        self.path = place.with_name(f"{place.name}.bulk.jsonl")
        self._base = f"{kb.settings['created']} {kb.settings['embedder']['name']}"
        self._done: set[tuple[Any, ...]] = set()
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                try:
                    self._done.add(tuple(json.loads(line)))
                except ValueError:  # the end of an interrupted write
                    continue

    def missing(self, all: Iterable[Range]) -> list[Range]:
        """Those of the ranges that are not done."""
        return [one for one in all if self._entry(one) not in self._done]

    def add(self, done: Iterable[Range]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a") as file:
            file.write("".join(f"\n{json.dumps(self._entry(one))}" for one in done))

    def _entry(self, one: Range) -> tuple[Any, ...]:
        stat = Path(one.file).stat()
        return self._base, one.file, stat.st_size, stat.st_mtime_ns, one.start, one.end


class _Stage:
    """Vectors on their way into the knowledge base, several ranges at a time. On an error what is whole is kept."""

    def __init__(self, kb: KnowledgeBase | MilvusKnowledgeBase, notes: Notes) -> None:
        self._kb, self._notes = kb, notes
        self._texts: list[str] = []
        self._vectors: list[np.ndarray] = []
        self._whole: list[Range] = []
        self._come: Counter[Range] = Counter()

    def add(self, one: Range, part: Mapping[str, Any]) -> bool:
        """Take a part of a range; whether the range is complete now."""
        if part["texts"]:
            self._texts += part["texts"]
            self._vectors.append(part["vectors"])
        self._come[one] += 1  # parts come in any order, the last one says how many there are
        if part["last"] > 0:
            self._come[one] -= part["last"]
        complete = self._come[one] == 0
        if complete:
            self._whole.append(one)
        if len(self._texts) >= STAGE_TEXTS:
            self.flush()
        return complete

    def flush(self) -> None:
        if self._texts:
            self._kb.stage(self._texts, np.concatenate(self._vectors))
        self._notes.add(self._whole)
        self._texts, self._vectors, self._whole = [], [], []

    def __enter__(self) -> _Stage:
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()


def _cutter(kb: KnowledgeBase | MilvusKnowledgeBase) -> Cut:
    """How the knowledge base cuts documents, as something that can be sent to another process."""
    if isinstance(kb, KnowledgeBase):
        return partial(_cut, kb.settings["chunk_words"], kb.settings["overlap_words"])
    return partial(_cut_for_milvus, kb.shape)


def _cut(chunk_words: int, overlap_words: int, document: Document) -> list[str]:
    return passage_texts(document, spans(document.content, chunk_words, overlap_words))


def _cut_for_milvus(shape: Any, document: Document) -> list[str]:
    from nanochat.retrieval.milvus_rows import passages

    return [passage.document.text for passage in passages(document, shape)]


# -- Ray ---------------------------------------------------------------------------------------------------------------


class _Ray:
    """Ray's data library, over a cluster or over a Ray of its own that ends with the block."""

    def __init__(self, address: str | None, workers: int, cpus: float, gpus: float) -> None:
        self._options: dict[str, Any] = {"address": address}
        if address is None:
            self._options = {
                "num_cpus": max(1, round(workers * cpus)),
                "object_store_memory": STORE_BYTES,
                "include_dashboard": False,
            }
            if gpus:
                self._options["num_gpus"] = max(1, round(workers * gpus))

    def __enter__(self) -> Any:
        try:
            self._ray = importlib.import_module("ray")
            data = importlib.import_module("ray.data")
        except ImportError as error:
            raise UsageError(f"bulk ingestion needs {error.name}: pip install 'nanochat[ray]'") from error
        self._started = not self._ray.is_initialized()
        if self._started:
            os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # its warnings are for Ray's developers
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            try:
                self._ray.init(logging_level=logging.ERROR, log_to_driver=False, **self._options)
            except (ConnectionError, RuntimeError, ValueError) as error:
                place = self._options.get("address") or "this machine"
                raise NanochatError(f"no Ray to be had at {place}: {error}") from error
        context = data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        for name in ("ray.data", "ray"):
            logging.getLogger(name).setLevel(logging.ERROR)
        return data

    def __exit__(self, *_: object) -> None:
        if self._started:
            self._ray.shutdown()


def _parts(
    data: Any, todo: Sequence[Range], task: Mapping[str, Any], workers: int, cpus: float, gpus: float
) -> Iterator[dict[str, Any]]:
    """What the workers send, in any order: texts and vectors of some passages of a range. `last` is -1 but in the
    range's last part, where it counts them."""
    items = [{"range": i, **one._asdict()} for i, one in enumerate(todo)]
    found = data.from_items(items, override_num_blocks=len(items)).map_batches(
        _Worker,
        fn_constructor_kwargs=dict(task),
        batch_size=1,
        batch_format="numpy",
        compute=data.ActorPoolStrategy(size=workers),
        num_cpus=cpus,
        num_gpus=gpus,
    )
    try:
        for batch in found.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
            for row in batch.to_pylist():
                vectors = np.frombuffer(row["vectors"], "<f4")
                row["vectors"] = vectors.reshape(len(row["texts"]), -1) if row["texts"] else vectors
                yield row
    except Exception as error:
        if not type(error).__module__.startswith("ray."):
            raise
        raise NanochatError(f"Ray gave up ({type(error).__name__}): {str(error).strip()[:2000]}") from error


class _Worker:
    """Runs in a Ray actor: makes the embedder once, then embeds range after range."""

    def __init__(self, embedder: str | Embedder, name: str, cut: Cut) -> None:
        self._given, self._name, self._cut = embedder, name, cut
        self._embedder: Embedder | None = None

    def __call__(self, batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """One range, given as columns of one row; its parts, as columns of one row each. What fails here is told, not
        raised: Ray would try it again, and bury the reason in its own traceback."""
        one = Range(str(batch["file"][0]), int(batch["start"][0]), int(batch["end"][0]), int(batch["line"][0]))
        parts = self._embedded(one)
        more = True
        while more:
            try:
                part = next(parts)
                more = part["last"] < 0
            except Exception as error:
                failure = f"{type(error).__name__}: {error}"
                part = {"texts": [], "vectors": b"", "errors": [], "last": -1, "failure": failure}
                more = False
            yield {name: [value] for name, value in {**part, "range": int(batch["range"][0])}.items()}

    def _embedded(self, one: Range) -> Iterator[dict[str, Any]]:
        if self._embedder is None:
            self._embedder = self._make()
        errors: list[str] = []
        texts = _texts(one, self._cut, errors)
        for n in count(1):
            part = list(islice(texts, PART_TEXTS))
            more = len(part) == PART_TEXTS
            vectors = np.asarray(self._embedder.embed(part), "<f4").tobytes() if part else b""
            found, errors[:] = list(errors), []
            yield {"texts": part, "vectors": vectors, "errors": found, "last": -1 if more else n, "failure": ""}
            if not more:
                return

    def _make(self) -> Embedder:
        from nanochat.retrieval.embed import make_embedder

        made = make_embedder(self._given) if isinstance(self._given, str) else self._given
        if made.name != self._name:
            raise UsageError(f"this machine's embedder is {made.name!r}, the knowledge base's {self._name!r}")
        return made


def _texts(one: Range, cut: Cut, errors: list[str]) -> Iterator[str]:
    """The passages of a range that hold a word. Bad lines are noted: `ingest` will meet them again."""
    for number, line in enumerate(_lines(one), one.line):
        if not line.strip():
            continue
        try:
            document = check(parse(line)).document
            yield from (text for text in cut(document) if text and not text.isspace())
        except (ValueError, RecursionError, UsageError) as error:
            errors.append(f"{one.file}, line {number}: {error}")


def _lines(one: Range) -> Iterator[bytes]:
    if one.file.endswith(".gz"):
        with gzip.open(one.file) as file:
            yield from file
        return
    with open(one.file, "rb") as plain:
        plain.seek(one.start)
        left = one.end - one.start
        while left > 0 and (line := plain.readline()):
            left -= len(line)
            yield line
