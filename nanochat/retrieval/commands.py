"""The command `nanochat retrieval`: knowledge bases from the command line.

    nanochat retrieval build --documents documents.jsonl --output kb
    nanochat retrieval search kb "air on the moon" --k 3

`python -m nanochat.retrieval` is the same; without a subcommand, flags are those of `build`.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from nanochat import config
from nanochat.errors import NanochatError, UsageError
from nanochat.retrieval import display, formats, manifest, verification
from nanochat.retrieval.conditions import parse_conditions
from nanochat.retrieval.document import Document, Hit
from nanochat.retrieval.jsonl import ON_ERROR, file_list
from nanochat.retrieval.knowledge_base import KINDS, KnowledgeBase
from nanochat.retrieval.metrics import DEFAULT_METRICS
from nanochat.retrieval.opening import discard_empty
from nanochat.retrieval.rerank import make_reranker
from nanochat.retrieval.search import AUTO
from nanochat.retrieval.settings import (
    AddSettings,
    BuildSettings,
    CompactSettings,
    DeleteSettings,
    EvaluateSettings,
    FindSettings,
    GetSettings,
    IngestSettings,
    ListSettings,
    ReadSettings,
    ReindexSettings,
    SearchSettings,
    TagSettings,
    UpdateSettings,
)
from nanochat.retrieval.writer import ON_DUPLICATE, Change

PROG = "nanochat retrieval"


class Command(NamedTuple):
    run: Callable[[Any], int | None]
    settings: type
    positional: tuple[str, ...]
    about: str


def main(argv: list[str] | None = None) -> int | None:
    """The command itself; returns an exit code. Raises NanochatError."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return None
    name, rest = ("build", argv) if argv[0].startswith("--") else (argv[0], argv[1:])
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"there is {', '.join(COMMANDS)}"
        raise UsageError(f"{PROG}: unknown subcommand {name!r}; {hint}")
    command = COMMANDS[name]
    settings: Any = config.parse(command.settings, rest, prog=f"{PROG} {name}", positional=command.positional)
    return command.run(settings)


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.about}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "Knowledge bases: documents that can be searched, with versions.",
            "",
            f"usage: {PROG} <subcommand> [KB] [--flag value ...]",
            "",
            *lines,
            "",
            f"{PROG} <subcommand> --help lists its flags; flags alone are those of build.",
        ]
    )


# ---- changing


def build(settings: BuildSettings) -> None:
    _need(settings, "documents", "build --documents FILE --output DIR")
    _need(settings, "output", "build --documents FILE --output DIR")
    _check_choices(settings)
    sources(settings.documents)  # says now what is not there
    path = Path(settings.output)
    is_new, makes_directory = not (path / manifest.NAME).exists(), not path.exists()
    with made(settings) as base:
        try:
            ingest(base, settings, settings.on_duplicate)
        except NanochatError:
            if is_new:
                base.close()
                discard_empty(path, makes_directory)
            raise
        stats = base.stats()
        print(f"{base.path}: {stats['documents']:,} documents in {stats['passages']:,} passages, {base.kind}")


def made(settings: BuildSettings) -> KnowledgeBase:
    """The knowledge base of a build: a new one, or one that is there and has these settings. Raises UsageError."""
    if settings.type not in KINDS:
        raise UsageError(f"--type {settings.type}: choose from {', '.join(KINDS)}")
    embedder = settings.embedder or None
    if (Path(settings.output) / manifest.NAME).exists():
        base = KnowledgeBase.open(settings.output, embedder=embedder)
        different = _differences(base.settings, settings)
        if different:
            base.close()
            raise UsageError(
                f"{settings.output} holds a knowledge base with other settings ({'; '.join(different)}): choose "
                f"another --output, or `{PROG} add {settings.output} FILE` to add to it as it is"
            )
        return base
    has_words = settings.type != "dense" or settings.language != BuildSettings.language
    return KnowledgeBase.create(
        settings.output,
        kind=settings.type,
        embedder=embedder,
        analyser=settings.language if has_words else None,
        chunk_words=settings.chunk_words,
        overlap_words=settings.overlap_words,
        fusion=settings.fusion,
    )


