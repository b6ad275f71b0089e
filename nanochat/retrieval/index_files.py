"""What index directories share: files written once and fsynced, hard links to those of an earlier directory, and the
analyser stored beside them.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from nanochat.errors import NanochatError, UsageError
from nanochat.retrieval.analysis import Analyser
from nanochat.retrieval.document import Settings

ANALYSER = "analyser.json"


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


def read_analyser(directory: Path, settings: Settings) -> Analyser:
    """The analyser that the index in `directory` was built with.

    Raises NanochatError where there is no index, UsageError when the settings name another analyser."""
    try:
        stored = Analyser.of(json.loads((directory / ANALYSER).read_text(encoding="utf-8")))
    except (OSError, ValueError, UsageError) as error:
        raise NanochatError(f"no index at {directory}: {ANALYSER} cannot be read ({error})") from error
    wanted = settings.get("analyser")
    if wanted is not None and Analyser.of(wanted) != stored:
        raise UsageError(
            f"{directory} was built with the analyser {stored.settings()}, and the one asked for is "
            f"{Analyser.of(wanted).settings()}: leave it out, or build a new knowledge base"
        )
    return stored
