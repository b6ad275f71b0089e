"""The one training loop. A stage says where batches come from; the loop owns accumulation, clipping, the schedule,
evaluation, checkpoints, resume and logging.

loss = sum(weights * nll) / valid, with `valid` the number of targets over all ranks and accumulation steps.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from nanochat import checkpoint, config
from nanochat.data.batches import IGNORED, Batch
from nanochat.errors import NanochatError, UsageError
from nanochat.kernels.loss import LINEAR_CROSS_ENTROPY
from nanochat.kernels.scan import SELECTIVE_SCAN
from nanochat.model.lm import LM
from nanochat.report import read_log
from nanochat.runtime import Runtime, all_reduce_sum, log, peak_memory_bytes, rng_state, set_rng_state
from nanochat.tokenizer import Tokenizer
from nanochat.training import restart
from nanochat.training.carry import Carry, carried_rows
from nanochat.training.curriculum import cut, length_at
from nanochat.training.distributed import gather, gather_state, reduce_gradients
from nanochat.training.optim import Optimizers, Rates, learning_rate_factor, momentum_at
from nanochat.training.settings import TrainSettings
from nanochat.training.supervised import Stage, describe, to_device


@dataclass
class Progress:
    """Everything about a run that a checkpoint brings back besides weights and optimizer."""

    step: int = 0
    seconds: float = 0.0  # of training, without evaluation and saving
    tokens: int = 0
    smooth_loss: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)


class Log:
    """`log.jsonl` in the stage directory, one record a line; wandb beside it when asked for."""

    def __init__(self, directory: Path, step: int, settings: TrainSettings, active: bool) -> None:
        self.path, self.active, self.run = directory / "log.jsonl", active, None
        if not active:
            return
        directory.mkdir(parents=True, exist_ok=True)
        with self.failures():
            # a killed run logged past its checkpoint
            kept = [line for line in read_log(self.path) if line["step"] <= step]
            whole = self.path.with_name(".log.jsonl.new")  # killed meanwhile, the log is the old one or the new one
            whole.write_text("".join(json.dumps(line) + "\n" for line in kept))
            os.replace(whole, self.path)
        if settings.wandb != "off":
            try:
                import wandb
            except ImportError:
                raise UsageError(
                    f"--wandb {settings.wandb}: wandb is not installed; pip install 'nanochat[wandb]'"
                ) from None
            mode: Any = settings.wandb
            name = f"{settings.run}-{directory.name}"
            self.run = wandb.init(project="nanochat", name=name, mode=mode, dir=str(directory))

    def write(self, record: dict[str, Any]) -> None:
        if not self.active:
            return
        with self.failures(), self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        if self.run is not None:
            self.run.log({k: v for k, v in record.items() if k != "step"}, step=record["step"])

    @contextlib.contextmanager
    def failures(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise NanochatError(
                f"could not write {self.path}: {error}. Checkpoints are intact; free some space"
            ) from error

    def close(self) -> None:
        if self.run is not None:
            self.run.finish()


@contextlib.contextmanager
def held_interrupt() -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C is only noted (the yielded function says so), so that a step ends whole; the second acts
    at once."""
    asked = False

    def note(signum: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        tqdm.write("stopping after this step; Ctrl-C again to stop at once", file=sys.stderr)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)


