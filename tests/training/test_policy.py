"""Reinforcement learning end to end, in seconds: it runs through the one loop, resumes bit for bit, says when engine
and loss disagree, and comes back from a collapse."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from policies import evaluations, final_meta, rl_settings, rounds, teach_sums, train_rl
from tiny import assert_identical, copy_run, saved

from nanochat import checkpoint
from nanochat.errors import NanochatError, UsageError
from nanochat.rag import rewards
from nanochat.rag.traces import read_traces
from nanochat.training import play
from nanochat.training.loop import Trainer
from nanochat.training.policy import PolicyStage, telling
from nanochat.training.rollback import PolicyTrainer

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def begun(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of a run with a stage `sums`."""
    root = copy_run(finished, tmp_path_factory.mktemp("begun"), "tokenizer", "base")
    teach_sums(root)
    return root


@pytest.fixture
def root(begun: Path, tmp_path: Path) -> Path:
    return copy_run(begun, tmp_path, "tokenizer", "sums")


def test_levels_open_with_the_run_where_time_is_its_measure(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two levels of one name, which differ in an option: both are measured."""
    monkeypatch.setattr(PolicyTrainer, "share", lambda trainer: trainer.progress.step / 4)
    levels = ("arithmetic:n=300,operations=+", "arithmetic:n=300,operations=-")
    train_rl(root, tasks=levels, curriculum="progress", num_iterations=0, max_minutes=60.0)
    opened = [record["level"] for record in rounds(root)]
    assert opened in ([1, 1, 1, 2], [1, 1, 2, 2])  # the third round opens it, and counts when it had to be drawn again
    assert {f"val_accuracy_arithmetic-train-1x2{n}" for n in ("", "-2")} <= evaluations(root)[-1].keys()


def test_it_runs_and_says_what_happened(root: Path) -> None:
    metrics = train_rl(root, tasks=("arithmetic:n=300", "arithmetic:digits=2,n=300"), curriculum="none", kl=0.1)
    assert metrics["final"] == 1.0
    assert metrics["collapsed"] == 0.0
    assert [record["step"] for record in evaluations(root)] == [0, 4, 6]
    found = rounds(root)
    assert [record["step"] for record in found] == list(range(1, 7))
    for record in found:
        assert 0 <= record["reward"] <= 1
        assert record["reward"] <= record["reward_answer"]
        assert record["entropy"] > 0
        assert record["logprob_gap"] < 1e-4
        assert record["kl"] >= 0
        assert record["dropped"] == 0
    assert found[0]["kl"] < 1e-6
    names = ("val_accuracy_arithmetic-train-1x2", "val_accuracy_arithmetic-train-2x2")
    assert all(0 <= evaluations(root)[-1][name] <= 1 for name in names)
    best = checkpoint.latest(root / "tiny" / "rl" / "best")
    assert best is not None
    assert checkpoint.read_meta(best)["step"] == metrics["best_step"]
    assert json.loads((root / "tiny" / "rl" / "config.json").read_text())["n_samples"] == 4


def test_half_precision_is_watched_too(root: Path) -> None:
    """The engine and the loss round differently: the log-probabilities differ, by far less than ends the run."""
    train_rl(root, dtype="bfloat16", num_iterations=3)
    gaps = [record["logprob_gap"] for record in rounds(root)]
    assert len(gaps) == 3
    assert 1e-5 < max(gaps) < 0.05


@pytest.mark.parametrize("minibatches", [1, 2])
def test_resumed_twice_is_as_uninterrupted(root: Path, tmp_path: Path, minibatches: int) -> None:
    """Two epochs: a checkpoint may fall into the middle of a round."""
    options: dict[str, Any] = {"epochs": 2, "minibatches": minibatches, "save_every": 1, "keep_last": 9}
    whole = copy_run(root, tmp_path / "whole", "tokenizer", "sums")
    train_rl(whole, **options)
    original, stops = Trainer.after_step, [3, 5]

    def after_step(self: Trainer) -> None:
        original(self)
        if stops and self.progress.step == stops[0]:
            stops.pop(0)
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "after_step", after_step)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                train_rl(root, **options)
    train_rl(root, **options)
    assert_identical(saved(root, "rl"), saved(whole, "rl"))
    again, once = rounds(root), rounds(whole)
    for record in (*again, *once):
        for name in ("seconds", "tokens_per_second", "peak_memory_bytes", "time"):
            del record[name]
    assert again == once


def test_a_run_that_collapses_is_rolled_back(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the fourth step on each step ruins the weights."""
    (root / "tiny" / "sums").rename(root / "tiny" / "base")  # goes on learning: a dozen sums, nearly by heart
    few, options = "arithmetic:digits=1,n=12", {"num_iterations": 40, "eval_every": 50, "n_prompts": 12}
    teach_sums(root, 60, few)
    original = PolicyTrainer.step

    def step(self: PolicyTrainer, batches: Any) -> None:
        original(self, batches)
        if self.progress.step > 3:
            with torch.no_grad():
                for p in self.model.parameters():
                    p.add_(torch.randn_like(p))

    with monkeypatch.context() as patch:
        patch.setattr(PolicyTrainer, "step", step)
        metrics = train_rl(root, tasks=(few,), **options)
    assert rounds(root)[0]["reward"] > 0.4
    assert metrics["collapsed"] == 1.0
    steps = [record["step"] for record in rounds(root)]
    assert steps[-1] < 20
    before, after = evaluations(root)[0], final_meta(root)["metrics"]
    assert after["val_reward"] == pytest.approx(before["val_reward"])
    assert metrics["best_step"] == 0.0
    start, end = (saved(root, stage) for stage in ("sums", "rl"))
    weights = [name for name in start if name.startswith("model/")]
    assert all(torch.equal(start[name], end[name]) for name in weights)
    report = json.loads((root / "tiny" / "report.json").read_text())
    (rollback,) = report["stages"]["rl"]["rollbacks"]
    assert (rollback["step"], rollback["to"]) == (steps[-1], 0)
    assert rollback["reason"] in (root / "tiny" / "report.html").read_text()
    best = read_traces(root / "tiny" / "rl" / "best" / "traces.jsonl")  # the answers of the weights that it ends with
    assert read_traces(root / "tiny" / "rl" / "traces.jsonl") == best
    again = train_rl(root, tasks=(few,), **options)
    assert again["collapsed"] == 1.0
    assert [record["step"] for record in rounds(root)] == steps  # nothing was trained on top


def test_a_loss_that_is_no_number_is_a_collapse(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = PolicyStage.loss

    def loss(self: PolicyStage, model: Any, batch: Any) -> torch.Tensor:
        return original(self, model, batch) * (math.nan if self.round >= 4 else 1.0)

    monkeypatch.setattr(PolicyStage, "loss", loss)
    metrics = train_rl(root)
    assert metrics["collapsed"] == 1.0
    assert math.isfinite(metrics["val_reward"])
    assert all(bool(x.isfinite().all()) for x in saved(root, "rl").values())


def test_engine_and_loss_must_agree(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = play.rollouts

    def shifted(*args: Any, **options: Any) -> list[Any]:
        return [one._replace(logprobs=[p - 0.01 for p in one.logprobs]) for one in original(*args, **options)]

    monkeypatch.setattr(play, "rollouts", shifted)
    with pytest.raises(NanochatError, match=r"other log-probabilities than the loss computes: 0\.0100 nats apart"):
        train_rl(root)


def test_what_breaks_in_one_row_is_left_out(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = play.rollouts

    def broken(*args: Any, **options: Any) -> list[Any]:
        found = original(*args, **options)
        found[0] = found[0]._replace(finish_reason="error", error="the tool broke")
        found[-1] = found[-1]._replace(logprobs=[math.nan] * len(found[-1].ids))
        return found

    monkeypatch.setattr(play, "rollouts", broken)
    assert train_rl(root)["final"] == 1.0
    assert {record["dropped"] for record in rounds(root)} == {2 / 16}
    assert {record["errors"] for record in rounds(root)} == {1 / 16}


def test_groups_that_agree_change_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rewards.REWARDS, "answer", lambda sample: 0.5)
    metrics = train_rl(root, reward_gates=("answer",))
    assert {record["flat_groups"] for record in rounds(root)} == {1.0}
    start, end = (saved(root, stage) for stage in ("sums", "rl"))
    for name, weight in start.items():
        if name.startswith("model/"):
            assert torch.equal(weight, end[name]), name
    assert metrics["rounds"] == 6 * 4  # each was drawn again, as often as it may be


def test_rows_that_weigh_nothing_are_left_out_and_change_nothing(root: Path, tmp_path: Path) -> None:
    """With a (negligible) KL term every row has a gradient of its own, and all of them go through the model."""
    other = copy_run(root, tmp_path / "other", "tokenizer", "sums")
    train_rl(root, num_iterations=1)
    train_rl(other, num_iterations=1, kl=1e-12)
    assert 0 < rounds(root)[0]["flat_groups"] < 1
    whole = saved(other, "rl")
    for name, weight in saved(root, "rl").items():
        if name.startswith("model/"):
            torch.testing.assert_close(weight, whole[name], atol=2e-5, rtol=0)


def test_groups_that_say_something_come_first() -> None:
    gains = [0.0, 0.0, 0.5, -0.5, 0.0, 0.0, -0.1, 0.1]
    assert telling(gains, 2, 2) == [2, 3, 6, 7]
    assert telling(gains, 2, 3) == [0, 1, 2, 3, 6, 7]  # filled up with another, in the order of drawing
    assert telling(gains, 2, 4) == list(range(8))
    assert telling(gains, 2, 1) == [2, 3]


def test_more_prompts_are_drawn_than_count(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, kept = [], []
    player, batches = play.Player.play, PolicyStage.batches_of

    def count(self: play.Player, problems: Any, sampling: Any, n: int, streams: Any = None) -> Any:
        if n > 1:
            drawn.append(len(problems))
            assert list(streams) == list(range(12))
        return player(self, problems, sampling, n, streams)

    def keep(self: PolicyStage, rolled: Any, gains: Any) -> Any:
        kept.append([any(gains[i : i + 4]) for i in range(0, len(gains), 4)])
        return batches(self, rolled, gains)

    monkeypatch.setattr(play.Player, "play", count)
    monkeypatch.setattr(PolicyStage, "batches_of", keep)
    train_rl(root, oversample=3)
    assert set(drawn) == {12}
    assert {len(groups) for groups in kept} == {4}
    says = [round(12 * (1 - record["flat_groups"])) for record in rounds(root)]
    assert [sum(groups) for groups in kept] == [min(4, n) for n in says]


def test_a_reward_that_breaks_names_the_sample(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rewards.REWARDS, "answer", lambda sample: math.nan)
    with pytest.raises(NanochatError, match=r"answer gave nan for arithmetic-train-1x2 \(held back\) 0, sample 0"):
        train_rl(root)


def test_weighted_learning_raises_what_is_rewarded(root: Path) -> None:
    """Reward-weighted likelihood of the model's own answers: short ones pay."""
    options = {"advantage": "weighted", "per": "sequence", "n_prompts": 8, "n_samples": 8, "lr_scale": 0.3}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(rewards.REWARDS, "answer", lambda sample: 1.0 if sample.n_tokens <= 2 else 0.0)
        train_rl(root, num_iterations=30, eval_every=0, **options)
    found = [record["reward"] for record in rounds(root)]
    assert sum(found[-5:]) / 5 > sum(found[:5]) / 5 + 0.1


def test_two_processes_share_the_rollouts(root: Path, tmp_path: Path) -> None:
    """Groups are whole on one process; what they learn is what one process learns from all of them."""
    other = copy_run(root, tmp_path / "other", "tokenizer", "sums")
    train_rl(root, num_iterations=2, lr_scale=0.005)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*torchrun, str(HERE / "two_ranks_rl.py"), str(other)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    alone, both = rounds(root), rounds(other)
    for name in ("reward", "entropy", "answer_tokens", "truncated", "loss", "grad_norm"):
        assert [r[name] for r in both] == pytest.approx([r[name] for r in alone], rel=1e-3, abs=1e-5), name
    for a, b in zip(saved(root, "rl").values(), saved(other, "rl").values()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_samples": 1}, "--n_samples 1"),
        ({"temperature": 0.0}, "--temperature 0.0"),
        ({"n_prompts": 0}, "--n_prompts 0"),
        ({"compile": "on"}, "--compile on"),
        ({"num_iterations": 0}, "--num_iterations 0"),
        ({"tool": "search"}, "--tool search"),
        ({"max_calls": -1}, "--max_calls -1"),
        ({"tasks": ()}, "nothing to train on"),
        ({"advantage": "best"}, "--advantage best"),
        ({"reward_weights": "model=1"}, "--reward_model"),
    ],
)
def test_settings_that_make_no_sense(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        rl_settings(tmp_path, **options).check()


def test_settings_that_only_show_later(root: Path) -> None:
    with pytest.raises(UsageError, match="--n_prompts 4: must be a multiple of 1 process"):
        train_rl(root, minibatches=3)
    with pytest.raises(UsageError, match="unknown reward 'anwser'"):
        train_rl(root, reward_weights="anwser=1")
    with pytest.raises(UsageError, match="there is no reward model"):
        train_rl(root, reward_weights="model=1", reward_model=str(root))
