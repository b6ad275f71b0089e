"""The manifest: the one file that says what a knowledge base holds. Replacing it is the commit.

Every other file is written once, under a new name, fsynced, and only then named here with its size and SHA-256. So a
process that dies at any moment leaves the old manifest or the new one, and files that no manifest names, which the next
writer deletes. The manifest before stays as `manifest.backup.json`. The file itself is

    {"sha256":"<of the rest>","manifest":{...}}

so that no byte of it can change unnoticed.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from nanochat.errors import NanochatError, UsageError

FORMAT = 1
NAME, BACKUP = "manifest.json", "manifest.backup.json"
UNFINISHED = ("manifest.new", "manifest.spare")
_HEAD, _MIDDLE, _TAIL = b'{"sha256":"', b'","manifest":', b"}\n"

Files = dict[str, tuple[int, str]]  # path inside a directory -> size in bytes, SHA-256


@dataclass(frozen=True)
class Version:
    """A state of the knowledge base that can be searched. `last_row` is the highest row given up to it."""

    number: int
    time: float  # seconds since 1970
    note: str
    documents: int
    passages: int
    last_row: int = -1
    tags: tuple[str, ...] = ()  # filled in by `Manifest.version_list`, not stored


@dataclass(frozen=True)
class SegmentInfo:
    """A directory of documents (store.py) for the rows first_row to last_row."""

    name: str
    documents: int
    passages: int
    first_row: int
    last_row: int
    files: Files


@dataclass(frozen=True)
class GenerationInfo:
    """A directory of indexes (generation.py). It serves versions from `from_version` whose rows end at `last_row`."""

    name: str
    last_row: int
    passages: int
    from_version: int
    files: Files


@dataclass(frozen=True)
class Manifest:
    """`settings` are fixed at creation. `removed` names the file of (row, version that removed it), when there is one.
    `serial` counts commits, also those that make no version (tags, compaction)."""

    settings: Mapping[str, Any]
    serial: int = 0
    next_row: int = 0
    versions: tuple[Version, ...] = ()
    tags: Mapping[str, int] = field(default_factory=dict)
    segments: tuple[SegmentInfo, ...] = ()
    generations: tuple[GenerationInfo, ...] = ()
    removed: tuple[str, int, str] | None = None  # name, size, SHA-256

    @property
    def newest(self) -> Version:
        return self.versions[-1]

    def version_list(self) -> list[Version]:
        """All versions, oldest first, with their tags."""
        names: dict[int, list[str]] = {}
        for tag, number in sorted(self.tags.items()):
            names.setdefault(number, []).append(tag)
        return [replace(version, tags=tuple(names.get(version.number, ()))) for version in self.versions]

    def find(self, version: int | str) -> Version:
        """A version by number or tag. Raises UsageError, naming what there is."""
        if isinstance(version, str) and version not in self.tags:
            known = ", ".join(sorted(self.tags)) or "none so far"
            raise UsageError(f"no tag {version!r} in this knowledge base; its tags: {known}")
        number = self.tags[version] if isinstance(version, str) else version
        for one in self.versions:
            if one.number == number:
                return one
        held = ", ".join(str(one.number) for one in self.versions[-20:])
        gone = number < self.newest.number
        why = "was compacted away" if gone else "does not exist yet"
        raise UsageError(f"version {number} {why}; the versions are {'... ' if len(self.versions) > 20 else ''}{held}")

    def directories(self) -> dict[str, Files]:
        """The files of each directory that it names."""
        return {one.name: one.files for one in self.segments} | {one.name: one.files for one in self.generations}

    def paths(self) -> set[str]:
        """Everything beside the manifest that it needs: directories and files in the knowledge base."""
        return set(self.directories()) | ({self.removed[0]} if self.removed else set())


def read(directory: Path, name: str = NAME) -> Manifest:
    """The manifest of a knowledge base. Raises UsageError for another kind of directory or a newer format, and
    NanochatError when it is damaged or cannot be read."""
    path = directory / name
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        what = "does not exist" if not directory.exists() else f"is no knowledge base: it has no {name}"
        if name == NAME and (directory / BACKUP).exists():
            raise NanochatError(
                f"{path} is gone; {BACKUP} beside it holds the state before the last commit: put a copy in its place"
            ) from None
        raise UsageError(f"{directory} {what}; `nanochat retrieval build` makes one") from None
    except OSError as error:
        raise NanochatError(f"cannot read {path}: {error.strerror}") from error
    try:
        return _parse(data)
    except _NewerFormat as error:
        raise UsageError(
            f"{directory} has format {error}, this nanochat reads formats up to {FORMAT}: install a newer nanochat"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise NanochatError(
            f"{path} is damaged ({error}); restore the directory from a copy, or put {BACKUP}, which holds the state "
            f"before the last commit, in its place"
        ) from None


class _NewerFormat(Exception):
    pass


def _parse(data: bytes) -> Manifest:
    """Raises _NewerFormat, ValueError, KeyError or TypeError."""
    start = len(_HEAD) + 64 + len(_MIDDLE)
    body = data[start : -len(_TAIL)]
    if data != _HEAD + sha256(body).hexdigest().encode() + _MIDDLE + body + _TAIL:
        raise ValueError("its checksum does not match")
    values = json.loads(body)
    if values["format"] > FORMAT:
        raise _NewerFormat(values["format"])
    return Manifest(
        settings=values["settings"],
        serial=values["serial"],
        next_row=values["next_row"],
        versions=tuple(Version(*one) for one in values["versions"]),
        tags=values["tags"],
        segments=tuple(SegmentInfo(**{**one, "files": _files(one["files"])}) for one in values["segments"]),
        generations=tuple(GenerationInfo(**{**one, "files": _files(one["files"])}) for one in values["generations"]),
        removed=tuple(values["removed"]) if values["removed"] else None,
    )


def _files(values: Mapping[str, Any]) -> Files:
    return {path: (size, digest) for path, (size, digest) in values.items()}


def _dump(manifest: Manifest) -> bytes:
    values = {
        "format": FORMAT,
        "settings": dict(manifest.settings),
        "serial": manifest.serial,
        "next_row": manifest.next_row,
        "versions": [[v.number, v.time, v.note, v.documents, v.passages, v.last_row] for v in manifest.versions],
        "tags": dict(manifest.tags),
        "segments": [asdict(one) for one in manifest.segments],
        "generations": [asdict(one) for one in manifest.generations],
        "removed": manifest.removed,
    }
    body = json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode()
    return _HEAD + sha256(body).hexdigest().encode() + _MIDDLE + body + _TAIL


def commit(directory: Path, manifest: Manifest) -> None:
    """Make `manifest` the state of the knowledge base. All that it names must have been fsynced. Raises OSError, and
    then nothing has changed."""
    path, (fresh, spare) = directory / NAME, (directory / name for name in UNFINISHED)
    with open(fresh, "wb") as file:
        file.write(_dump(manifest))
        file.flush()
        os.fsync(file.fileno())
    fsync_directory(directory)  # the names of the files that the manifest is about to promise
    if path.exists():
        spare.unlink(missing_ok=True)
        try:
            os.link(path, spare)
        except OSError:  # a file system without hard links
            spare.write_bytes(path.read_bytes())
        os.replace(spare, directory / BACKUP)
    os.replace(fresh, path)
    fsync_directory(directory)


def fsync_directory(directory: Path) -> None:
    """Make the names in a directory durable; where the file system cannot, that is no error."""
    with contextlib.suppress(OSError), opened(directory) as descriptor:
        os.fsync(descriptor)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
