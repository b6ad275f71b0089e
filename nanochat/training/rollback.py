"""The one loop with a policy in it: the best checkpoint is kept, and a run that collapses goes back to it and ends."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

from nanochat import checkpoint
from nanochat.data.batches import Batch
from nanochat.errors import NanochatError
from nanochat.model.lm import LM
from nanochat.rag.traces import write_traces
from nanochat.runtime import Runtime, barrier, log
from nanochat.tokenizer import Tokenizer
from nanochat.training.loop import Trainer
from nanochat.training.policy import PolicyStage
from nanochat.training.settings import TrainSettings

JUDGED_BY = "val_reward"
TRACES = "traces.jsonl"  # answers of the latest evaluation, in the stage directory; of the best, in best/


class PolicyTrainer(Trainer):
    """Trains a PolicyStage. The weights with the best evaluation lie in `best/` of the stage directory; a run ends with
    them, or with the last ones (`keep_best` False). `progress.metrics["collapsed"]` is 1 when it was stopped."""

    def __init__(
        self,
        stage: PolicyStage,
        model: LM,
        tokenizer: Tokenizer,
        settings: TrainSettings,
        runtime: Runtime,
        directory: Path,
        n_steps: int,
        n_micro: int,
        keep_best: bool = True,
    ) -> None:
        super().__init__(stage, model, tokenizer, settings, runtime, directory, n_steps, n_micro)
        self.policy, self.keep_best = stage, keep_best
        self.best = -math.inf
        self.best_step = -1
        self.evaluated = -1  # the step whose weights `progress.metrics` is about
        self.collapsed = False

    @property
    def best_dir(self) -> Path:
        return self.directory / "best"

    def compiled(self) -> Any:
        """Not compiled: rounds differ in length."""
        return self.model.loss

    def loss(self, batch: Batch) -> Any:
        policy_batch: Any = batch
        return self.policy.loss(self.model, policy_batch)

    def resume(self) -> None:
        """As every stage; the best evaluation so far comes back too."""
        super().resume()
        newest = checkpoint.latest(self.best_dir)
        if checkpoint.latest(self.directory) is None:
            if self.runtime.is_main:  # of a run that was started again
                shutil.rmtree(self.best_dir, ignore_errors=True)
        elif newest is not None:
            meta = checkpoint.read_meta(newest)
            self.best, self.best_step = meta["metrics"][JUDGED_BY], meta["step"]
        if self.progress.metrics.get("collapsed") == 1.0:
            log.warning("this run collapsed and was rolled back: --no_resume starts it again, best with other settings")
            self.collapsed = True

    def step(self, batches: Any) -> None:
        if self.progress.step == 0:
            self.evaluate()  # what the run has to improve on
        self.policy.share = self.share()
        try:
            super().step(batches)
        except NotFinite as error:
            self.last = {}
            self.roll_back(str(error))
            return
        self.last |= self.policy.after_step()

    def update(self, micro: list[Batch]) -> float:
        """As every stage, with smaller steps where few groups say anything. Muon and AdamW move as far for a faint
        gradient as for a clear one: near the end, when most groups are all right, they would walk at random."""
        for optimizer in self.optimizers.all:
            for group in optimizer.param_groups:
                group["lr"] *= self.policy.said
        return super().update(micro)

    def stop_at(self, batch: Batch, index: int, what: str) -> None:
        """A loss that is no number is a collapse. With several processes the others wait in a collective: the run ends
        as any stage does."""
        if self.runtime.world_size > 1:
            super().stop_at(batch, index, what)
        raise NotFinite(what)

    def after_step(self) -> None:
        if not self.collapsed:
            super().after_step()
        if self.policy.collapse and not self.collapsed:
            self.roll_back(self.policy.collapse)

    def finished(self) -> bool:
        return self.collapsed or super().finished()

    def evaluate(self) -> None:
        """As every stage, and the best weights are kept."""
        if self.evaluated == self.progress.step:
            return
        super().evaluate()
        self.evaluated = self.progress.step
        if self.runtime.is_main:
            write_traces(self.directory / TRACES, self.policy.traces)
        value = self.progress.metrics[JUDGED_BY]
        if value > self.best:
            self.best, self.best_step = value, self.progress.step
            if self.runtime.is_main:
                self.save_best()
            barrier()

    def save_best(self) -> None:
        weights = {"model": self.model.state_dict()}
        checkpoint.save(self.best_dir, self.progress.step, weights, self.meta(), keep_last=1)
        write_traces(self.best_dir / TRACES, self.policy.traces)

    def restore_best(self) -> None:
        """The best weights, what they were measured with, and their answers."""
        saved = checkpoint.load(self.best_dir / f"step_{self.best_step:06d}")
        self.model.load_state_dict(saved.tensors["model"])
        self.progress.metrics = {name: float(value) for name, value in saved.meta["metrics"].items()}
        self.evaluated = self.progress.step
        if self.runtime.is_main and (self.best_dir / TRACES).is_file():
            shutil.copyfile(self.best_dir / TRACES, self.directory / TRACES)

    def roll_back(self, reason: str) -> None:
        """Stop, with the weights of the best evaluation."""
        self.collapsed = True
        log.warning(
            "the policy collapsed at step %d: %s. Back to step %d (%s %.4f), and no further. A lower --lr_scale, --kl "
            "or more --n_samples help; see docs/rl.md", self.progress.step, reason, self.best_step, JUDGED_BY, self.best
        )  # fmt: skip
        p = self.progress
        self.log.write({"step": p.step, "tokens": p.tokens, "rolled_back_to": self.best_step, "reason": reason})
        self.optimizers.zero_grad()
        self.restore_best()

    def finish(self) -> None:
        self.evaluate()
        if self.keep_best and self.best_step != self.progress.step and not self.collapsed:
            log.info("the best evaluation was at step %d: the stage ends with its weights", self.best_step)
            self.restore_best()
        self.progress.metrics |= {"collapsed": float(self.collapsed), "best_step": float(self.best_step)}
        super().finish()


class NotFinite(NanochatError):
    """A loss or gradient that is no number."""