def _differences(saved: dict[str, Any], settings: BuildSettings) -> list[str]:
    wanted: dict[str, Any] = {"chunk_words": settings.chunk_words, "overlap_words": settings.overlap_words}
    found = {name: saved[name] for name in wanted}
    wanted["type"], found["type"] = settings.type, saved["kind"]
    if saved.get("analyser"):
        wanted["language"], found["language"] = settings.language, saved["analyser"]["language"]
    if saved.get("fusion"):
        wanted["fusion"], found["fusion"] = settings.fusion, saved["fusion"]["fusion"]
    return [f"--{name} {found[name]}, not {wanted[name]}" for name in wanted if found[name] != wanted[name]]


def add(settings: AddSettings) -> None:
    _add(settings, "add", settings.on_duplicate)


def update(settings: UpdateSettings) -> None:
    _add(settings, "update", "keep")


def _add(settings: UpdateSettings, name: str, on_duplicate: str) -> None:
    _need(settings, "kb", f"{name} KB FILE ...")
    _need(settings, "documents", f"{name} KB FILE ...")
    _check_choices(settings)
    with KnowledgeBase.open(settings.kb) as base:
        ingest(base, settings, on_duplicate, update=name == "update")


def ingest(base: KnowledgeBase, settings: IngestSettings, on_duplicate: str, update: bool = False) -> Change:
    """Add documents of all sources, with a progress bar on a terminal, and print what it did."""
    files, documents = sources(settings.documents)
    total = Change(base.version)
    try:
        if files:
            total = base.ingest(
                files, settings.on_error, settings.commit_every, sys.stderr.isatty(), update, on_duplicate
            )
        if documents:
            if update:
                total = total + base.update(documents, settings.on_error)
            else:
                total = total + base.add(documents, on_duplicate, settings.on_error)
    except KeyboardInterrupt:
        print(f"\n{base.path} is whole; the same call goes on where it stopped", file=sys.stderr, end="")
        raise
    print(total)
    if not len(base):
        print(f"warning: {base.path} is empty: no document in {', '.join(settings.documents)}", file=sys.stderr)
    return total


def sources(names: Sequence[str]) -> tuple[list[Path], list[Document]]:
    """JSONL and text files, and documents of collections in formats of their own. Of a BEIR folder or one that
    `prepare_rag_dataset` made, only the documents count. Raises UsageError for what is not there."""
    files: list[Path] = []
    documents: list[Document] = []
    for path in map(Path, names):
        of_folder = [path / name for name in ("corpus.jsonl", "documents.jsonl") if (path / name).is_file()]
        folder = path.parent if path.name == "cran.all.1400" else path
        if (folder / "cran.all.1400").is_file():
            documents += formats.cranfield(folder).documents
        else:
            files += of_folder[:1] or file_list(path)
    return files, documents


def delete(settings: DeleteSettings) -> None:
    _need(settings, "kb", "delete KB ID ...")
    _need(settings, "ids", "delete KB ID ...")
    with KnowledgeBase.open(settings.kb) as base:
        print(base.delete(settings.ids))


def tag(settings: TagSettings) -> None:
    _need(settings, "kb", "tag KB NAME")
    _need(settings, "name", "tag KB NAME")
    with KnowledgeBase.open(settings.kb) as base:
        if settings.delete:
            base.untag(settings.name)
            print(f"{settings.name} is no tag any more")
        else:
            base.tag(settings.name, version_of(settings.at))
            number = next(v.number for v in base.versions() if settings.name in v.tags)
            print(f"version {number} is now {settings.name}")


