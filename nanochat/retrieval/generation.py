"""Generations: directories of indexes (`gen-000012/bm25/...`), derived from the documents, never changed once written.

A generation holds all passages up to its last row, also those that later versions removed: so it serves every version
up to its own, and the search leaves out what a version does not see. The newest is always kept, of the older ones as
few as let each version be searched in a generation of at most twice its size. When most of a generation is dead, the
next one drops that, and says from which version on it serves.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from nanochat.errors import NanochatError, UsageError
from nanochat.retrieval.document import Batch, Index, Settings
from nanochat.retrieval.manifest import BACKUP, UNFINISHED, Files, GenerationInfo, Version, fsync_directory, read

INDEXES = {
    "simple": "nanochat.retrieval.simple:SimpleIndex",
    "bm25": "nanochat.retrieval.bm25:BM25Index",
    "dense": "nanochat.retrieval.dense:DenseIndex",
}
KINDS = {"simple": ("simple",), "bm25": ("bm25",), "dense": ("dense",), "hybrid": ("bm25", "dense")}
SMALL = 20_000  # passages: what is searched so fast that no older generation need be kept for less


def index_class(kind: str) -> type[Index]:
    """The class of an index by its kind. Raises UsageError for an unknown kind."""
    if kind not in INDEXES:
        raise UsageError(f"unknown index {kind!r}: choose from {', '.join(INDEXES)}")
    module, name = INDEXES[kind].split(":")
    found: type[Index] = getattr(import_module(module), name)
    return found


def check_kind(kind: str) -> tuple[str, ...]:
    """The indexes of a kind of knowledge base. Raises UsageError for an unknown kind."""
    if kind not in KINDS:
        raise UsageError(f"unknown kind of knowledge base {kind!r}: choose from {', '.join(KINDS)}")
    return KINDS[kind]


def index_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the indexes of a knowledge base with such settings are given."""
    embedder = settings.get("embedder")
    own = {"analyser": settings.get("analyser"), "dimension": embedder["dimension"] if embedder else None}
    return {**settings.get("index", {}), **{name: value for name, value in own.items() if value is not None}}


def write_index(
    kind: str,
    directory: Path,
    settings: Settings,
    batches: Iterable[Batch],
    base: Path | None,
    drop: np.ndarray | None,
) -> None:
    """Write the index of one kind as a directory of its name inside a generation."""
    directory.mkdir(parents=True, exist_ok=True)
    before = base / kind if base is not None else None
    drop = drop if drop is not None and len(drop) and before is not None else None
    index_class(kind).write(directory / kind, settings, batches, before, drop)


class Generation:
    """The indexes of a generation, opened. Raises NanochatError or FileNotFoundError where files are missing."""

    def __init__(self, directory: Path, kinds: Sequence[str], settings: Settings) -> None:
        self.name = directory.name
        self.indexes: dict[str, Index] = {}
        if not directory.is_dir():
            raise FileNotFoundError(directory)
        try:
            for kind in kinds:
                self.indexes[kind] = index_class(kind).open(directory / kind, settings)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for index in self.indexes.values():
            index.close()


# -- which generation ----------------------------------------------------------------------------------------------


def serving(generations: Iterable[GenerationInfo], version: Version) -> GenerationInfo | None:
    """The smallest generation that holds all passages of a version; None when there is none."""
    able = [g for g in generations if g.from_version <= version.number and g.last_row >= version.last_row]
    return min(able, key=lambda g: (g.passages, g.last_row), default=None)


def retained(generations: Sequence[GenerationInfo], versions: Sequence[Version]) -> tuple[GenerationInfo, ...]:
    """The generations to keep, oldest first: the last one, and what older versions need to be searched fast."""
    kept = list(generations[-1:])
    for version in reversed(versions):
        if not version.passages:
            continue
        now = serving(kept, version)
        if now is None or now.passages > max(2 * version.passages, SMALL):
            best = serving(generations, version)
            if best is not None and best not in kept:
                kept.append(best)
    return tuple(g for g in generations if g in kept)


# -- files -------------------------------------------------------------------------------------------------------------


def describe(directory: Path, base: Path | None = None, known: Mapping[str, tuple[int, str]] | None = None) -> Files:
    """Size and SHA-256 of every file in a directory. A file that is a hard link to one of `base`, whose files are
    `known`, is not read again."""
    files: Files = {}
    for path in sorted(directory.rglob("*")):
        if path.is_dir():
            fsync_directory(path)
        elif not _is_lock(path):
            name = path.relative_to(directory).as_posix()
            same = base is not None and known is not None and name in known and _same(path, base / name)
            files[name] = known[name] if same and known is not None else (path.stat().st_size, sha256_file(path))
    fsync_directory(directory)
    return files


def _is_lock(path: Path) -> bool:
    return path.name.startswith(".") and path.name.endswith(".lock")  # tantivy's, empty


def _same(path: Path, other: Path) -> bool:
    try:
        return os.path.samefile(path, other)
    except OSError:
        return False


def sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def problems(directory: Path, files: Files) -> Iterator[str]:
    """What is wrong with the files of a directory, each as a sentence."""
    for name, (size, digest) in files.items():
        path = directory / name if name else directory
        try:
            found = path.stat().st_size
            if found != size:
                yield f"{path} has {found} bytes instead of {size}."
            elif sha256_file(path) != digest:
                yield f"{path} is damaged: its checksum differs from the one it was written with."
        except FileNotFoundError:
            yield f"{path} is missing."
        except OSError as error:
            yield f"{path} cannot be read: {error.strerror}."


def remove(path: Path) -> None:
    """Delete a file or directory; what a reader still adds to it is left to the next writer."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def clean(directory: Path) -> None:
    """Delete what neither the manifest nor its backup names: remains of interrupted writers, and what is outdated."""
    needed = read(directory).paths()
    with contextlib.suppress(NanochatError):
        needed |= read(directory, BACKUP).paths()
    for path in directory.iterdir():
        ours = path.name.startswith(("seg-", "gen-", "removed-")) or path.name in UNFINISHED
        if ours and path.name not in needed:
            remove(path)
