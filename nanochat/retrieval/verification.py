"""Whether a knowledge base is whole, and how large it is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nanochat.errors import NanochatError
from nanochat.retrieval import generation, manifest, staging
from nanochat.retrieval.manifest import Manifest
from nanochat.retrieval.view import View


def problems(path: Path) -> list[str]:
    """What is wrong, as sentences. Every byte of every file that the manifest or its backup names is read."""
    try:
        now = manifest.read(path)
    except NanochatError as error:
        return [f"{error}."]
    found = list(_files(path, now))
    if (path / manifest.BACKUP).exists():
        try:
            backup = manifest.read(path, manifest.BACKUP)
        except NanochatError as error:
            found.append(f"{error}.")
        else:
            found += [problem for problem in _files(path, backup, now) if problem not in found]
    embedder = now.settings.get("embedder")
    if embedder is not None:
        found += staging.problems(path, embedder["name"], embedder["dimension"])
    if not found:
        found += _disagreements(path, now)
    return found


def _files(path: Path, now: Manifest, seen: Manifest | None = None) -> Iterator[str]:
    """What is wrong with the files of a manifest, but for those that another one names too."""
    done = seen.directories() if seen else {}
    for name, files in now.directories().items():
        if name not in done:
            yield from generation.problems(path / name, files)
    if now.removed is not None and (seen is None or seen.removed != now.removed):
        name, size, digest = now.removed
        yield from generation.problems(path, {name: (size, digest)})


def _disagreements(path: Path, now: Manifest) -> Iterator[str]:
    """Whole files that do not fit together: what no crash and no bit can cause, but a wrong copy can."""
    kinds, settings = generation.check_kind(now.settings["kind"]), generation.index_settings(now.settings)
    for version in now.versions:
        if version.passages and now.generations and generation.serving(now.generations, version) is None:
            yield f"No index serves version {version.number}."
    try:
        view = View(path, now, now.newest, kinds, settings)
    except Exception as error:  # whatever damage does to what reads it: this is where it is looked for
        yield f"{path} cannot be opened: {error}."
        return
    with contextlib.closing(view):
        for segment, info in zip(view.segments, now.segments):
            if (segment.rows.shape[1], int(segment.rows[1].sum())) != (info.documents, info.passages):
                yield f"{segment.directory} holds other documents than the manifest says."
        firsts = [np.asarray(segment.rows[0]) for segment in view.segments]
        documents = sum(int(np.count_nonzero(view.visible(rows))) for rows in firsts)
        passages = len(view.all_rows())
        if (documents, passages) != (now.newest.documents, now.newest.passages):
            yield (
                f"Version {now.newest.number} should hold {now.newest.documents} documents in {now.newest.passages} "
                f"passages; found are {documents} in {passages}."
            )


def stats(path: Path, view: View) -> dict[str, Any]:
    """Counts and sizes of a version and of all that is kept, as JSON values."""
    now, version = view.manifest, view.version
    settings = now.settings
    on_disk = {(s.st_dev, s.st_ino): s.st_size for s in (p.stat() for p in path.rglob("*") if p.is_file())}
    return {
        "path": str(path),
        "kind": settings["kind"],
        "version": version.number,
        "versions": len(now.versions),
        "documents": version.documents,
        "passages": version.passages,
        "removed_passages": len(view.removed),
        "segments": len(now.segments),
        "generations": [one.name for one in now.generations],
        "files": sum(map(len, now.directories().values())),
        "bytes": sum(on_disk.values()),
        "staged_bytes": (path / staging.NAME).stat().st_size if (path / staging.NAME).exists() else 0,
        "embedder": settings["embedder"]["name"] if "embedder" in settings else None,
        "analyser": settings.get("analyser"),
        "chunk_words": settings["chunk_words"],
        "overlap_words": settings["overlap_words"],
        "created": settings["created"],
    }
