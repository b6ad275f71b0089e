"""Kills: a dozen at random moments (`python dev/kill_knowledge_base.py` makes as many as you like), and a crash at each
step of each change."""

import importlib.util
import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from nanochat.retrieval.document import Document
from nanochat.retrieval.knowledge_base import KnowledgeBase
from nanochat.retrieval.writer import Writer

SCRIPT = Path(__file__).parents[2] / "dev" / "kill_knowledge_base.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kill_knowledge_base", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("kind", "kills"), [("simple", 8), ("hybrid", 4)])
def test_kills_leave_the_last_or_the_previous_version(
    script: ModuleType, kind: str, kills: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main(["--kind", kind, "--kills", str(kills), "--seed", "1"]) == 0, capsys.readouterr().out
    assert f"{kills} kills" in capsys.readouterr().out


class Crash(BaseException):
    """What stands for a kill: nothing may clean up behind it."""


MOON, SUN, SEA = Document("moon", "moon rock"), Document("sun", "hot star"), Document("sea", "salt water")
CHANGES: dict[str, Callable[[KnowledgeBase], object]] = {
    "add": lambda kb: kb.add([SEA, Document("long", "one two three " * 200)]),
    "update": lambda kb: kb.update([Document("moon", "moon dust")]),
    "delete": lambda kb: kb.delete("moon"),
    "tag": lambda kb: kb.tag("new"),
    "compact": lambda kb: kb.compact(),
    "reindex": lambda kb: kb.reindex(),
}


def state(path: Path) -> tuple[object, ...]:
    """All that a user can see of a knowledge base; it must be whole."""
    with KnowledgeBase.open(path) as kb:
        assert kb.verify() == []
        seen = []
        for version in kb.versions():
            with kb.at(version.number) as old:
                hits = [[hit.document for hit in hits] for hits in old.search(["moon", "star", "salt", "two"], k=50)]
                seen.append((version.number, version.tags, list(old.documents()), hits))
        return tuple(seen)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # nothing cleans up: files stay open
@pytest.mark.parametrize("stride", [9, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("change", CHANGES)
def test_a_crash_at_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, stride: int) -> None:
    """Before and after every call that makes something durable, renames, links or deletes."""
    with KnowledgeBase.create(tmp_path / "kb", kind="simple") as kb:
        kb.add([MOON, SUN])
        kb.update([Document("sun", "cold star")])
        kb.tag("old", 1)
        kb.delete("sun")
    before = state(kb.path)
    shutil.copytree(kb.path, tmp_path / "done")
    with KnowledgeBase.open(tmp_path / "done") as done:
        CHANGES[change](done)
    after = state(tmp_path / "done")
    assert (before == after) == (change == "reindex")
    seen = []
    for step in itertools.count(step=stride):
        place = tmp_path / str(step)
        shutil.copytree(kb.path, place)
        left = [step]

        def stop(real: Callable[..., object], left: list[int] = left) -> Callable[..., object]:
            def call(*arguments: object, **named: object) -> object:
                left[0] -= 1
                if left[0] == -1:
                    raise Crash
                result = real(*arguments, **named)
                left[0] -= 1
                if left[0] == -1:
                    raise Crash
                return result

            return call

        with monkeypatch.context() as patch, KnowledgeBase.open(place) as victim:
            for name in ("fsync", "replace", "link", "unlink", "mkdir", "rmdir"):
                patch.setattr(os, name, stop(getattr(os, name)))
            patch.setattr(Writer, "abandon", lambda self: None)
            try:
                CHANGES[change](victim)
                break
            except Crash:
                pass
        seen.append(state(place))
        assert seen[-1] in (before, after), f"step {step}"
        with KnowledgeBase.open(place) as again:
            if seen[-1] == before:
                CHANGES[change](again)
        assert state(place) == after
        shutil.rmtree(place)
    assert len(seen) * stride > 10
    first = next((i for i, one in enumerate(seen) if one != before), len(seen))
    assert all(one == after for one in seen[first:])  # there is one moment at which the change becomes real