def compact(settings: CompactSettings) -> None:
    _need(settings, "kb", "compact KB")
    with KnowledgeBase.open(settings.kb) as base:
        before = base.stats()["bytes"]
        gone = base.compact(settings.keep)
        kept, after = len(base.versions()), base.stats()["bytes"]
        print(f"{gone:,} versions forgotten, {kept:,} kept; {before / 1e6:,.1f} MB before, {after / 1e6:,.1f} MB now")


def reindex(settings: ReindexSettings) -> None:
    _need(settings, "kb", "reindex KB")
    with KnowledgeBase.open(settings.kb, indexes=False) as base:
        base.reindex(settings.language or None, settings.embedder or None)
        print(f"{base.path}: indexes of {base.stats()['passages']:,} passages built anew")


# ---- reading


def search(settings: SearchSettings) -> None:
    _need(settings, "kb", "search KB QUERY")
    if bool(settings.query) == bool(settings.queries):
        both = ", not both" if settings.query else ""
        raise UsageError(f"give a query or a file of --queries{both}: {PROG} search KB QUERY")
    queries = {"": " ".join(settings.query)} if settings.query else formats.read_queries(settings.queries)
    with _opened(settings) as base:
        find = _finder(base, settings, settings.unique, settings.normalize)
        for name, hits in zip(queries, find(list(queries.values()), settings.k if settings.k is not None else 5)):
            if settings.json:
                values: dict[str, Any] = {"id": name} if name else {}
                values |= {"query": queries[name], "version": base.version, "hits": list(map(display.hit_values, hits))}
                print(json.dumps(values, ensure_ascii=False))
            else:
                if name:
                    print(f"\n{name}: {queries[name]}")
                print(display.hits_table(queries[name], hits, settings.full))


def evaluate(settings: EvaluateSettings) -> None:
    from nanochat.retrieval.evaluate import evaluate as measure

    _need(settings, "kb", "evaluate --kb KB --queries FILE --qrels FILE")
    _need(settings, "queries", "evaluate --kb KB --queries FILE --qrels FILE")
    queries = formats.read_queries(settings.queries)
    qrels = formats.read_qrels(settings.qrels or settings.queries)
    with _opened(settings) as base:
        gold = {document for grades in qrels.values() for document, grade in grades.items() if grade > 0}
        missing = [document for document in gold if document not in base]
        if gold and len(missing) == len(gold):
            raise NanochatError(
                f"none of the {len(gold):,} relevant documents, such as {missing[0]!r}, is in {base.path}: these "
                "judgements are about other documents"
            )
        stats = base.stats()
        find = _finder(base, settings, stats["passages"] > stats["documents"], "")
        with tqdm(total=len(qrels), unit="queries", desc="evaluate", disable=not sys.stderr.isatty()) as bar:

            def one(query: str, k: int) -> list[Hit]:
                bar.update()
                return find([query], k)[0]

            found = measure(
                one, queries, qrels, metrics=settings.metrics or DEFAULT_METRICS, k=settings.k, seed=settings.seed
            )
        if settings.run_file:
            formats.write_trec_run(settings.run_file, found.run)
        about = {"kb": str(base.path), "kind": settings.mode or base.kind, "version": base.version}
        about |= {"reranker": settings.reranker, "missing_documents": len(missing)}
    if settings.json:
        print(json.dumps({**about, **found.record()}, ensure_ascii=False))
        return
    print(found.table())
    if missing:
        print(f"{len(missing):,} of {len(gold):,} relevant documents are not in the knowledge base")


def get(settings: GetSettings) -> None:
    _need(settings, "kb", "get KB ID")
    _need(settings, "id", "get KB ID")
    with KnowledgeBase.open(settings.kb, version=version_of(settings.at)) as base:
        print(json.dumps(display.document_values(base.get(settings.id)), ensure_ascii=False))


def versions(settings: ListSettings) -> None:
    _need(settings, "kb", "versions KB")
    with KnowledgeBase.open(settings.kb) as base:
        found = base.versions()
        if settings.json:
            print(json.dumps(list(map(display.version_values, found)), ensure_ascii=False))
        else:
            print(display.versions_table(found))