class Trainer:
    """One stage of training of one model in one directory; `run` does it."""

    def __init__(
        self,
        stage: Stage,
        model: LM,
        tokenizer: Tokenizer,
        settings: TrainSettings,
        runtime: Runtime,
        directory: Path,
        n_steps: int,
        n_micro: int,
        carry: Carry | None = None,
    ) -> None:
        self.stage, self.model, self.tokenizer = stage, model, tokenizer
        self.settings, self.runtime, self.directory = settings, runtime, directory
        self.n_steps, self.n_micro, self.carry = n_steps, n_micro, carry
        s = settings.lr_scale
        rates = Rates(
            matrix=settings.matrix_lr * s,
            embedding=settings.embedding_lr * s,
            head=settings.head_lr * s,
            small=settings.small_lr * s,
            scalar=Rates.scalar * s,
            weight_decay=settings.weight_decay,
        )
        self.optimizers = Optimizers(model, rates)
        self.scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.dtype == torch.float16)
        self.progress = Progress()
        self.loss_of = self.compiled()
        self.bar: tqdm[Any] | None = None

    def compiled(self) -> Any:
        """The function (batch) -> sum(weights * nll), compiled where that pays: on CUDA; on a CPU it takes a minute."""
        if self.carry is not None:  # states change from batch to batch
            log.info("torch.compile: off (--carry_state)")
            return self.carry.loss
        on = self.settings.compile == "on" or (self.settings.compile == "auto" and self.runtime.device.type == "cuda")
        log.info("torch.compile: %s (--compile %s)", "on" if on else "off", self.settings.compile)
        if not on:
            return self.model.loss
        for table in (SELECTIVE_SCAN, LINEAR_CROSS_ENTROPY):
            # gradients and buffers by hand: called, never traced; the Triton kernels are operators that it knows
            table.update({name: torch.compiler.disable(op) for name, op in table.items() if name != "triton"})
        return torch.compile(self.model.loss, dynamic=False)

    def run(self) -> dict[str, float]:
        """Train to the end (or go on from the newest checkpoint) and return the final metrics."""
        self.resume()
        if self.runtime.is_main:
            config.save(self.settings, self.directory / "config.json")
        self.log = Log(self.directory, self.progress.step, self.settings, self.runtime.rank == 0)
        batches = self.stage.batches("train")
        quiet = self.runtime.rank != 0
        self.bar = bar = tqdm(
            total=self.n_steps or None, initial=self.progress.step, desc=self.directory.name, unit="step",
            disable=quiet, mininterval=0.5,
        )  # fmt: skip
        try:
            with held_interrupt() as asked:
                while not self.finished():
                    self.step(batches)
                    self.after_step()
                    if asked() and not self.finished():
                        self.save_and_stop()
            if not self.progress.metrics or self.progress.metrics.get("final") != 1.0:
                self.finish()
        finally:
            bar.close()
            self.stage.close()
            self.log.close()
        return self.progress.metrics

    def save_and_stop(self) -> None:
        """Ctrl-C: keep what was done. With several processes there may be no one left to talk to: nothing is saved."""
        if self.runtime.world_size == 1:
            self.save()
        raise KeyboardInterrupt

    def share(self) -> float:
        """How much of the run is done, in [0, 1]."""
        if self.settings.max_minutes:
            by_time = self.progress.seconds / (60 * self.settings.max_minutes)
            return min(1.0, max(by_time, self.progress.step / self.n_steps if self.n_steps else 0.0))
        return self.progress.step / self.n_steps

    def finished(self) -> bool:
        return self.share() >= 1.0 - 1e-12

    def step(self, batches: Any) -> None:
        """One optimizer step."""
        began = time.perf_counter()
        self.progress.metrics.pop("final", None)  # of a run that was shorter
        s, share = self.settings, self.share()
        factor = learning_rate_factor(share, s.warmup, s.warmdown, s.final_lr)
        self.optimizers.schedule(factor, momentum_at(share, 0.95))
        micro = [next(batches) for _ in range(self.n_micro)]
        if s.start_len:
            length = length_at(share, s.start_len, micro[0].inputs.size(1), s.grow_share)
            micro = [cut(batch, length) for batch in micro]
        valid = all_reduce_sum(sum(int((b.targets != IGNORED).sum()) for b in micro))
        total = torch.zeros((), dtype=torch.float64)
        for index, batch in enumerate(micro):
            moved = to_device(batch, self.runtime.device)
            loss = self.loss(moved) / max(1, valid)
            self.scaler.scale(loss).backward()
            value = float(loss.detach())
            if not math.isfinite(value):
                self.stop_at(batch, index, f"the loss is {value}")
            total += value
        norm = self.update(micro)
        self.progress.step += 1
        self.progress.tokens += sum(b.inputs.numel() for b in micro) * self.runtime.world_size
        seconds = time.perf_counter() - began
        if self.runtime.world_size > 1 and s.max_minutes:  # every rank must end at the same step
            seconds = all_reduce_sum(seconds) / self.runtime.world_size
        self.progress.seconds += seconds
        loss_value = float(all_reduce_sum(total))
        old = self.progress.smooth_loss
        self.progress.smooth_loss = loss_value if old is None else 0.9 * old + 0.1 * loss_value
        self.last = {"loss": loss_value, "grad_norm": norm, "lr_factor": factor, "seconds": seconds}

    def loss(self, batch: Batch) -> Any:
        """sum(weights * nll) of a micro-batch."""
        return self.loss_of(batch.inputs, batch.targets, batch.weights, batch.segments)

    def update(self, micro: list[Batch]) -> float:
        """Reduce over ranks, clip, step both optimizers. Returns the norm of the gradient before clipping."""
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        reduce_gradients(parameters)  # first: an overflow on one rank is then one on all
        for optimizer in self.optimizers.all:
            self.scaler.unscale_(optimizer)
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.settings.clip or float("inf")))
        if not math.isfinite(norm) and not self.scaler.is_enabled():
            self.stop_at(micro[0], 0, f"the gradient's norm is {norm}")
        if math.isfinite(norm):  # else fp16 has overflowed: neither optimizer steps, and the scale falls
            for optimizer in self.optimizers.all:
                self.scaler.step(optimizer)
        self.scaler.update()
        self.optimizers.zero_grad()
        return norm

    def stop_at(self, batch: Batch, index: int, what: str) -> None:
        """The NaN guard: nothing is saved over the last good checkpoint."""
        good = checkpoint.latest(self.directory)
        raise NanochatError(
            f"{what} at step {self.progress.step}, micro-batch {index} of {self.n_micro} (rank {self.runtime.rank}), "
            f"whose first row begins {describe(batch, self.tokenizer)}. Nothing was saved since; the "
            f"last good checkpoint is {good or 'the source of this stage'}. Lower --lr_scale or look at that text, "
            "then run the command again"
        )

    def after_step(self) -> None:
        s, p = self.settings, self.progress
        done = self.finished()
        assert self.bar is not None
        self.bar.update(1)
        if p.step % s.log_every == 0 or p.step == 1 or done:
            rate = self.tokens_per_step() / self.last["seconds"]
            memory = peak_memory_bytes(self.runtime.device)
            self.bar.set_postfix_str(f"loss {p.smooth_loss:.3f}, {rate:,.0f} tok/s")
            self.log.write(
                {
                    "step": p.step,
                    "tokens": p.tokens,
                    **{k: round(v, 6) for k, v in self.last.items()},
                    "tokens_per_second": round(rate, 1),
                    "peak_memory_bytes": memory,
                    "time": round(p.seconds, 3),
                }
            )
        if done:
            return
        if s.eval_every and p.step % s.eval_every == 0:
            self.evaluate()
        if s.save_every and p.step % s.save_every == 0:
            self.save()

    def tokens_per_step(self) -> int:
        return self.progress.tokens // max(1, self.progress.step)

    def evaluate(self) -> None:
        self.progress.metrics = dict(self.stage.evaluate(self.model))
        self.log.write({"step": self.progress.step, "tokens": self.progress.tokens, **self.progress.metrics})
        if self.bar is not None:
            shown = ", ".join(f"{k} {v:.4f}" for k, v in self.progress.metrics.items())
            tqdm.write(f"step {self.progress.step}: {shown}", file=None if self.bar.disable else self.bar.fp)

    def finish(self) -> None:
        self.evaluate()
        p = self.progress
        p.metrics |= {
            "final": 1.0,
            "train_loss": float(p.smooth_loss or 0.0),
            "tokens": float(p.tokens),
            "train_seconds": p.seconds,
            "tokens_per_second": p.tokens / max(1e-9, p.seconds),
            "peak_memory_bytes": float(peak_memory_bytes(self.runtime.device)),
            **self.stage.report(),
        }
        self.save()

    def meta(self) -> dict[str, Any]:
        """What a checkpoint says of its model."""
        return {
            "stage": self.directory.name,
            "model_config": self.model.config.to_dict(),
            "tokenizer_hash": self.tokenizer.hash,
            "source": self.model.source,
            "suggestions": self.model.suggestions,
            "metrics": {k: v for k, v in self.progress.metrics.items() if math.isfinite(v)},
        }

    def save(self) -> None:
        """Model, optimizer, RNG and loader cursor, atomically. Collective: every rank calls it, rank 0 writes."""
        cursor = gather_state(self.stage.state_dict())
        carried = None if self.carry is None else carried_rows(gather(self.carry.state_dict()))
        if self.runtime.rank:
            return
        p = self.progress
        state = {
            "cursor": cursor,
            "carry": carried,
            "rng": rng_state(),
            "scaler": self.scaler.state_dict(),
            "seconds": p.seconds,
            "tokens": p.tokens,
            "smooth_loss": p.smooth_loss,
        }
        meta = {**self.meta(), "n_steps": self.n_steps}
        tensors = {"model": self.model.state_dict(), "optim": self.optimizers.state_dict()}
        checkpoint.save(self.directory, p.step, tensors, meta, state, keep_last=self.settings.keep_last)
        restart.settle(self.directory)

    def resume(self) -> None:
        """Go on from the newest checkpoint of this directory, if there is one (every rank reads it)."""
        newest = checkpoint.latest(self.directory) if self.settings.resume else None
        if newest is None:
            return
        saved = checkpoint.load(newest, files=("model", "optim"))
        self.check_same_run(newest, saved.meta)
        state = saved.state
        assert state is not None
        self.model.load_state_dict(saved.tensors["model"])
        self.optimizers.load_state_dict(saved.tensors["optim"])
        self.stage.load_state_dict(state["cursor"])
        if self.carry is not None and state.get("carry"):
            self.carry.load_state_dict(state["carry"], self.runtime.rank, self.runtime.world_size)
        self.scaler.load_state_dict(state["scaler"]) if self.scaler.is_enabled() else None
        set_rng_state(state["rng"])
        p = self.progress
        p.step, p.seconds, p.tokens, p.smooth_loss = saved.step, state["seconds"], state["tokens"], state["smooth_loss"]
        p.metrics = dict(saved.meta["metrics"])
        log.info("resuming from %s", newest)
        log.debug("cursor: %s", {k: v for k, v in state["cursor"].items() if k == "taken"})

    def check_same_run(self, newest: Path, meta: dict[str, Any]) -> None:
        """Raises UsageError that names what `newest` and this run do not have in common."""
        there = {"steps": meta["n_steps"], "tokenizer": meta["tokenizer_hash"][:12], **meta["model_config"]}
        here = {"steps": self.n_steps, "tokenizer": self.tokenizer.hash[:12], **self.model.config.to_dict()}
        if "source" in meta:  # the stage before was trained again: what follows from it is stale
            there["source weights"], here["source weights"] = meta["source"][:12], self.model.source[:12]
        found = [f"{name} {a} there, {b} here" for name, (a, b) in config.differences(there, here).items()]
        if found:
            raise UsageError(
                f"{newest} belongs to another run ({'; '.join(found)}): give the same settings, another --run, "
                "or --no-resume to start again"
            )
