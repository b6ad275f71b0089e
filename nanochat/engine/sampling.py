"""From logits to tokens: greedy, temperature, top-k, top-p, min-p, with one random stream a row.

Letters: B rows, V vocabulary, K candidates kept.
"""

from __future__ import annotations

import dataclasses
import difflib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.errors import UsageError

BLOCK = 128  # tokens whose weights are summed together when drawing from a large vocabulary
COLDEST = 1e-6  # temperatures below are 0: their inverse is too large for fp32
FIRST_CANDIDATES = 512  # top-p rarely needs more; sorting the whole vocabulary costs 20 times as much


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens and when to stop. Raises UsageError for values out of range.

    The filters apply in this order, each to what the one before left: temperature, min-p (arXiv 2407.01082), top-k,
    top-p (nucleus, arXiv 1904.09751).
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


def make_sampling(options: Mapping[str, Any]) -> Sampling:
    """Sampling from keyword arguments. Raises UsageError for an unknown name."""
    known = [field.name for field in dataclasses.fields(Sampling)]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there is {', '.join(known)}"
            raise UsageError(f"unknown sampling option {name!r}; {hint}")
    return Sampling(**options)


class Stream:
    """The random numbers of one row. They depend on the seed and the sample's number, never on the batch around it."""

    def __init__(self, seed: int | None, sample: int) -> None:
        self.random = random.Random(None if seed is None else f"{seed}/{sample}")

    def uniform(self) -> float:
        """In [0, 1), on a grid of 2^-24 so that fp32 holds it exactly."""
        return self.random.getrandbits(24) / (1 << 24)


def sample(logits_BV: Tensor, sampling: Sampling, streams: Sequence[Stream]) -> tuple[list[int], list[float]]:
    """A token for each row, and its log-probability in nats under the model itself (temperature 1, before any filter).

    Each row's token depends on that row's logits and stream only. Overwrites the logits: with a large vocabulary, fresh
    memory costs more than the arithmetic.
    """
    below_BV = logits_BV.sub_(logits_BV.amax(dim=-1, keepdim=True))  # ten times as fast as with its index
    weights_BV = torch.exp(below_BV)
    norm_B = weights_BV.sum(dim=-1)
    if sampling.temperature >= COLDEST and sampling.top_k != 1:
        uniform_B = torch.tensor([stream.uniform() for stream in streams], device=logits_BV.device)
        if sampling.temperature != 1.0:
            weights_BV = torch.mul(below_BV, 1 / sampling.temperature, out=weights_BV).exp_()
        ids_B1 = draw(weights_BV, sampling, uniform_B)[:, None]
    else:
        ids_B1 = below_BV.argmax(dim=-1, keepdim=True)
    logprobs_B = below_BV.gather(1, ids_B1)[:, 0] - norm_B.log()
    return ids_B1[:, 0].tolist(), logprobs_B.tolist()


def draw(weights_BV: Tensor, sampling: Sampling, uniform_B: Tensor) -> Tensor:
    """The token of each row at which the filtered cumulative distribution passes `uniform_B`. `weights_BV`:
    probabilities relative to that of the most likely token."""
    if sampling.min_p:
        weights_BV.masked_fill_(weights_BV < sampling.min_p, 0.0)
    if not sampling.top_k and sampling.top_p == 1.0:
        return invert(weights_BV, uniform_B)
    kept_BK, index_BK = candidates(weights_BV, sampling)
    if sampling.top_p < 1.0:
        mass_B1 = (kept_BK if sampling.top_k else weights_BV).sum(dim=-1, keepdim=True)
        cut_BK = kept_BK.cumsum(dim=-1) - kept_BK >= sampling.top_p * mass_B1
        cut_BK[:, 0] = False  # the first token always stays, however small top_p is
        kept_BK = kept_BK.masked_fill(cut_BK, 0.0)
    choice_B = invert(kept_BK, uniform_B)
    return index_BK.gather(1, choice_B[:, None])[:, 0]


def candidates(weights_BV: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The most likely tokens, best first: the top k, or at least as many as top-p can need."""
    n_vocab = weights_BV.size(-1)
    if sampling.top_k:
        return weights_BV.topk(min(sampling.top_k, n_vocab), dim=-1)
    kept_BK, index_BK = weights_BV.topk(min(FIRST_CANDIDATES, n_vocab), dim=-1)
    if bool((kept_BK.sum(dim=-1) < sampling.top_p * weights_BV.sum(dim=-1)).any()):
        return weights_BV.sort(dim=-1, descending=True)
    return kept_BK, index_BK


def invert(weights_BK: Tensor, uniform_B: Tensor) -> Tensor:
    """Inverse of the cumulative distribution of weights that need not sum to 1; weight 0 is never chosen.

    In two levels, sums of blocks and then inside one block: a running sum over a whole vocabulary is slow.
    """
    n_rows, n = weights_BK.shape
    if n <= 2 * BLOCK:
        return _invert(weights_BK, uniform_B)[0]
    blocks = F.pad(weights_BK, (0, -n % BLOCK)).view(n_rows, -1, BLOCK)
    block_B, rest_B = _invert(blocks.sum(dim=-1), uniform_B)
    inside_BK = blocks[torch.arange(n_rows, device=blocks.device), block_B]
    return block_B * BLOCK + _invert(inside_BK, rest_B)[0]


def _invert(weights_BK: Tensor, uniform_B: Tensor) -> tuple[Tensor, Tensor]:
    """The index at which the running sum passes uniform * total, and how far (0 to 1) into its weight that is."""
    sums_BK = weights_BK.cumsum(dim=-1)
    total_B = sums_BK[:, -1]
    at_B = torch.minimum(uniform_B * total_B, torch.nextafter(total_B, torch.zeros_like(total_B)))
    index_B1 = torch.searchsorted(sums_BK, at_B[:, None], right=True)
    weight_B = weights_BK.gather(1, index_B1)[:, 0]
    into_B = (at_B - (sums_BK.gather(1, index_B1)[:, 0] - weight_B)) / weight_B
    return index_B1[:, 0], into_B.clamp(0.0, 1.0)
