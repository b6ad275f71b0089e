"""The stage of reinforcement learning: rollouts through the engine, rewards, and batches for the one loop.

A *round* draws prompts, samples a group of answers to each, scores them, and becomes the batches of `epochs` x
`minibatches` optimizer steps. Under torchrun each process takes its share of the prompts; groups stay whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nanochat.data.batches import IGNORED, Batch, PolicyBatch
from nanochat.data.shuffle import mix
from nanochat.engine.rollout import Rollout
from nanochat.engine.sampling import Sampling
from nanochat.errors import NanochatError
from nanochat.kernels.loss import linear_cross_entropy, linear_nll
from nanochat.model.lm import LM
from nanochat.rag.traces import Trace
from nanochat.runtime import Runtime, all_reduce_sum, log
from nanochat.tasks.task import Task
from nanochat.training.collapse import Detector
from nanochat.training.course import Course, Problem
from nanochat.training.play import Played, Player
from nanochat.training.reinforce import (
    Objective,
    advantages,
    is_usable,
    n_sampled,
    policy_batch,
    scales,
    token_weights,
)

N_TRACES = 4  # of each validation task and process
TRIES = 4  # rounds drawn when no group says anything
GAP = {torch.float32: 1e-3}  # largest mean difference of log-probabilities between engine and loss, in nats
GAP_HALF = 0.1  # the same in half precision


def telling(gains: Sequence[float], n_samples: int, n_groups: int) -> list[int]:
    """The numbers of the samples of `n_groups` groups: those with an advantage that is not 0 first, then the others, as
    they come."""
    starts = range(0, len(gains), n_samples)
    order = sorted(starts, key=lambda start: not any(gains[start : start + n_samples]))
    return [i for start in sorted(order[:n_groups]) for i in range(start, start + n_samples)]


@dataclass
class Tally:
    """Sums over the targets of one optimizer step, on this process."""

    sums: dict[str, float] = field(default_factory=dict)

    def add(self, **more: float) -> None:
        for name, value in more.items():
            self.sums[name] = self.sums.get(name, 0.0) + value


class PolicyStage:
    """Where batches come from. `val`: what is measured, the same problems every time. `reference`: a frozen model, for
    the KL term."""

    def __init__(
        self,
        player: Player,
        course: Course,
        val: Mapping[str, Task],
        objective: Objective,
        runtime: Runtime,
        reference: LM | None = None,
    ) -> None:
        self.player, self.course, self.val, self.objective = player, course, dict(val), objective
        self.options, self.rewards, self.tokenizer = player.options, player.rewards, player.tokenizer
        self.runtime, self.reference = runtime, reference
        self.detector = Detector()
        self.collapse = ""  # why the policy has collapsed, once it has
        self.round = 0
        self.share = 0.0  # of the run that is done; the loop says so
        self.pending: list[PolicyBatch] = []
        self.fresh = False  # the model is the one that sampled the batches
        self.means: dict[str, float] = {}  # of the latest round
        self.said = 1.0  # share of its groups whose rewards differ
        self.traces: list[Trace] = []  # of the latest evaluation
        self.tally = Tally()

    def collect(self) -> list[PolicyBatch]:
        """One round. Of `oversample` times as many groups those stay whose rewards differ, filled up with others to
        n_prompts. When every group of all processes has equal rewards, nothing could be learnt from it, and it is drawn
        again, at most TRIES times in all."""
        o, rank, world = self.options, self.runtime.rank, self.runtime.world_size
        drawn = o.n_prompts * o.oversample
        for _ in range(TRIES):
            problems = self.course.draw(self.round, drawn)[rank::world]
            streams = range(rank, drawn, world)  # whatever the number of processes
            sampling = Sampling(o.max_tokens, o.temperature, seed=mix(mix(0x201, o.seed), self.round) >> 1)
            self.round += 1
            played = self.player.play(problems, sampling, o.n_samples, streams)
            gains = advantages([one.score.total for one in played], o.n_samples, self.objective.advantage)
            gains = [gain if is_usable(one.rollout) else 0.0 for gain, one in zip(gains, played)]
            self.observe(played, gains)
            chosen = telling(gains, o.n_samples, o.n_prompts // world)
            groups = [gains[i : i + o.n_samples] for i in chosen[:: o.n_samples]]
            self.said = all_reduce_sum(sum(any(group) for group in groups)) / o.n_prompts
            if self.collapse or self.said:
                break
            log.debug("round %d: all groups have equal rewards", self.round - 1)
        return self.batches_of([played[i].rollout for i in chosen], [gains[i] for i in chosen])

    def batches_of(self, rolled: Sequence[Rollout], gains: Sequence[float]) -> list[PolicyBatch]:
        """The micro-batches of all steps of a round, in order."""
        o = self.options
        n_micro = o.n_micro(self.runtime.world_size)
        found: list[PolicyBatch] = []
        for part in range(o.minibatches):
            chosen = [i for i in range(len(rolled)) if i // o.n_samples % o.minibatches == part]
            lengths = [n_sampled(rolled[i]) if is_usable(rolled[i]) else 0 for i in chosen]
            n_targets = all_reduce_sum(sum(lengths))
            n_rollouts = all_reduce_sum(sum(length > 0 for length in lengths))
            scale = scales(lengths, n_targets, max(1, n_rollouts), o.max_tokens, self.objective.per)
            # rows that weigh nothing are not worth a forward pass; the divisor is that of all rows nonetheless
            kept = [j for j in range(len(chosen)) if self.objective.kl or gains[chosen[j]]]
            n_kept = all_reduce_sum(sum(lengths[j] for j in kept))
            order = sorted(kept, key=lambda j: len(rolled[chosen[j]].prompt) + len(rolled[chosen[j]].ids))
            for k in range(n_micro):
                some = order[k * len(order) // n_micro : (k + 1) * len(order) // n_micro]
                batch = policy_batch(
                    [rolled[chosen[j]] for j in some], [gains[chosen[j]] for j in some],
                    [scale[j] * n_kept / max(1, n_targets) for j in some], self.tokenizer.bos,
                )  # fmt: skip
                found.append(self.with_reference(batch))
        return found * o.epochs

    def with_reference(self, batch: PolicyBatch) -> PolicyBatch:
        if self.reference is None:
            return batch
        device = self.runtime.device
        return batch._replace(reference=self.reference.nll(batch.inputs.to(device), batch.targets.to(device)).cpu())

    def observe(self, played: Sequence[Played], gains: Sequence[float]) -> None:
        """Means over the round and all processes: for the log, the curriculum and the detector."""
        usable = [one for one in played if is_usable(one.rollout)]
        groups = [gains[i : i + self.options.n_samples] for i in range(0, len(gains), self.options.n_samples)]
        logprobs = [p for one in usable for p, sampled in zip(one.rollout.logprobs, one.rollout.sampled) if sampled]
        sums = {
            "n": len(played), "n_usable": len(usable), "n_groups": len(groups), "n_tokens": len(logprobs),
            "entropy": -sum(logprobs), "flat": sum(not any(group) for group in groups),
            "reward": sum(one.score.total for one in played), "right": sum(one.sample.right for one in played),
            "calls": sum(len(one.rollout.calls) for one in played),
            "truncated": sum(one.rollout.finish_reason == "length" for one in played),
            "errors": sum(one.rollout.finish_reason == "error" for one in played),
        }  # fmt: skip
        for name in self.rewards.names:
            sums[f"reward_{name}"] = sum(one.score.parts[name] for one in played)
        levels = range(1, len(self.course.levels) + 1)
        for level in levels:
            sums[f"n_{level}"] = sum(one.problem.level == level for one in played)
            sums[f"right_{level}"] = sum(one.sample.right for one in played if one.problem.level == level)
            sums[f"reward_of_{level}"] = sum(one.score.total for one in played if one.problem.level == level)
        total = {name: float(all_reduce_sum(float(value))) for name, value in sums.items()}
        n, n_tokens = total["n"], max(1.0, total["n_tokens"])
        shares = ("reward", "right", "calls", "truncated", "errors", *(f"reward_{r}" for r in self.rewards.names))
        self.means = {name: total[name] / n for name in shares} | {
            "entropy": total["entropy"] / n_tokens,
            "answer_tokens": total["n_tokens"] / max(1.0, total["n_usable"]),
            "dropped": 1 - total["n_usable"] / n,
            "flat_groups": total["flat"] / total["n_groups"],
            "level": float(self.course.level),
        }
        right = {level: total[f"right_{level}"] / total[f"n_{level}"] for level in levels if total[f"n_{level}"]}
        # levels count alike, however often they were drawn: harder problems are no collapse
        reward = sum(total[f"reward_of_{level}"] / total[f"n_{level}"] for level in right) / len(right)
        seen = {**self.means, "reward": reward, "format": self.means.get("reward_format", 1.0)}
        self.collapse = self.detector.update(seen)
        if self.course.update(right, self.share):
            self.detector.forget()

    # ---- what the loop asks for

    def batches(self, split: str) -> Iterator[Batch]:
        """Endless; the PolicyBatches of one round after the other."""
        assert split == "train"
        while True:
            if not self.pending:
                self.pending, self.fresh = self.collect(), True
            batch: Any = self.pending.pop(0)
            yield batch

    def loss(self, model: LM, batch: PolicyBatch) -> Tensor:
        """sum(weights * nll), with the gradient of the objective; what it weighed is added to `tally`."""
        hidden = model(batch.inputs)
        flat, targets = hidden.reshape(-1, hidden.size(-1)), batch.targets.reshape(-1)
        nll = linear_nll(flat.detach(), model.head_weight, targets, model.config.softcap).view(batch.targets.shape)
        found = token_weights(batch, nll, self.objective)
        n = int((batch.targets != IGNORED).sum())
        self.tally.add(n=n, clipped=float(found.clipped), kl=float(found.kl), gap=float(found.gap))
        return linear_cross_entropy(flat, model.head_weight, targets, found.weights.reshape(-1), model.config.softcap)

    def after_step(self) -> dict[str, float]:
        """What is worth a line in the log about the step, and the check that engine and loss agree.

        Raises NanochatError when the log-probabilities that the loss sees, before anything has changed, are not those
        with which the engine sampled."""
        names = ("n", "clipped", "kl", "gap")
        total = {name: float(all_reduce_sum(self.tally.sums.get(name, 0.0))) for name in names}
        self.tally = Tally()
        n = max(1.0, total["n"])
        found = {**self.means, "clipped": total["clipped"] / n, "kl": total["kl"] / n}
        if self.fresh:
            self.fresh = False
            found["logprob_gap"] = total["gap"] / n
            limit = GAP.get(self.player.model.compute_dtype, GAP_HALF)
            if found["logprob_gap"] > limit:
                raise NanochatError(
                    f"the engine sampled with other log-probabilities than the loss computes: "
                    f"{found['logprob_gap']:.4f} nats apart on average, {limit} allowed. Use --dtype float32, or "
                    "report this with your settings"
                )
        return found

    def evaluate(self, model: LM) -> dict[str, float]:
        """Greedy answers to the validation tasks: reward, accuracy, form, calls and tokens; accuracy of each task."""
        o, rank, world = self.options, self.runtime.rank, self.runtime.world_size
        greedy = Sampling(o.max_tokens, temperature=0.0)
        sums: dict[str, float] = {}
        self.traces = []
        for name, task in self.val.items():
            numbers = range(min(len(task), o.eval_prompts))[rank::world]
            problems = [Problem(task, i, task[i], 0) for i in numbers]
            played = self.player.play(problems, greedy, 1) if problems else []
            self.traces += [one.trace(self.tokenizer) for one in played[:N_TRACES]]
            parts = {f"reward_{r}": sum(one.score.parts[r] for one in played) for r in self.rewards.names}
            right = sum(one.sample.right for one in played)
            mine = {
                **parts, "n": len(played), "reward": sum(one.score.total for one in played), "accuracy": right,
                "calls": sum(len(one.rollout.calls) for one in played),
                "tokens": sum(n_sampled(one.rollout) for one in played),
                f"n@{name}": len(played), f"accuracy@{name}": right,
            }  # fmt: skip
            for key, value in mine.items():
                sums[key] = sums.get(key, 0.0) + float(all_reduce_sum(float(value)))
        found = {f"val_{key}": value / sums["n"] for key, value in sums.items() if "@" not in key and key != "n"}
        if len(self.val) > 1:
            found |= {f"val_accuracy_{name}": sums[f"accuracy@{name}"] / sums[f"n@{name}"] for name in self.val}
        return found

    def state_dict(self) -> dict[str, Any]:
        """Where the rounds stand; batches of a round that are not used up are kept, by process."""
        pending = [batch._asdict() for batch in self.pending]
        lanes = {str(self.runtime.rank): {"pending": pending, "fresh": self.fresh}}
        return {
            "cursors": {"rollouts": {"lanes": lanes, "report": {}}},
            "world_size": self.runtime.world_size,
            "round": self.round,
            "course": self.course.state_dict(),
            "detector": self.detector.state_dict(),
            "means": self.means,
            "said": self.said,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on behind the last batch; on another number of processes with the next round."""
        self.round = state["round"]
        self.course.load_state_dict(state["course"])
        self.detector.load_state_dict(state["detector"])
        self.means = dict(state["means"])
        self.said = state.get("said", 1.0)
        if state["world_size"] == self.runtime.world_size:
            mine = state["cursors"]["rollouts"]["lanes"][str(self.runtime.rank)]
            self.pending, self.fresh = [PolicyBatch(**batch) for batch in mine["pending"]], mine["fresh"]

    def report(self) -> dict[str, float]:
        """How many rounds there were, and what the last one was like."""
        return {"rounds": float(self.round), **{f"last_{name}": value for name, value in self.means.items()}}

    def close(self) -> None:
        """Nothing runs in the background."""

