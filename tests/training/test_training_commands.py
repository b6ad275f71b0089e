"""The training commands: command line to stage directory, horizons, sources, and errors before anything is trained."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import COMMON, QUESTIONS, SHAPE, WORLD, copy_run, saved, settings, train

from nanochat import checkpoint, cli
from nanochat.errors import NanochatError, UsageError
from nanochat.report import read_log
from nanochat.runtime import Runtime
from nanochat.tasks.registry import open_task
from nanochat.tasks.task import Mixture
from nanochat.tokenizer import Tokenizer
from nanochat.training import commands
from nanochat.training.settings import BaseSettings
from nanochat.training.supervised import ChatSource

ONE = Runtime(torch.device("cpu"), torch.float32)
FOUR = Runtime(torch.device("cpu"), torch.float32, world_size=4)


def flags(**options: Any) -> list[str]:
    return [f"--{name}={value}" for name, value in options.items()]


# ---- horizons


@pytest.mark.parametrize(
    ("options", "runtime", "expected"),
    [
        ({"num_iterations": 7}, ONE, (7, 1)),
        ({"num_iterations": 7, "total_batch_size": 8 * 16 * 3}, ONE, (7, 3)),
        ({"num_iterations": 7, "total_batch_size": 8 * 16 * 8}, FOUR, (7, 2)),
        ({"target_tokens": 1281}, ONE, (11, 1)),  # 128 tokens a step, rounded up
        ({}, ONE, (8, 1)),  # the stage's own 1000 tokens
        ({"max_minutes": 2.0}, ONE, (0, 1)),
        ({"max_minutes": 2.0, "num_iterations": 5}, ONE, (5, 1)),
    ],
)
def test_steps_and_micro_batches(options: dict[str, Any], runtime: Runtime, expected: tuple[int, int]) -> None:
    assert commands.horizon(BaseSettings(**options), 1000, 16, runtime) == expected


def test_a_total_batch_must_be_whole_passes() -> None:
    with pytest.raises(UsageError, match=r"--total_batch_size 100 must be a multiple of 512 = 8 rows x 16 tokens x 4"):
        commands.horizon(BaseSettings(total_batch_size=100), 1000, 16, FOUR)


def test_a_stage_trains_on_its_own_number_of_tokens(finished: Path, tmp_path: Path) -> None:
    copy_run(finished, tmp_path, "tokenizer", "base")
    metrics = train("sft", tmp_path, num_iterations=0, epochs=2.0)
    tokenizer = Tokenizer.load(tmp_path / "tiny/tokenizer")
    part, _ = commands.split_task(open_task(QUESTIONS[0]))
    source = ChatSource(part, tokenizer, 32, 0)
    exact = sum(len(piece.inputs) for i in range(len(part)) if (piece := source.piece(part[i])))
    assert commands.estimate_tokens(source) == pytest.approx(exact)
    assert 2 * exact <= metrics["tokens"] < 2 * exact + 64


# ---- the command line


def test_the_commands_run_one_after_the_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = {"out_dir": tmp_path, "run": "tiny"}
    short = {**COMMON, **place, "num_iterations": 2}
    config = tmp_path / "shape.py"
    config.write_text("".join(f"{name} = {value!r}\n" for name, value in SHAPE.items()))
    cli.run("tok_train", flags(**place, data=WORLD, vocab_size=320))
    cli.run("base_train", [str(config), *flags(**short, data=WORLD)])
    cli.run("mid_train", flags(**short, data=WORLD, tasks=QUESTIONS[0]))
    cli.run("chat_sft", [str(config), *flags(**short, tasks=QUESTIONS[0])])  # the same file: nothing contradicts
    out = capsys.readouterr().out
    for stage in ("base", "mid", "sft"):
        assert f"saved under {tmp_path / 'tiny' / stage}" in out
        assert checkpoint.steps(tmp_path / "tiny" / stage) == [2]
    metas = [checkpoint.read_meta(tmp_path / "tiny" / stage / "step_000002") for stage in ("base", "sft")]
    assert metas[0]["model_config"] == metas[1]["model_config"]
    assert metas[0]["suggestions"] == []
    assert 1 <= len(metas[1]["suggestions"]) <= 4
    assert not torch.equal(saved(tmp_path, "base")["model/embed.weight"], saved(tmp_path, "sft")["model/embed.weight"])


def test_errors_have_their_exit_codes(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy_run(finished, tmp_path, "tokenizer")
    place = {"out_dir": tmp_path, "run": "tiny"}
    calls: list[tuple[str, dict[str, Any], int, str]] = [
        ("base_train", {"out_dir": tmp_path, "run": "nothing"}, 2, "run `nanochat tok_train --run nothing` first"),
        ("base_train", {**place, "pattern": "MMX"}, 2, "unknown block letter 'X'"),
        ("base_train", {**place, "data": tmp_path / "nowhere"}, 2, "no such file or directory"),
        ("mid_train", place, 2, "no such stage in run tiny"),
        ("tok_train", {**place, "vocab_size": 100}, 2, "vocab_size 100 is too small"),
    ]
    (tmp_path / "empty").mkdir()
    calls.append(("base_train", {**place, "data": tmp_path / "empty"}, 2, "empty"))
    for command, options, code, said in calls:
        with pytest.raises(SystemExit) as exit_:
            cli.run(command, flags(**options))
        error = capsys.readouterr().err
        assert (exit_.value.code, said in error) == (code, True), error


def test_a_tokenizer_that_models_rest_on_is_kept(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place: dict[str, Any] = {"out_dir": tmp_path, "run": "tiny", "data": WORLD}
    cli.run("tok_train", flags(**place, vocab_size=300))
    assert f"300 tokens in {tmp_path / 'tiny' / 'tokenizer'}" in capsys.readouterr().err
    cli.run("tok_train", flags(**place, vocab_size=310))  # nothing was trained with the first one
    copy_run(finished, tmp_path, "base")
    before = (tmp_path / "tiny" / "tokenizer" / "bpe.json").read_bytes()
    cli.run("tok_train", flags(**place, vocab_size=310))  # the same again
    with pytest.raises(SystemExit, match="2"):
        cli.run("tok_train", flags(**place, vocab_size=320))
    assert "base of this run were trained with another tokenizer" in capsys.readouterr().err
    assert (tmp_path / "tiny" / "tokenizer" / "bpe.json").read_bytes() == before


# ---- sources


def test_a_stage_can_start_from_a_path_and_from_a_longer_row(finished: Path, tmp_path: Path) -> None:
    copy_run(finished, tmp_path, "tokenizer")
    path = finished / "tiny" / "base" / "step_000010"
    train("sft", tmp_path, source=str(path), sequence_len=48, num_iterations=1)
    meta = checkpoint.read_meta(tmp_path / "tiny/sft/step_000001")
    assert meta["model_config"]["sequence_len"] == 48
    with pytest.raises(UsageError, match="--sequence_len 0: must be at least 1"):
        train("sft", tmp_path, source=str(path), sequence_len=0)


def test_base_can_go_on_from_other_weights(finished: Path, tmp_path: Path) -> None:
    copy_run(finished, tmp_path, "tokenizer", "base")
    (tmp_path / "tiny/base").rename(tmp_path / "tiny/first")
    metrics = train("base", tmp_path, source=str(tmp_path / "tiny/first"), num_iterations=2)
    before = checkpoint.read_meta(tmp_path / "tiny/first/step_000010")["metrics"]["val_bpb"]
    assert metrics["val_bpb"] < before + 0.3


def test_a_damaged_source_says_so(finished: Path, tmp_path: Path) -> None:
    copy_run(finished, tmp_path, "tokenizer", "base")
    file = tmp_path / "tiny/base/step_000010/model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(NanochatError, match=r"model\.safetensors is damaged"):
        train("sft", tmp_path)
    file.write_bytes(data[:-5])
    with pytest.raises(NanochatError, match=r"model\.safetensors is truncated"):
        train("base", tmp_path)


# ---- tasks


def test_every_fiftieth_conversation_is_held_back() -> None:
    task = open_task(QUESTIONS[0])
    train_part, val_part = commands.split_task(task, every=10)
    held = [val_part[i]["messages"] for i in range(len(val_part))]
    assert held == [task[i]["messages"] for i in range(0, 38, 10)]
    rest = [train_part[i]["messages"] for i in range(len(train_part))]
    assert rest == [task[i]["messages"] for i in range(38) if i % 10]
    assert train_part.evaluate(train_part[0], str(train_part[0]["answer"]))
    with pytest.raises(UsageError, match="has 1 conversation"):
        commands.split_task(open_task("world-qa:seed=0,known=10,limit=1"))


def test_several_tasks_are_mixed() -> None:
    mixed = commands.open_tasks(("world-qa:seed=0,known=10,limit=6", "world-chat:seed=0,known=10,n=4"))
    assert len(mixed) == 10
    assert len(commands.open_tasks(QUESTIONS)) == 38


def test_weights_are_passes_and_nothing_held_back_is_trained_on() -> None:
    """The share of a task is its weight times its size; naming it twice is a weight of 2."""
    questions, chats = "world-qa:seed=0,known=10,limit=30", "world-chat:seed=0,known=10,n=40"
    mixed = commands.open_tasks((f"{questions},weight=3", f"{chats},weight=0.5"))
    assert isinstance(mixed, Mixture)
    places = Counter(mixed.locate(i) for i in range(len(mixed)))
    assert Counter(k for k, _ in places) == {0: 30, 1: 20}
    assert {n for (k, _), n in places.items() if k == 0} == {3}
    twice = commands.open_tasks((questions, chats, questions))
    assert isinstance(twice, Mixture)
    assert len(twice) == 2 * 30 + 40
    train_part, val_part = commands.split_task(mixed, every=10)
    held = [json.dumps(val_part[i]["messages"]) for i in range(len(val_part))]
    assert 11 >= len(held) == len(set(held)) > 1
    shown = Counter(json.dumps(train_part[i]["messages"]) for i in range(len(train_part)))
    assert not shown.keys() & set(held)
    assert max(shown.values()) == 3
    plain = commands.open_tasks((questions, chats))
    assert isinstance(plain, Mixture)
    assert [len(part) for part in commands.split_task(plain, every=10)] == [63, 7]
    alone = commands.open_tasks((f"{questions},weight=0.5",))
    assert len(alone) == 15
    with pytest.raises(UsageError, match="has 1 conversation"):
        commands.split_task(commands.open_tasks(("world-qa:seed=0,known=10,limit=1,weight=9",)))


def test_training_goes_through_a_task_as_often_as_its_weight_says(finished: Path, tmp_path: Path) -> None:
    steps = {}
    for weight in (1, 3):
        root = copy_run(finished, tmp_path / str(weight), "tokenizer", "base")
        tasks = (f"{QUESTIONS[0]},weight={weight}",)
        train("sft", root, tasks=tasks, num_iterations=0, eval_every=0, save_every=0)
        steps[weight] = read_log(root / "tiny" / "sft" / "log.jsonl")[-1]["step"]
    assert steps[3] == pytest.approx(3 * steps[1], rel=0.1)  # more is held back


def test_settings_are_checked_before_anything_is_read(tmp_path: Path) -> None:
    for stage in ("base", "mid", "sft"):
        with pytest.raises(UsageError, match="--warmup 2"):
            getattr(commands, f"train_{stage}")(settings(stage, tmp_path, warmup=2.0))
