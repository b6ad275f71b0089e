"""The loop: it learns, it resumes bit for bit from whatever stopped it, and it refuses what cannot go on."""

import errno
import json
import math
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import STAGES, assert_identical, copy_run, saved, train

from nanochat import checkpoint
from nanochat.data.batches import IGNORED
from nanochat.errors import NanochatError, UsageError
from nanochat.report import read_log
from nanochat.tokenizer import Tokenizer
from nanochat.training.loop import Trainer


def stop_at_step(monkeypatch: pytest.MonkeyPatch, step: int, inside: bool) -> None:
    """Ctrl-C twice, in the middle of a step or right behind it."""
    name = "update" if inside else "after_step"
    original = getattr(Trainer, name)

    def interrupted(self: Trainer, *args: Any) -> Any:
        if self.progress.step == step:
            raise KeyboardInterrupt
        return original(self, *args)

    monkeypatch.setattr(Trainer, name, interrupted)


# ---- it learns


def test_the_loss_falls_and_is_logged(finished: Path) -> None:
    directory = finished / "tiny" / "base"
    records = read_log(directory / "log.jsonl")
    losses = [r["loss"] for r in records if "loss" in r]
    assert len(losses) == 10
    assert losses[0] == pytest.approx(math.log(320), abs=0.1)
    assert losses[-1] < losses[0] - 0.5
    evaluations = [r for r in records if "val_bpb" in r]
    assert [r["step"] for r in evaluations] == [4, 8, 10]
    assert evaluations[-1]["val_bpb"] < evaluations[0]["val_bpb"]
    for key in ("grad_norm", "lr_factor", "tokens_per_second", "peak_memory_bytes", "tokens", "time"):
        assert all(r[key] >= 0 for r in records if "loss" in r), key
    assert json.loads((directory / "config.json").read_text())["num_iterations"] == 10


def test_the_last_checkpoint_says_what_came_of_it(finished: Path) -> None:
    for stage in STAGES:
        path = checkpoint.latest(finished / "tiny" / stage)
        assert path is not None
        meta = checkpoint.read_meta(path)
        assert (meta["stage"], meta["step"], meta["n_steps"], meta["metrics"]["final"]) == (stage, 10, 10, 1.0)
        assert meta["metrics"]["tokens"] == 10 * 2 * meta["model_config"]["sequence_len"]
        assert ("val_bpb" in meta["metrics"]) == (stage in ("base", "mid"))
        assert ("val_chat_loss" in meta["metrics"]) == (stage != "base")
        assert any(name.endswith("_padded_share") for name in meta["metrics"])
        assert len(checkpoint.steps(finished / "tiny" / stage)) == 2  # keep_last


def test_the_same_settings_give_the_same_weights(finished: Path, tmp_path: Path) -> None:
    copy_run(finished, tmp_path, "tokenizer")
    train("base", tmp_path)
    assert_identical(saved(tmp_path), saved(finished))
    train("base", tmp_path, resume=False, seed=1)
    assert not torch.equal(saved(tmp_path)["model/head.weight"], saved(finished)["model/head.weight"])


# ---- it resumes


@pytest.mark.parametrize("inside", [True, False], ids=["inside a step", "after a step"])
@pytest.mark.parametrize("stage", STAGES)
def test_an_interrupted_run_ends_with_the_same_bits(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, inside: bool
) -> None:
    copy_run(finished, tmp_path, "tokenizer", *(["base"] if stage != "base" else []))
    for step in sorted(random.Random(f"{stage}{inside}").sample(range(1, 10), 2)):
        with monkeypatch.context() as patch:
            stop_at_step(patch, step, inside)
            with pytest.raises(KeyboardInterrupt):
                train(stage, tmp_path)
    train(stage, tmp_path)
    assert_identical(saved(tmp_path, stage), saved(finished, stage))
    steps = [r["step"] for r in read_log(tmp_path / "tiny" / stage / "log.jsonl") if "loss" in r]
    assert steps == list(range(1, 11))  # each once


def test_ctrl_c_ends_the_step_saves_and_goes_on(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_run(finished, tmp_path, "tokenizer")
    original = Trainer.update

    def interrupt(self: Trainer, micro: list[Any]) -> float:
        if self.progress.step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, micro)

    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "update", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train("base", tmp_path)
    assert signal.getsignal(signal.SIGINT) is before
    assert checkpoint.steps(tmp_path / "tiny" / "base")[-1] == 5
    train("base", tmp_path)
    assert_identical(saved(tmp_path), saved(finished))


