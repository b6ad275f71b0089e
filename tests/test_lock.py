"""Locks between processes: who holds one is said, and a full disk keeps nobody from taking it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from nanochat import lock
from nanochat.errors import NanochatError


def test_the_owner_is_named_while_it_writes(tmp_path: Path) -> None:
    path = tmp_path / "there" / ".lock"
    with lock.lock_file(path):
        assert path.read_text().startswith(f"process {os.getpid()} on ")
        with (
            pytest.raises(NanochatError, match=rf"another run is writing to .*\(process {os.getpid()} .*wait for it"),
            lock.lock_file(path),
        ):
            pass
    assert path.read_text() == ""
    with lock.lock_file(path):
        assert len(path.read_text().splitlines()) == 1


def test_a_full_disk_does_not_stand_in_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What frees space, compaction or deletion, needs the lock too."""

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(lock.os, "write", full)
        with (
            lock.lock_file(tmp_path / ".lock"),
            pytest.raises(NanochatError, match="unknown process"),
            lock.lock_file(tmp_path / ".lock"),
        ):
            pass
    with lock.lock_file(tmp_path / ".lock"):
        pass
