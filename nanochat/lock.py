"""Locks between processes (flock): one writer a directory. The kernel frees the lock of a killed process."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from nanochat.errors import NanochatError

log = logging.getLogger("nanochat")


@contextlib.contextmanager
def lock_file(
    path: Path,
    wait: float = 0.0,
    who: str = "another run",
    if_busy: str = "wait for it, stop it, or choose another --run",
    if_denied: str = "choose another --out_dir",
) -> Iterator[None]:
    """Hold `path` (created with its directory), which then names the owner. Raises NanochatError when another process
    (`who`) still holds it after `wait` seconds, or when it cannot be written; `if_busy` and `if_denied` say what to do.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+")  # noqa: SIM115 - held while the lock is
    except OSError as error:
        raise NanochatError(f"cannot write to {path.parent}: {error.strerror}; {if_denied}") from error
    with file:
        deadline = time.monotonic() + wait
        while not _take(file.fileno()):
            if time.monotonic() >= deadline:
                file.seek(0)
                owner = file.read().strip() or "unknown process"
                raise NanochatError(f"{who} is writing to {path.parent} ({owner}); {if_busy}")
            time.sleep(0.02)
        owner = f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n"
        with contextlib.suppress(OSError):  # the lock is what counts: on a full disk it names nobody
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), owner.encode())
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                os.ftruncate(file.fileno(), 0)


@contextlib.contextmanager
def locked_directory(directory: Path) -> Iterator[bool]:
    """Lock the directory itself, without a file in it; yields False when another process holds it."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        yield _take(descriptor)
    finally:
        os.close(descriptor)


def _take(descriptor: int) -> bool:
    """Lock an open file without waiting; True also where the file system has no locks, which is said once."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        _say_no_locks(str(error))
    return True


@cache
def _say_no_locks(why: str) -> None:
    log.warning("this file system has no locks (%s): two runs writing one directory will not be noticed", why)