def test_a_finished_run_is_not_trained_again(finished: Path, tmp_path: Path) -> None:
    copy_run(finished, tmp_path, "tokenizer", "base")
    before = saved(tmp_path)
    metrics = train("base", tmp_path)
    assert metrics["final"] == 1.0
    assert_identical(saved(tmp_path), before)


def test_a_timed_run_can_be_made_longer(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And its end is saved, although a checkpoint that was final lies there."""
    copy_run(finished, tmp_path, "tokenizer")
    ticks = iter(range(10_000))
    monkeypatch.setattr("nanochat.training.loop.time.perf_counter", lambda: float(next(ticks)))  # a step takes 1 s
    timed: dict[str, Any] = {"num_iterations": 0, "eval_every": 0, "save_every": 0}
    train("base", tmp_path, max_minutes=0.1, **timed)
    assert checkpoint.steps(tmp_path / "tiny" / "base") == [6]
    metrics = train("base", tmp_path, max_minutes=0.2, **timed)
    assert checkpoint.steps(tmp_path / "tiny" / "base")[-1] == 12
    assert metrics["train_seconds"] == 12


def test_no_resume_starts_again(finished: Path, tmp_path: Path) -> None:
    copy_run(finished, tmp_path, "tokenizer", "base")
    train("base", tmp_path, resume=False, num_iterations=4)
    assert checkpoint.steps(tmp_path / "tiny" / "base") == [3, 4]
    assert [r["step"] for r in read_log(tmp_path / "tiny" / "base" / "log.jsonl") if "loss" in r] == [1, 2, 3, 4]


def test_a_torn_last_line_of_the_log_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_log(path) == [{"step": 1, "loss": 2.0}]


# ---- it refuses


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_iterations": 12}, "steps 10 there, 12 here"),
        ({"d_model": 48}, "d_model 32 there, 48 here"),
        ({"sequence_len": 16}, "sequence_len 32 there, 16 here"),
        ({"pattern": "T M2"}, "pattern M2 T there, T M2 here"),
        ({"n_lanes": 4}, "--n_lanes 4: the checkpoint was written with 8"),
        ({"data": "world:seed=1,known=10,wordings=4"}, "was reading world:seed=0.*this run reads world:seed=1"),
    ],
    ids=str,
)
def test_resuming_with_other_settings_says_which(
    finished: Path, tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    copy_run(finished, tmp_path, "tokenizer", "base")
    before = (tmp_path / "tiny/base/config.json").read_bytes(), (tmp_path / "tiny/base/log.jsonl").read_bytes()
    with pytest.raises(UsageError, match=said):
        train("base", tmp_path, **options)
    assert before == (
        (tmp_path / "tiny/base/config.json").read_bytes(),
        (tmp_path / "tiny/base/log.jsonl").read_bytes(),
    )
    assert_identical(saved(tmp_path), saved(finished))


def test_resuming_with_another_tokenizer_or_other_tasks(finished: Path, tmp_path: Path) -> None:
    copy_run(finished, tmp_path, "tokenizer", "base", "mid")
    with pytest.raises(UsageError, match="trained on chat and text, this run on chat"):
        train("mid", tmp_path, data="")
    with pytest.raises(UsageError, match=r"was reading world-qa.*this run reads world-qa"):
        train("mid", tmp_path, tasks=("world-qa:seed=0,known=10,limit=30",))
    with pytest.raises(UsageError, match=r"order 0.*order 3"):
        train("mid", tmp_path, seed=3)
    text = (tmp_path / "tiny/tokenizer/bpe.json").read_text()
    Tokenizer.train(["another text altogether " * 50], 300).save(tmp_path / "tiny/tokenizer")
    with pytest.raises(UsageError, match=r"tokenizer .* there, .* here"):
        train("base", tmp_path)
    with pytest.raises(UsageError, match=r"is not the one that .* was trained with"):
        train("mid", tmp_path)
    (tmp_path / "tiny/tokenizer/bpe.json").write_text(text)
    assert train("mid", tmp_path)["final"] == 1.0


def test_a_stage_whose_source_was_trained_again_is_stale(finished: Path, tmp_path: Path) -> None:
    """Without this, `mid_train` after a new base would find its old checkpoint and say that all is done."""
    copy_run(finished, tmp_path, "tokenizer", "base", "sft")
    train("base", tmp_path, resume=False, seed=1)
    with pytest.raises(UsageError, match=r"source weights \w{12} there, \w{12} here.*--no-resume"):
        train("sft", tmp_path)
    train("sft", tmp_path, resume=False)


def test_two_runs_cannot_write_one_directory(finished: Path, tmp_path: Path) -> None:
    copy_run(finished, tmp_path, "tokenizer")
    with checkpoint.lock(tmp_path / "tiny" / "base"), pytest.raises(NanochatError, match="another run is writing to"):
        train("base", tmp_path)
    assert train("base", tmp_path, num_iterations=1)["final"] == 1.0


# ---- it guards


def test_nan_weights_stop_the_run_and_leave_the_last_good_checkpoint(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_run(finished, tmp_path, "tokenizer")
    original = Trainer.update

    def poison(self: Trainer, micro: list[Any]) -> float:
        norm = original(self, micro)
        if self.progress.step == 7:
            with torch.no_grad():
                next(self.model.parameters()).fill_(math.nan)
        return norm

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "update", poison)
        with pytest.raises(
            NanochatError, match=r"the loss is nan at step 8, micro-batch 0 of 1.*begins '.*step_000006"
        ) as error:
            train("base", tmp_path)
    assert "<|bos|>" in str(error.value)  # the text of the batch
    assert checkpoint.steps(tmp_path / "tiny" / "base") == [3, 6]
    train("base", tmp_path)
    assert_identical(saved(tmp_path), saved(finished))


def test_an_infinite_gradient_stops_the_run(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy_run(finished, tmp_path, "tokenizer")
    original = Trainer.update

    def poison(self: Trainer, micro: list[Any]) -> float:
        gradient = next(self.model.parameters()).grad
        assert gradient is not None
        gradient.view(-1)[0] = math.inf
        return original(self, micro)

    monkeypatch.setattr(Trainer, "update", poison)
    with pytest.raises(NanochatError, match=r"the gradient's norm is (inf|nan) at step 0.*the source of this stage"):
        train("base", tmp_path)


def test_a_full_disk_is_one_clear_error_and_costs_no_checkpoint(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_run(finished, tmp_path, "tokenizer")
    real, calls = checkpoint.save_file, []

    def full(tensors: Any, path: Path) -> None:
        calls.append(path)
        if len(calls) > 4:  # the second checkpoint's second file
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        with pytest.raises(
            NanochatError, match=r"could not save checkpoint .*No space left.*Older checkpoints are intact"
        ):
            train("base", tmp_path)
    directory = tmp_path / "tiny" / "base"
    assert checkpoint.steps(directory) == [3]
    assert not [p for p in directory.iterdir() if p.name.startswith(".new")]
    train("base", tmp_path)
    assert_identical(saved(tmp_path), saved(finished))


def test_a_log_that_cannot_be_written_is_an_error(finished: Path, tmp_path: Path) -> None:
    copy_run(finished, tmp_path, "tokenizer")
    (tmp_path / "tiny/base/log.jsonl").mkdir(parents=True)
    with pytest.raises(NanochatError, match=r"could not write .*log\.jsonl"):
        train("base", tmp_path)


# ---- steps


def first_gradients(
    monkeypatch: pytest.MonkeyPatch, root: Path, **options: Any
) -> tuple[dict[str, torch.Tensor], list[Any]]:
    """The gradients (before clipping) and micro-batches of the first step."""
    found: dict[str, torch.Tensor] = {}
    batches: list[Any] = []

    def catch(self: Trainer, micro: list[Any]) -> float:
        found.update({name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None})
        batches.extend(micro)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "update", catch)
        with pytest.raises(KeyboardInterrupt):
            train("sft", root, resume=False, **options)
    return found, batches


def test_accumulation_equals_one_large_batch(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the micro-batches have different numbers of targets: conversations are mostly masked."""
    copy_run(finished, tmp_path, "tokenizer", "base")
    once, one = first_gradients(monkeypatch, tmp_path, device_batch_size=4)
    parts, two = first_gradients(monkeypatch, tmp_path, device_batch_size=2, total_batch_size=4 * 32)
    assert (len(one), len(two)) == (1, 2)
    valid = [int((batch.targets != IGNORED).sum()) for batch in two]
    assert valid[0] != valid[1]
    assert torch.equal(one[0].inputs, torch.cat([batch.inputs for batch in two]))
    for name in once:
        torch.testing.assert_close(parts[name], once[name], rtol=1e-4, atol=1e-6)


def test_recomputing_activations_changes_no_gradient(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_run(finished, tmp_path, "tokenizer", "base")
    plain, _ = first_gradients(monkeypatch, tmp_path)
    again, _ = first_gradients(monkeypatch, tmp_path, checkpointing=True)
    assert plain.keys() == again.keys()
    for name in plain:
        assert torch.equal(plain[name], again[name]), name


def test_clipping_bounds_the_step(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy_run(finished, tmp_path, "tokenizer")
    norms: list[float] = []
    original = torch.nn.utils.clip_grad_norm_

    def measure(parameters: Any, largest: float) -> torch.Tensor:
        norm = original(parameters, largest)
        norms.append(float(torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in parameters]))))
        return norm

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", measure)
    train("base", tmp_path, clip=0.01, num_iterations=3)
    assert max(norms) == pytest.approx(0.01, rel=1e-3)
    norms.clear()
    train("base", tmp_path, clip=0, num_iterations=3, resume=False)
    logged = [r["grad_norm"] for r in read_log(tmp_path / "tiny/base/log.jsonl") if "loss" in r]
    assert norms == pytest.approx(logged, rel=1e-3)
    assert min(norms) > 0.01


