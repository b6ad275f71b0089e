"""From logits to tokens: greedy, temperature, top-k, top-p, min-p, with one random stream a row.

Letters: B rows, V vocabulary, K candidates kept.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanochat.errors import UsageError

FIRST_CANDIDATES = 512  # top-p rarely needs more; sorting the whole vocabulary costs 20 times as much


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens and when to stop. Raises UsageError for values out of range.

    The filters apply in this order, each to what the one before left: temperature, top-k, top-p (nucleus, arXiv
    1904.09751), min-p (arXiv 2407.01082).
    """

    max_tokens: int = 256  # fewer when the context is full before
    temperature: float = 0.8  # 0: the most likely token, always
    top_k: int = 0  # keep the k most likely tokens, 0: all
    top_p: float = 1.0  # keep the most likely tokens that together have this probability
    min_p: float = 0.0  # drop tokens less likely than min_p times the most likely one
    seed: int | None = None  # None: different at every call
    stop: tuple[str, ...] = ()  # the text ends before the first of these

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        elif not isinstance(self.stop, tuple):
            object.__setattr__(self, "stop", tuple(self.stop))
        for name, good, expected in (
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("temperature", 0.0 <= self.temperature < float("inf"), "0 (greedy) or a positive number"),
            ("top_k", self.top_k >= 0, "0 (off) or a number of tokens"),
            ("top_p", 0.0 < self.top_p <= 1.0, "above 0, at most 1 (off)"),
            ("min_p", 0.0 <= self.min_p <= 1.0, "between 0 (off) and 1"),
        ):
            if not good:
                raise UsageError(f"--{name} {getattr(self, name)}: expected {expected}")
        if not all(isinstance(s, str) and s for s in self.stop):
            raise UsageError("--stop: a stop string must not be empty")


class Stream:
    """The random numbers of one row. They depend on the seed and the sample's number, never on the batch around it."""

    def __init__(self, seed: int | None, sample: int) -> None:
        self.random = random.Random(None if seed is None else f"{seed}/{sample}")

    def uniform(self) -> float:
        """In [0, 1), on a grid of 2^-24 so that fp32 holds it exactly."""
        return self.random.getrandbits(24) / (1 << 24)


def sample(logits_BV: Tensor, sampling: Sampling, streams: Sequence[Stream]) -> tuple[list[int], list[float]]:
    """A token for each row, and its log-probability in nats under the model itself (temperature 1, before any filter).

    Each row's token depends on that row's logits and stream only.
    """
    logits_BV = logits_BV.float()
    if sampling.temperature == 0.0 or sampling.top_k == 1:
        best_B, ids_B = logits_BV.max(dim=-1)
    else:
        uniform_B = torch.tensor([stream.uniform() for stream in streams], device=logits_BV.device)
        ids_B = draw(logits_BV, sampling, uniform_B)
        best_B = logits_BV.gather(1, ids_B[:, None])[:, 0]
    logprobs_B = best_B - logits_BV.logsumexp(dim=-1)
    return ids_B.tolist(), logprobs_B.tolist()


def draw(logits_BV: Tensor, sampling: Sampling, uniform_B: Tensor) -> Tensor:
    """The token of each row at which the filtered cumulative distribution passes `uniform_B`."""
    scaled_BV = logits_BV / sampling.temperature
    if not sampling.top_k and sampling.top_p == 1.0:
        return invert(apply_min_p(torch.softmax(scaled_BV, dim=-1), sampling.min_p), uniform_B)
    values_BK, index_BK = candidates(scaled_BV, sampling)
    probs_BK = torch.softmax(values_BK, dim=-1) if sampling.top_k else exp_normalised(values_BK, scaled_BV)
    if sampling.top_p < 1.0:
        before_BK = probs_BK.cumsum(dim=-1) - probs_BK  # the first token always stays
        probs_BK = probs_BK.masked_fill(before_BK >= sampling.top_p, 0.0)
    choice_B = invert(apply_min_p(probs_BK, sampling.min_p), uniform_B)
    return index_BK.gather(1, choice_B[:, None])[:, 0]


def candidates(scaled_BV: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The most likely tokens, best first: the top k, or at least as many as top-p can need."""
    n_vocab = scaled_BV.size(-1)
    if sampling.top_k:
        return scaled_BV.topk(min(sampling.top_k, n_vocab), dim=-1)
    values_BK, index_BK = scaled_BV.topk(min(FIRST_CANDIDATES, n_vocab), dim=-1)
    if bool((exp_normalised(values_BK, scaled_BV).sum(dim=-1) < sampling.top_p).any()):
        return scaled_BV.sort(dim=-1, descending=True)
    return values_BK, index_BK


def exp_normalised(values_BK: Tensor, scaled_BV: Tensor) -> Tensor:
    """Probabilities of some tokens under the softmax over all of them."""
    return torch.exp(values_BK - scaled_BV.logsumexp(dim=-1, keepdim=True))


def apply_min_p(probs_BK: Tensor, min_p: float) -> Tensor:
    if min_p == 0.0:
        return probs_BK
    return probs_BK.masked_fill(probs_BK < min_p * probs_BK.amax(dim=-1, keepdim=True), 0.0)


def invert(probs_BK: Tensor, uniform_B: Tensor) -> Tensor:
    """Inverse of the cumulative distribution. `probs_BK` need not sum to 1; probability 0 is never chosen."""
    total_BK = probs_BK.cumsum(dim=-1)
    mass_B = total_BK[:, -1]
    below_B = torch.minimum(uniform_B * mass_B, torch.nextafter(mass_B, torch.zeros_like(mass_B)))
    return torch.searchsorted(total_BK, below_B[:, None], right=True)[:, 0]
