"""What index directories share: files written once and fsynced, hard links to those of an earlier directory, and, for
indexes of words, `index.json`, which says what the directory holds and which analyser made its terms.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from nanochat.errors import NanochatError, UsageError
from nanochat.retrieval.analysis import Analyser
from nanochat.retrieval.document import Settings

HEADER = "index.json"


def make_directory(directory: Path) -> None:
    """Make `directory`, which must not exist."""
    try:
        directory.mkdir(parents=True)
    except FileExistsError:
        raise UsageError(f"{directory} exists already: an index is written once, into a new directory") from None


def fsync(path: Path) -> None:
    """Wait until the disk has a file, or the names in a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def link(source: Path, target: Path) -> None:
    """Give a file that never changes another name: a hard link, or a copy where links do not work."""
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:  # another file system, one without links, or too many of them
        copy(source, target)


def copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
    fsync(target)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, sort_keys=True), encoding="utf-8")
    fsync(path)


def write_header(directory: Path, kind: str, format: int, analyser: Analyser, **more: Any) -> None:
    """The last file of an index; then wait until the disk has all their names."""
    write_json(directory / HEADER, {"kind": kind, "format": format, "analyser": analyser.settings(), **more})
    fsync(directory)


def read_header(directory: Path, kind: str, format: int, settings: Settings) -> tuple[Analyser, dict[str, Any]]:
    """The analyser that an index was built with, and its whole header.

    Raises NanochatError where there is no index of this kind and format, UsageError when the settings name another
    analyser."""
    try:
        header = json.loads((directory / HEADER).read_text(encoding="utf-8"))
        found, version, stored = header["kind"], header["format"], Analyser.of(header["analyser"])
    except (OSError, ValueError, KeyError, TypeError, UsageError) as error:
        raise NanochatError(f"no index at {directory}: {HEADER} cannot be read ({error})") from error
    if (found, version) != (kind, format):
        raise NanochatError(
            f"{directory} holds an index of kind {found}, format {version}; expected {kind}, format {format}: "
            "update the program, or build the index anew"
        )
    wanted = settings.get("analyser")
    if wanted is not None and Analyser.of(wanted) != stored:
        raise UsageError(
            f"{directory} was built with the analyser {stored.settings()}, and the one asked for is "
            f"{Analyser.of(wanted).settings()}: leave it out, or build a new knowledge base"
        )
    return stored, header


def load_array(path: Path, mapped: bool = False) -> np.ndarray:
    """An .npy file, read or mapped. Raises ValueError for one that is damaged, OSError for one that cannot be read."""
    try:
        if mapped:  # np.load would take zip files and pickles too
            return np.asarray(np.lib.format.open_memmap(path, mode="r"))
        return np.asarray(np.load(path, allow_pickle=False))
    except OSError:
        raise
    except Exception as error:  # numpy reads the header as Python: a wrong bit there can raise anything
        raise ValueError(f"{path.name} is no array: {error}") from error
