"""--no-resume: a stage begins again, and what it replaces stays until the new run has saved a checkpoint of its own.

Old checkpoints keep their place, so a chat goes on with them; log, settings and whatever else lies in the stage
directory step aside into `.replaced/`. `settle` ends it one way or the other, also after a kill at any moment.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from nanochat import checkpoint
from nanochat.errors import NanochatError

_ASIDE = ".replaced"
_CHECKSUMS = "checksums.json"  # of the checkpoints to be replaced


def begin(stage_dir: Path) -> None:
    """Make room for a run from the start. Raises NanochatError when nothing can be written there."""
    settle(stage_dir)
    old = [_checksum(stage_dir, step) for step in checkpoint.steps(stage_dir)]
    if not old:
        return
    aside = stage_dir / _ASIDE
    with _failures(stage_dir):
        shutil.rmtree(stage_dir / f"{_ASIDE}-new", ignore_errors=True)
        new = stage_dir / f"{_ASIDE}-new"
        new.mkdir()
        (new / _CHECKSUMS).write_text(json.dumps(old))
        os.rename(new, aside)
        for path in _others(stage_dir):
            os.rename(path, aside / path.name)


def settle(stage_dir: Path) -> None:
    """After a save, and when the stage starts: with a new checkpoint there the old ones go, without one all is put
    back. Does nothing in a directory where no run began again."""
    aside = stage_dir / _ASIDE
    if not aside.is_dir():
        return
    with _failures(stage_dir):
        try:
            old = set(json.loads((aside / _CHECKSUMS).read_text()))
        except (OSError, ValueError) as error:
            raise NanochatError(f"{aside / _CHECKSUMS} is damaged ({error}): move {aside} away") from None
        gone = [step for step in checkpoint.steps(stage_dir) if _checksum(stage_dir, step) in old]
        if len(gone) < len(checkpoint.steps(stage_dir)):
            for step in gone:
                checkpoint.delete(stage_dir / f"step_{step:06d}")
            shutil.rmtree(aside)
            return
        for path in _others(aside):
            _remove(stage_dir / path.name)
            os.rename(path, stage_dir / path.name)
        shutil.rmtree(aside)


def _checksum(stage_dir: Path, step: int) -> str | None:
    """What tells a checkpoint from one of the same step; None for a damaged one, which can only be an old one."""
    try:
        return checkpoint.read_meta(stage_dir / f"step_{step:06d}", upgrade=False).get("checksum")
    except NanochatError:
        return None


def _others(directory: Path) -> list[Path]:
    """All that is neither a checkpoint nor hidden nor the list of checksums."""
    hidden = (".", "step_", _CHECKSUMS)
    return sorted(path for path in directory.iterdir() if not path.name.startswith(hidden))


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _failures(stage_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise NanochatError(f"cannot write to {stage_dir}: {error}. Checkpoints are intact") from error
