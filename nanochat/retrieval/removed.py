"""Removed passages: which rows, and which version removed them. A file of its own, written anew when it changes."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from nanochat.errors import NanochatError
from nanochat.retrieval.generation import sha256_file
from nanochat.retrieval.index_files import load_array
from nanochat.retrieval.manifest import Manifest, Version


def load_removed(directory: Path, manifest: Manifest) -> tuple[np.ndarray, np.ndarray]:
    """All removed rows, sorted, and the versions that removed them."""
    if manifest.removed is None:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    path = directory / manifest.removed[0]
    try:
        rows, versions = load_array(path)
        if rows.ndim != 1 or rows.dtype != np.int64:
            raise ValueError(f"an array of {rows.dtype}")
    except (ValueError, TypeError) as error:
        raise NanochatError(f"{path} is damaged ({error}); `verify` tells more") from error
    return rows, versions


def write_removed(path: Path, rows: np.ndarray, versions: np.ndarray) -> tuple[str, int, str]:
    """Write the removed rows, and the versions that removed them; name, size and SHA-256 of the file."""
    with open(path, "wb") as file:
        np.save(file, np.stack([rows, versions]), allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    return path.name, path.stat().st_size, sha256_file(path)


def removed_at(directory: Path, manifest: Manifest, version: Version) -> np.ndarray:
    """The rows, sorted, that are removed at a version."""
    rows, versions = load_removed(directory, manifest)
    return rows[versions <= version.number]
