"""Making and opening knowledge bases: settings, embedders, locks, and races with a writer."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

from nanochat.errors import NanochatError, UsageError
from nanochat.lock import lock_file
from nanochat.retrieval import generation, manifest
from nanochat.retrieval.chunk import check_chunking
from nanochat.retrieval.document import Embedder, Found
from nanochat.retrieval.view import View

EmbedderLike: TypeAlias = Embedder | Callable[..., Any] | str | Path  # whatever `make_embedder` takes
LOCK = "writer.lock"
OPEN_ATTEMPTS = 20  # commits that may overtake an opening reader


def new_settings(
    options: Mapping[str, Any], analyser: Any, embedder: EmbedderLike | None, fused: Mapping[str, Any]
) -> tuple[dict[str, Any], Embedder | None]:
    """What a new knowledge base stores of itself, and its embedder. Raises UsageError for what does not fit."""
    kind = options["kind"]
    kinds = generation.check_kind(kind)
    check_chunking(options["chunk_words"], options["overlap_words"])
    settings = {**options, "created": time.time()}
    if kinds != ("dense",):
        settings["analyser"] = analyser_settings(analyser)
    elif analyser is not None:
        raise UsageError("a dense knowledge base has no analyser")
    made: Embedder | None = None
    if "dense" in kinds:
        made = embedder_of(embedder)
        settings["embedder"] = describe_embedder(made, embedder)
    elif embedder is not None:
        raise UsageError(f"a knowledge base of kind {kind!r} has no embedder; choose dense or hybrid")
    if kind == "hybrid":
        from nanochat.retrieval.hybrid import fuse

        if fused["depth"] < 1:
            raise UsageError(f"depth must be 1 or more, not {fused['depth']}")
        fuse([Found.none()] * len(kinds), 1, fused["fusion"], fused["weights"])  # says now what is wrong with them
        settings["fusion"] = dict(fused)
    return settings, made


def analyser_settings(analyser: Any) -> dict[str, Any]:
    from nanochat.retrieval.analysis import Analyser

    return Analyser.of(analyser).settings()


def describe_embedder(made: Embedder, given: EmbedderLike | None) -> dict[str, Any]:
    """How an embedder is remembered: `spec` makes it again, and is None for one of the user's own."""
    spec = str(given) if isinstance(given, str | Path) else made.name if given is None else None
    return {"name": made.name, "dimension": made.dimension, "spec": spec}


def open_view(path: Path, version: int | str | None, before: View | None, indexes: bool = True) -> View:
    """The newest version or a given one. Commits may delete files while they are being opened: then once more.
    `indexes`: False leaves them alone, damaged as they may be; then nothing is found."""
    failure: Exception | None = None
    serial = -1
    for _ in range(OPEN_ATTEMPTS):
        now = manifest.read(path)
        if failure is not None and now.serial == serial:
            break
        serial = now.serial
        kinds, settings = generation.check_kind(now.settings["kind"]), generation.index_settings(now.settings)
        wanted = now.newest if version is None else now.find(version)
        try:
            return View(path, now if indexes else replace(now, generations=()), wanted, kinds, settings, before)
        except (FileNotFoundError, NanochatError) as error:
            failure = error
    hint = "" if "`verify`" in str(failure) else "; `verify` tells what is missing"
    raise NanochatError(f"{path} is damaged: {failure}{hint}") from failure


def make_directory(path: Path) -> None:
    """The directory of a new knowledge base. Raises UsageError when it holds anything."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise NanochatError(f"cannot make a knowledge base in {path}: {error.strerror}") from error
    check_new(path)


def check_new(path: Path) -> None:
    """Raises UsageError when a directory holds a knowledge base, or anything else."""
    inside = {child.name for child in path.iterdir()} - {LOCK, *manifest.UNFINISHED}
    if manifest.NAME in inside:
        raise UsageError(f"{path} holds a knowledge base already: open it, or choose another directory")
    if inside:
        raise UsageError(f"{path} is not empty: choose another directory for the knowledge base")


def discard_empty(path: Path, directory_too: bool) -> None:
    """Delete a knowledge base that nothing was ever stored in, where nobody writes to it: what a first ingestion that
    failed leaves. Anything else stays."""
    own = {manifest.NAME, manifest.BACKUP, LOCK, *manifest.UNFINISHED}
    with contextlib.suppress(NanochatError, OSError), writer_lock(path, 0):
        inside = {child.name for child in path.iterdir()}
        if inside <= own and manifest.read(path).newest.number == 0:
            for name in inside:
                (path / name).unlink()
            if directory_too:
                path.rmdir()


def copy_files(path: Path, now: manifest.Manifest, target: Path) -> None:
    """Copy what a manifest names, and then the manifest itself."""
    names = [f"{folder}/{name}" for folder, files in now.directories().items() for name in files]
    for name in names + ([now.removed[0]] if now.removed else []):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        with open(path / name, "rb") as source, open(target / name, "wb") as copy:
            shutil.copyfileobj(source, copy, 1 << 20)
            copy.flush()
            os.fsync(copy.fileno())
        manifest.fsync_directory((target / name).parent)
    manifest.commit(target, now)


def embedder_of(embedder: EmbedderLike | None) -> Embedder:
    from nanochat.retrieval.embed import make_embedder

    return make_embedder(embedder)


def check_embedder(path: Path, settings: Any, embedder: EmbedderLike | None) -> Embedder | None:
    """The embedder that was given, made. Raises UsageError when it is not the one the knowledge base was built with."""
    if embedder is None:
        return None
    described = settings.get("embedder")
    if described is None:
        raise UsageError(f"{path} is of kind {settings['kind']!r} and has no embedder")
    made = embedder_of(embedder)
    if (made.name, made.dimension) != (described["name"], described["dimension"]):
        raise UsageError(
            f"{path} was built with the embedder {described['name']!r} (dimension {described['dimension']}), not with "
            f"{made.name!r} (dimension {made.dimension}): leave it out, give that one, or call `reindex`"
        )
    return made


def check_analyser(path: Path, settings: Any, analyser: Any) -> None:
    if analyser is None:
        return
    if (given := analyser_settings(analyser)) != settings.get("analyser"):
        raise UsageError(
            f"{path} was built with the analyser {settings.get('analyser')}, not with {given}: leave it out, or call "
            "`reindex`"
        )


def writer_lock(path: Path, wait: float, to_read: bool = False) -> contextlib.AbstractContextManager[None]:
    """Alone with a knowledge base; `to_read`: not needed where nobody can write."""
    if to_read and not os.access(path, os.W_OK):
        return contextlib.nullcontext()
    return lock_file(
        path / LOCK, wait, "another process", "wait for it to end, and try again", "make the directory writable"
    )


@contextlib.contextmanager
def failures(what: str) -> Iterator[None]:
    """Failures to write as one NanochatError."""
    try:
        yield
    except NanochatError:
        raise
    except (OSError, sqlite3.Error, OverflowError) as error:
        raise NanochatError(f"{what} failed ({error}); nothing was changed, the last version is intact") from error
