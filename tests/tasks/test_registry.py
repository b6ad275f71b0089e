"""Tasks by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nanochat.errors import UsageError
from nanochat.tasks.registry import TASKS, open_mixture, open_task

CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}


@pytest.mark.parametrize(
    ("spec", "name", "n"),
    [
        ("world-qa:known=50,new=40,split=new,part=heldout,limit=9", "world-qa-new-heldout-1hop", 9),
        ("world-qa:known=50,hops=2,limit=10,wordings=2,style=sentence,draw=4", "world-qa-known-train-2hop", 20),
        ("world-unanswerable:known=50,n=6", "world-unanswerable-known-train", 6),
        ("world-chat:known=50,n=7,part=heldout", "world-chat-known-heldout", 7),
    ],
)
def test_world_specs(spec: str, name: str, n: int) -> None:
    task = open_task(spec)
    assert (task.name, len(task)) == (name, n)
    assert task[0]["messages"][0]["role"] == "user"


def test_own_conversations(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text((json.dumps(CHAT) + "\n") * 5)
    assert len(open_task(f"conversations:path={path}")) == 5
    mixture = open_mixture([f"conversations:path={path},weight=2", "world-qa:known=50,limit=10,weight=0.5"], seed=3)
    assert len(mixture) == 15
    assert sum(mixture[i] == CHAT for i in range(15)) == 10


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("gsm8", "unknown task 'gsm8'; did you mean 'gsm8k'"),
        ("zzz", "unknown task 'zzz'; known are: arc, arithmetic, conversations"),
        ("world-qa:hop=2", "unknown option 'hop'; did you mean 'hops'"),
        ("world-qa:hops=two", "hops='two' is not a whole number"),
        ("world-qa:hops=4", "hops must be one of 1, 2, 3"),
        ("conversations", "needs path="),
    ],
)
def test_bad_specs(spec: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        open_task(spec)


def test_bad_mixtures() -> None:
    with pytest.raises(UsageError, match="the list is empty"):
        open_mixture([])
    with pytest.raises(UsageError, match="weight='lots' is not a number"):
        open_mixture(["world-qa:weight=lots"])
    for weight in ("0", "-1", "nan", "inf"):
        with pytest.raises(UsageError, match="the weight must be a number above 0"):
            open_mixture([f"world-qa:weight={weight}"])
    with pytest.raises(UsageError, match="only the mixtures of mid_train and chat_sft have weights"):
        open_task("world-qa:weight=2")


def test_every_option_is_accepted_by_its_task() -> None:
    for name, entry in TASKS.items():
        for key, kind in entry.options.items():
            if kind is int:
                with pytest.raises(UsageError, match=f"{key}='x' is not a whole number"):
                    open_task(f"{name}:{key}=x")