def stats(settings: ReadSettings) -> None:
    _need(settings, "kb", "stats KB")
    with _opened(settings) as base:
        values = base.stats()
        print(json.dumps(values, ensure_ascii=False) if settings.json else display.stats_table(values))


def verify(settings: ListSettings) -> int:
    """Exit code 1 when something is damaged."""
    _need(settings, "kb", "verify KB")
    try:
        base = KnowledgeBase.open(settings.kb)
    except UsageError:
        raise
    except Exception as error:  # what damage does to what reads it cannot be foreseen
        problems = verification.problems(Path(settings.kb)) or [f"{error}."]
    else:
        with base:
            problems = base.verify()
    if settings.json:
        print(json.dumps({"kb": settings.kb, "problems": problems}, ensure_ascii=False))
    else:
        print("\n".join(problems) if problems else f"{settings.kb}: every byte is as it was written")
    return 1 if problems else 0


# ---- what several of them need


def _need(settings: Any, name: str, call: str) -> None:
    if not getattr(settings, name):
        raise UsageError(f"--{name} is missing: {PROG} {call}")


def _check_choices(settings: IngestSettings) -> None:
    if settings.on_error not in ON_ERROR:
        raise UsageError(f"--on_error {settings.on_error}: choose from {', '.join(ON_ERROR)}")
    if settings.commit_every is not None and settings.commit_every < 1:
        raise UsageError(f"--commit_every {settings.commit_every}: must be at least 1")
    on_duplicate = getattr(settings, "on_duplicate", ON_DUPLICATE[0])
    if on_duplicate not in ON_DUPLICATE:
        raise UsageError(f"--on_duplicate {on_duplicate}: choose from {', '.join(ON_DUPLICATE)}")


def version_of(text: str) -> int | str | None:
    """What `--at` names: a number, a tag, or None for the newest."""
    return int(text) if text.isdecimal() else text or None


@contextlib.contextmanager
def _opened(settings: ReadSettings) -> Iterator[KnowledgeBase]:
    with KnowledgeBase.open(settings.kb, version=version_of(settings.at), read_only=True) as base:
        yield base


def _finder(
    base: KnowledgeBase, settings: FindSettings, unique: bool, normalize: str
) -> Callable[[Sequence[str], int], list[list[Hit]]]:
    """A search as the flags ask for."""
    if settings.reranker != AUTO:
        make_reranker(settings.reranker)  # an unknown name is an error before the first search
    conditions = parse_conditions(settings.filter)

    def find(queries: Sequence[str], k: int) -> list[list[Hit]]:
        return base.search(
            queries, k, conditions, mode=settings.mode or None, normalize=normalize or False, unique=unique,
            reranker=settings.reranker,
        )  # fmt: skip

    return find


COMMANDS = {
    "build": Command(build, BuildSettings, ("documents",), "make a knowledge base of JSONL documents"),
    "add": Command(add, AddSettings, ("kb", "documents"), "add documents"),
    "update": Command(update, UpdateSettings, ("kb", "documents"), "add documents, replace those with the same id"),
    "delete": Command(delete, DeleteSettings, ("kb", "ids"), "delete documents"),
    "search": Command(search, SearchSettings, ("kb", "query"), "search, in any version"),
    "get": Command(get, GetSettings, ("kb", "id"), "print a whole document"),
    "versions": Command(versions, ListSettings, ("kb",), "list the versions"),
    "tag": Command(tag, TagSettings, ("kb", "name"), "name a version"),
    "compact": Command(compact, CompactSettings, ("kb",), "forget earlier versions"),
    "reindex": Command(reindex, ReindexSettings, ("kb",), "build the indexes anew, for another language or embedder"),
    "verify": Command(verify, ListSettings, ("kb",), "check every byte"),
    "stats": Command(stats, ReadSettings, ("kb",), "counts and sizes"),
    "evaluate": Command(evaluate, EvaluateSettings, ("kb",), "metrics, latency and memory on judged queries"),
}
