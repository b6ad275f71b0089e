"""A stage that begins again loses nothing before it has saved something, whenever it is stopped."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny import assert_identical, copy_run, saved, train

from nanochat import checkpoint
from nanochat.errors import NanochatError
from nanochat.training import restart
from nanochat.training.loop import Trainer


def files(directory: Path) -> dict[str, bytes]:
    """What a reader sees in a stage directory, and whatever a new run has left hidden there."""
    paths = (path for path in directory.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


def die(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    def stop(self: Trainer, *_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, method, stop)


@pytest.mark.parametrize("method", ["step", "save"])
def test_stopped_before_its_first_checkpoint_nothing_is_lost(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """All at once: the old model is there to chat with, and the next call finds its log and settings too."""
    directory = copy_run(finished, tmp_path, "tokenizer", "base") / "tiny" / "base"
    train("base", tmp_path)  # done already: only the settings now name this directory
    (directory / "best").mkdir()
    (directory / "best" / "traces.jsonl").write_text("{}\n")
    before = files(directory)
    with monkeypatch.context() as patch:
        die(patch, method)
        for _ in range(2):  # again, over what the first has left
            with pytest.raises(KeyboardInterrupt):
                train("base", tmp_path, resume=False, seed=1)
            assert_identical(saved(tmp_path), saved(finished))
    assert train("base", tmp_path)["final"] == 1.0
    assert files(directory) == before


def test_the_first_checkpoint_replaces_all_that_was_there(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = copy_run(finished, tmp_path, "tokenizer", "base") / "tiny" / "base"
    (directory / "traces.jsonl").write_text("{}\n")
    original = Trainer.step

    def step(self: Trainer, batches: Any) -> None:
        assert checkpoint.steps(directory) == ([9, 10] if self.progress.step < 3 else [3])
        if self.progress.step == 4:
            raise KeyboardInterrupt
        original(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", step)
        with pytest.raises(KeyboardInterrupt):
            train("base", tmp_path, resume=False, seed=1)
    assert {name.split("/")[0] for name in files(directory)} == {"config.json", "log.jsonl", "step_000003"}
    train("base", tmp_path, seed=1)
    assert checkpoint.steps(directory) == [9, 10]
    with pytest.raises(AssertionError):
        assert_identical(saved(tmp_path), saved(finished))


@pytest.mark.parametrize("moved", range(4))
def test_killed_while_it_makes_room(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moved: int
) -> None:
    directory = copy_run(finished, tmp_path, "base") / "tiny" / "base"
    before, rename, calls = files(directory), os.rename, []

    def limited(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) > moved:
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(restart.os, "rename", limited)
        if moved < 3:  # .replaced, config.json, log.jsonl
            with pytest.raises(KeyboardInterrupt):
                restart.begin(directory)
        else:
            restart.begin(directory)
    restart.settle(directory)
    assert {name: data for name, data in files(directory).items() if not name.startswith(".")} == before
    restart.begin(directory)
    restart.settle(directory)
    assert files(directory) == before


def test_a_checkpoint_of_the_same_step_is_told_by_its_checksum(finished: Path, tmp_path: Path) -> None:
    directory = copy_run(finished, tmp_path, "base") / "tiny" / "base"
    restart.begin(directory)
    shutil.rmtree(directory / "step_000010")
    checkpoint.save(directory, 10, {}, {"stage": "base"})
    restart.settle(directory)
    assert checkpoint.steps(directory) == [10]
    assert checkpoint.read_meta(directory / "step_000010")["files"] == {}
    assert not (directory / "log.jsonl").exists()


def test_a_damaged_list_is_named(finished: Path, tmp_path: Path) -> None:
    directory = copy_run(finished, tmp_path, "base") / "tiny" / "base"
    restart.begin(directory)
    (directory / ".replaced" / "checksums.json").write_text("[")
    with pytest.raises(NanochatError, match=r"checksums\.json is damaged .*: move .*\.replaced away"):
        restart.settle(directory)