def test_fp16_scales_the_loss_and_survives_an_overflow(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scaler starts at 65536: the first steps may overflow. Such a step changes no weight of either optimizer."""
    copy_run(finished, tmp_path, "tokenizer")
    scales: list[float] = []
    original = Trainer.update

    def watch(self: Trainer, micro: list[Any]) -> float:
        assert self.scaler.is_enabled()
        if self.progress.step == 1:  # an overflow in one matrix of Muon's
            gradient = self.model.get_parameter("blocks.1.mixer.qkv.weight").grad
            assert gradient is not None
            gradient[0, 0] = math.inf
        before = {name: p.clone() for name, p in self.model.named_parameters()}
        norm = original(self, micro)
        scales.append(self.scaler.get_scale())
        changed = [name for name, p in self.model.named_parameters() if not torch.equal(p, before[name])]
        assert bool(changed) == math.isfinite(norm)
        assert all(torch.isfinite(p).all() for p in self.model.parameters())
        return norm

    monkeypatch.setattr(Trainer, "update", watch)
    train("base", tmp_path, dtype="float16", num_iterations=3, save_every=2, compile="off")
    assert scales[1] == scales[0] / 2
    state = checkpoint.load(tmp_path / "tiny/base/step_000002").state
    assert state is not None
    assert state["scaler"]["scale"] == scales[1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled_training_gives_the_same_losses(finished: Path, tmp_path: Path) -> None:
    """Needs a C++ compiler, and two minutes."""
    losses = []
    for compiled in ("off", "on"):
        copy_run(finished, tmp_path / compiled, "tokenizer")
        train("base", tmp_path / compiled, compile=compiled, pattern="M M2 T", depth=3, num_iterations=3)
        log = read_log(tmp_path / compiled / "tiny/base/log.jsonl")
        losses.append([record["loss"] for record in log if "loss" in record])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_wandb_offline_logs_beside_the_jsonl(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    copy_run(finished, tmp_path, "tokenizer")
    train("base", tmp_path, wandb="offline", num_iterations=2)
    runs = list((tmp_path / "tiny/base/wandb").glob("offline-run-*/*.wandb"))
    assert len(runs) == 1
    assert runs[0].stat().st_size > 0
    assert len(read_log(tmp_path / "tiny/base/log.jsonl")) == 3


# ---- it is killed


def test_a_killed_process_loses_at_most_the_steps_since_its_checkpoint(finished: Path, tmp_path: Path) -> None:
    """Kill -9 in the middle of a save: files are written, but not yet published."""
    copy_run(finished, tmp_path, "tokenizer", "base")
    script = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from nanochat import checkpoint
from tiny import train
publish = checkpoint._publish
def die(new, target):
    if target.name == "step_000006":
        os.kill(os.getpid(), signal.SIGKILL)
    publish(new, target)
checkpoint._publish = die
train("mid", Path({str(tmp_path)!r}))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    directory = tmp_path / "tiny" / "mid"
    assert checkpoint.steps(directory) == [3]
    assert any(path.name.startswith(".new") for path in directory.iterdir())  # what the dead process left
    train("mid", tmp_path)
    assert_identical(saved(tmp_path, "mid"), saved(finished, "mid"))
    assert not any(path.name.startswith(".new") for path in directory.iterdir())


@pytest.mark.slow
def test_kills_at_random_moments_of_all_stages_change_no_bit() -> None:
    script = Path(__file__).parents[2] / "dev" / "kill_test.py"
    done = subprocess.run([sys.executable, script, "--kills", "8"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 kills" in done.stdout
    assert "0 not bit-identical" in done.stdout
