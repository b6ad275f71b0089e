"""The objective of reinforcement learning: rewards to advantages, and the weight of each sampled token in the loss.

For token t of rollout i, with p its log-probability now, q when it was sampled and r under the reference model:

    ratio      rho = exp(p - q), or one for the whole rollout: exp(mean over t of (p - q))    (ratio="sequence", GSPO)
    objective  sum over t of c * [min(rho A, clip(rho, 1 - low, 1 + high) A) - kl (exp(r - p) - (r - p) - 1)]
    c          1 / tokens of all rollouts            (per="token", DAPO)
               1 / rollouts / tokens of this one     (per="sequence", GRPO)
               1 / rollouts / max_tokens             (per="constant", Dr. GRPO)
    A          reward - mean of the group                                  (advantage="dr_grpo")
               the same / standard deviation of the group                  (advantage="grpo")
               reward, from 0 on                                           (advantage="weighted")

Its gradient is that of sum(weight * nll), with the weights of `token_weights` taken as constants: so it goes through
the loss that all stages share. With one step a round, rho is 1 and the weight is the advantage (REINFORCE); "weighted"
is then supervised learning on the model's own answers, weighted by reward.

Sources: REINFORCE (Williams 1992); PPO's clipping (arXiv 1707.06347); GRPO (arXiv 2402.03300); Dr. GRPO (arXiv
2503.20783); DAPO's clip-higher and per-token loss (arXiv 2503.14476); GSPO (arXiv 2507.18071); masks on retrieved
tokens: Search-R1 (arXiv 2503.09516); the estimator of the KL divergence: k3 of Schulman (2020).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nanochat.data.batches import IGNORED, PolicyBatch
from nanochat.engine.rollout import Rollout
from nanochat.errors import UsageError

ADVANTAGES = ("dr_grpo", "grpo", "weighted")
PER = ("token", "sequence", "constant")
RATIOS = ("token", "sequence")
EPSILON = 1e-6  # added to a standard deviation
SAME = 1e-9  # rewards of a group that differ by less are equal


@dataclass(frozen=True)
class Objective:
    """How rewards become a gradient. Raises UsageError for values that cannot be."""

    advantage: str = "dr_grpo"
    per: str = "token"
    ratio: str = "token"
    clip_low: float = 0.2
    clip_high: float = 0.28  # larger: unlikely tokens can rise (clip-higher)
    kl: float = 0.0

    def __post_init__(self) -> None:
        for name, allowed in (("advantage", ADVANTAGES), ("per", PER), ("ratio", RATIOS)):
            if getattr(self, name) not in allowed:
                raise UsageError(f"--{name} {getattr(self, name)}: must be one of {', '.join(allowed)}")
        for name in ("clip_low", "clip_high", "kl"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(f"--{name} {getattr(self, name)}: must not be negative")
        if self.clip_low >= 1:
            raise UsageError(f"--clip_low {self.clip_low}: must be below 1, or no ratio is ever clipped from below")


def advantages(rewards: Sequence[float], n_group: int, kind: str) -> list[float]:
    """One for each reward; `n_group` rewards in a row belong to one prompt. A group whose rewards are all equal says
    nothing about its samples: their advantage is 0 (with "weighted": the reward)."""
    found: list[float] = []
    for start in range(0, len(rewards), n_group):
        group = rewards[start : start + n_group]
        if kind == "weighted":
            found += [max(0.0, reward) for reward in group]
            continue
        mean = sum(group) / len(group)
        if max(group) - min(group) < SAME:
            found += [0.0] * len(group)
            continue
        spread = math.sqrt(sum((reward - mean) ** 2 for reward in group) / len(group))
        found += [(reward - mean) / (spread + EPSILON if kind == "grpo" else 1.0) for reward in group]
    return found


class Weighed(NamedTuple):
    """Weights (B, T) of the nll, and what happened: sums over the targets."""

    weights: Tensor
    clipped: Tensor  # tokens whose ratio was clipped
    kl: Tensor  # estimate of the divergence from the reference, in nats
    gap: Tensor  # |p - q|


def token_weights(batch: PolicyBatch, nll_BT: Tensor, objective: Objective) -> Weighed:
    """The gradient of -objective by each token's nll (= -p): what the nll has to be multiplied with. Targets that are
    ignored, and tokens whose log-probability is no number, weigh 0."""
    is_target = batch.targets != IGNORED
    usable = is_target & torch.isfinite(nll_BT) & torch.isfinite(batch.old)
    change_BT = torch.where(usable, batch.old - nll_BT, 0.0)  # p - q
    log_ratio_BT = change_BT
    if objective.ratio == "sequence":
        log_ratio_BT = (change_BT.sum(1) / usable.sum(1).clamp(min=1))[:, None].expand_as(change_BT)
    ratio_BT = log_ratio_BT.clamp(-20.0, 20.0).exp()
    clipped = (batch.weights > 0) & (ratio_BT > 1 + objective.clip_high)
    clipped |= (batch.weights < 0) & (ratio_BT < 1 - objective.clip_low)
    clipped &= usable
    weights_BT = torch.where(clipped, 0.0, batch.weights * ratio_BT)
    divergence = change_BT.new_zeros(())
    if objective.kl:
        away_BT = torch.where(usable, nll_BT - batch.reference, 0.0).clamp(-20.0, 20.0)  # r - p
        divergence = (away_BT.exp() - away_BT - 1).sum()
        weights_BT = weights_BT - objective.kl * batch.scale * (1 - away_BT.exp())
    weights_BT = torch.where(usable, weights_BT, 0.0)
    return Weighed(weights_BT, clipped.sum(), divergence, change_BT.abs().sum())


def scales(lengths: Sequence[int], n_targets: int, n_rollouts: int, max_tokens: int, per: str) -> list[float]:
    """`c` of each rollout, times `n_targets`, by which the loop divides. lengths: sampled tokens of the rollouts here;
    n_targets, n_rollouts: of the whole step, over all processes."""
    if per == "token":
        return [1.0] * len(lengths)
    if per == "sequence":
        return [n_targets / (n_rollouts * length) if length else 0.0 for length in lengths]
    return [n_targets / (n_rollouts * max_tokens)] * len(lengths)


def is_usable(rollout: Rollout) -> bool:
    """Whether a rollout can be trained on: it ended without an error, and its log-probabilities are numbers."""
    return rollout.finish_reason != "error" and bool(rollout.ids) and all(map(math.isfinite, rollout.logprobs))


def n_sampled(rollout: Rollout) -> int:
    """Tokens that the model chose."""
    return sum(rollout.sampled)


def policy_batch(
    rolled: Sequence[Rollout], gains: Sequence[float], scale: Sequence[float], pad_id: int, multiple: int = 16
) -> PolicyBatch:
    """One row a rollout, padded on the right to a length divisible by `multiple`. gains: advantages. Prompts, results
    of calls and rollouts that are not usable are no targets."""
    if not rolled:  # a step without anything to learn from still takes its part in what all processes do together
        empty = torch.zeros(1, multiple)
        ids = torch.full((1, multiple), pad_id, dtype=torch.int64)
        return PolicyBatch(ids, torch.full_like(ids, IGNORED), empty, empty.to(torch.int32), empty, empty,
                           torch.zeros(1, 0))  # fmt: skip
    longest = max(len(one.prompt) + len(one.ids) - 1 for one in rolled)
    T = max(multiple, -(-longest // multiple) * multiple)
    inputs = torch.full((len(rolled), T), pad_id, dtype=torch.int64)
    targets = torch.full((len(rolled), T), IGNORED, dtype=torch.int64)
    scale_BT, old = torch.zeros(len(rolled), T), torch.zeros(len(rolled), T)
    for row, one in enumerate(rolled):
        ids = torch.tensor([*one.prompt, *one.ids], dtype=torch.int64)
        inputs[row, : len(ids) - 1] = ids[:-1]
        if not is_usable(one):
            continue
        places = slice(len(one.prompt) - 1, len(ids) - 1)
        sampled = torch.tensor(one.sampled)
        targets[row, places] = torch.where(sampled, ids[len(one.prompt) :], IGNORED)
        old[row, places] = torch.where(sampled, -torch.tensor(one.logprobs), 0.0)
        scale_BT[row, places] = sampled * scale[row]
    weights = scale_BT * torch.tensor(list(gains), dtype=torch.float32)[:, None]
    segments = torch.zeros(len(rolled), T, dtype=torch.int32)
    return PolicyBatch(inputs, targets, weights, segments, scale_BT, old, torch.zeros(len(rolled), 0))
