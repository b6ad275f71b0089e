"""The command `prepare_rag_dataset`: what `rag_finetune` and `rag_eval` need, made from the tiny world, from
what Python says of its own library, or from files.

    documents.jsonl                            a document for each new entity of the world, or each object of Python
    train.jsonl  validation.jsonl  test.jsonl  questions (nanochat/rag/questions.py) with answers and gold documents
    knowledge_base/                            the documents, searchable

No pretraining text tells of new entities, so only the documents answer. Questions for training are about the entities
that training may use, those of validation and test about the others. Some join two or three documents (`hops`), some
nothing answers. About Python each question asks for an object of its own. Equal settings give equal files.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from nanochat import config
from nanochat.data.python_docs import check_modules, document, python_docs
from nanochat.data.shuffle import Shuffle, mix
from nanochat.data.world import KINDS as ENTITY_KINDS
from nanochat.data.world import Question, World
from nanochat.errors import NanochatError, UsageError
from nanochat.rag import known_item
from nanochat.rag.tasks import as_document
from nanochat.retrieval.display import document_values
from nanochat.retrieval.generation import KINDS

log = logging.getLogger("nanochat")

SHARES = {1: 0.5, 2: 0.3, 3: 0.2}  # of the answerable questions, by hops
MODES = ("example", "build", "python_docs")
PROG = "nanochat prepare_rag_dataset"


@dataclass(frozen=True)
class DatasetSettings:
    """Make a data set for RAG from the tiny world (--mode example) or Python's documentation strings (--mode
    python_docs), or a knowledge base of documents (--mode build).

    prepare_rag_dataset --mode example --output data/rag
    prepare_rag_dataset --mode python_docs --output data/python
    prepare_rag_dataset --mode build --documents FILE --output KB --retriever_type bm25"""

    mode: str = "example"
    """example: documents, questions and a knowledge base from the tiny world; python_docs: the same from what this
    Python says of its standard library; build: a knowledge base of --documents"""
    output: str = ""
    """directory to write: of the data set (when not given data/rag, or data/python), or with --mode build of the
    knowledge base"""
    documents: tuple[str, ...] = ()
    """JSONL files or directories of them, for --mode build"""
    modules: tuple[str, ...] = ()
    """only these modules and packages, for --mode python_docs (default: all of the standard library)"""
    retriever_type: str = "hybrid"
    """what the knowledge base is built for: simple, bm25, dense or hybrid"""
    embedder: str = ""
    """of dense and hybrid, as in `retrieval build` (default: minilm)"""
    on_error: str = "raise"
    """a line that is no document: raise or skip"""
    world_seed: int = 0
    """seed of the tiny world; with --known and --new those that the model was pretrained with"""
    known: int = 120
    """entities that pretraining text tells about (the quickstart's number on a CPU)"""
    new: int = 1000
    """entities that only these documents tell about"""
    train: int = 4000
    """questions in train.jsonl"""
    validation: int = 500
    """questions in validation.jsonl"""
    test: int = 500
    """questions in test.jsonl"""
    absent: float = 0.15
    """share of the questions that no document answers"""
    seed: int = 0
    """seed that draws the questions"""

    def check(self) -> None:
        """Raises UsageError for a value that cannot be."""
        if self.mode not in MODES:
            raise UsageError(f"--mode {self.mode}: choose from {', '.join(MODES)}")
        if self.mode == "build":
            missing = [f"--{name}" for name in ("documents", "output") if not getattr(self, name)]
            if missing:
                raise UsageError(f"--mode build needs {' and '.join(missing)}: {PROG} --mode build --documents FILE "
                                 "--output KB --retriever_type bm25")  # fmt: skip
        elif self.documents:
            raise UsageError(f"--documents goes with --mode build; --mode {self.mode} makes its own")
        if self.modules and self.mode != "python_docs":
            raise UsageError(f"--modules goes with --mode python_docs, not --mode {self.mode}")
        check_modules(self.modules)
        for name in ("train", "validation", "test"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name} {getattr(self, name)}: must be at least 1")
        if self.retriever_type not in KINDS:
            raise UsageError(f"--retriever_type {self.retriever_type}: choose from {', '.join(KINDS)}")
        if not 0 <= self.absent < 1:
            raise UsageError(f"--absent {self.absent}: must be at least 0 and below 1")
        if self.new < 40:
            raise UsageError(f"--new {self.new}: must be at least 40, for documents to ask about")


def prepare(settings: DatasetSettings) -> Path:
    """Make what the settings ask for; returns the directory of the knowledge base. Raises NanochatError."""
    from nanochat.retrieval import commands
    from nanochat.retrieval.settings import BuildSettings

    settings.check()
    makes_files = settings.mode != "build"
    target = Path(settings.output or ("data/rag" if settings.mode == "example" else "data/python"))
    wanted = BuildSettings(
        documents=(str(target / "documents.jsonl"),) if makes_files else settings.documents,
        output=str(target / "knowledge_base" if makes_files else target),
        type=settings.retriever_type,
        embedder=settings.embedder,
        on_error=settings.on_error,
    )
    if makes_files:
        files = example(settings) if settings.mode == "example" else python(settings)
        check_free(target, files)
        commands.made(wanted).close()  # says what is missing before any file is written
        write(target, files)
        for name, text in files.items():
            print(f"{target / name}: {text.count(chr(10)):,} lines")
    commands.build(wanted)
    return Path(wanted.output)


def example(settings: DatasetSettings) -> dict[str, str]:
    """The files of the data set: name -> text. Raises UsageError when the world is too small for so many questions."""
    world = World(settings.world_seed, settings.known, settings.new)
    files = {"documents.jsonl": _lines(map(_document, world.documents("new")))}
    held = settings.validation + settings.test
    drawn = {"train": draw(world, "train", settings.train, settings), "heldout": draw(world, "heldout", held, settings)}
    parts = {"train": drawn["train"], "validation": drawn["heldout"][: settings.validation]}
    parts["test"] = drawn["heldout"][settings.validation :]
    for name, questions in parts.items():
        files[f"{name}.jsonl"] = _lines(record(q, f"{name}-{i}") for i, q in enumerate(questions))
    return files


def python(settings: DatasetSettings) -> dict[str, str]:
    """The files of the data set about Python's standard library. Raises UsageError for more questions than it gives."""
    records = python_docs(settings.modules)
    asked = known_item.questions(records)
    sizes = {name: getattr(settings, name) for name in ("train", "validation", "test")}
    if (wanted := sum(sizes.values())) > len(asked):
        default = DatasetSettings()
        if any(size != getattr(default, name) for name, size in sizes.items()):
            raise UsageError(
                f"these modules give {len(asked):,} questions, not {wanted:,}: ask fewer with --train, --validation "
                "and --test"
            )
        sizes = {name: size * len(asked) // wanted for name, size in sizes.items()}
        log.warning(
            "these modules give %s questions, not %s: as many are written, in the same proportions (%s)",
            f"{len(asked):,}", f"{wanted:,}", ", ".join(f"{name} {size:,}" for name, size in sizes.items()),
        )  # fmt: skip
    files = {"documents.jsonl": _lines(map(document, records))}
    order, start = Shuffle(len(asked), mix(0x9D0C, settings.seed)), 0
    for name, size in sizes.items():
        chosen = [asked[order(i)] for i in range(start, start + size)]
        files[f"{name}.jsonl"] = _lines({"id": f"{name}-{i}", **one} for i, one in enumerate(chosen))
        start += size
    return files


def draw(world: World, part: str, n: int, settings: DatasetSettings) -> list[Question]:
    """`n` different questions about one part of the new entities, shuffled. Raises UsageError for too many."""
    n_absent = round(n * settings.absent)
    counts = {hops: round((n - n_absent) * share) for hops, share in SHARES.items()}
    counts[1] = n - n_absent - counts[2] - counts[3]
    found: list[Question] = []
    for hops, wanted in counts.items():
        some = list(_different(world.questions(hops, "new", part, settings.seed), wanted))
        if len(some) < wanted:
            raise UsageError(
                f"{settings.new} new entities give only {len(some):,} of {wanted:,} {part} questions of {hops} hop(s): "
                f"give more of them (--new {settings.new * wanted // max(1, len(some)) + 10}), or ask fewer"
            )
        found += some
    attempts = islice(world.unanswerable("new", part, settings.seed), 100 * n_absent)
    found += _different(attempts, n_absent)
    order = Shuffle(len(found), mix(0xDA7A, settings.seed))
    return [found[order(i)] for i in range(len(found))]


def _different(questions: Iterator[Question], n: int) -> Iterator[Question]:
    """The first `n` with different texts."""
    seen: set[str] = set()
    while len(seen) < n and (question := next(questions, None)) is not None:
        if question.text not in seen:
            seen.add(question.text)
            yield question


def record(question: Question, name: str) -> dict[str, Any]:
    """A question as a line of questions.py; nothing answers one with `hops` 0."""
    if not question.answerable:
        return {"id": name, "question": question.text, "answers": [], "gold": [], "hops": 0}
    return {
        "id": name,
        "question": question.text,
        "answer": question.answer,
        "sentence": question.sentence,
        "gold": list(question.gold_documents),
        "hops": question.hops,
    }


def _document(told: Mapping[str, Any]) -> dict[str, Any]:
    """A document of the world as a line of JSONL."""
    values = document_values(as_document(dict(told)))
    return {**values, "metadata": {**values["metadata"], "kind": ENTITY_KINDS[told["entity"] % len(ENTITY_KINDS)]}}


def _lines(records: Iterator[dict[str, Any]] | map[dict[str, Any]]) -> str:
    return "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in records)


def check_free(directory: Path, files: Mapping[str, str]) -> None:
    """Raises UsageError when one of the files is there with other content."""
    for name, text in files.items():
        path = directory / name
        if path.is_file() and path.read_bytes() != text.encode():
            raise UsageError(
                f"{path} is there with other content: choose another --output, delete it, or call with the settings "
                "that it was made with"
            )


def write(directory: Path, files: Mapping[str, str]) -> None:
    """Write the files, each in one rename. Raises NanochatError when that fails."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            fresh = directory / f".{name}-{os.getpid()}"
            fresh.write_bytes(text.encode())
            os.replace(fresh, directory / name)
    except OSError as error:
        raise NanochatError(f"cannot write to {directory}: {error.strerror or error}") from error


def main(argv: list[str] | None = None) -> None:
    """The command itself."""
    prepare(config.parse(DatasetSettings, argv, prog=PROG))
