"""Causal attention as batched products, for training on a CPU: torch's fused kernel is slow there in its backward pass.

Queries go a block at a time against the keys up to the block's end, for as many heads as keep the scores in cache. The
probabilities are kept for the backward pass where they are few, and made again where they are many.

Letters: B batch, T time, H heads, P head width, Y = B * H.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

QUERIES = 128  # of a block, at most
SCORES = 1 << 19  # of one product, at most: they stay in a CPU's cache
KEPT = 1 << 23  # probabilities of a call that are kept for the backward pass, at most


def fits(q_BTHP: Tensor, k_BTGP: Tensor) -> bool:
    """Whether this is faster than the fused kernel: gradients on a CPU, outside of torch.compile."""
    return (
        q_BTHP.device.type == "cpu"
        and torch.is_grad_enabled()
        and (q_BTHP.requires_grad or k_BTGP.requires_grad)
        and not torch.compiler.is_compiling()
    )


def causal(q_BTHP: Tensor, k_BTGP: Tensor, v_BTGP: Tensor, scale: float | None) -> Tensor:
    """Position i sees the keys 0..i: (B, T, H, P). G divides H."""
    repeats = q_BTHP.shape[2] // k_BTGP.shape[2]
    if repeats > 1:
        k_BTGP, v_BTGP = (x.repeat_interleave(repeats, 2) for x in (k_BTGP, v_BTGP))
    scale = q_BTHP.shape[3] ** -0.5 if scale is None else scale
    y: Tensor = _CausalProducts.apply(q_BTHP, k_BTGP, v_BTGP, scale)
    return y


class _CausalProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BTHP: Tensor, k_BTHP: Tensor, v_BTHP: Tensor, scale: float) -> Tensor:
        q, k, v = (_by_head(x) for x in (q_BTHP, k_BTHP, v_BTHP))
        y = torch.empty_like(q)
        keep = q.shape[0] * q.shape[1] ** 2 <= KEPT
        kept = []
        for heads, rows in _tiles(*q.shape[:2]):
            probs = _probabilities(q[heads, rows], k[heads, : rows.stop], scale)
            y[heads, rows] = torch.bmm(probs, v[heads, : rows.stop])
            if keep:
                kept.append(probs)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.scale, ctx.shape = scale, q_BTHP.shape
        return _from_heads(y, ctx.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BTHP: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        dy = _by_head(dy_BTHP)
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        tiles = list(_tiles(*q.shape[:2]))
        for i in reversed(range(len(tiles))):  # the last queries see all keys: they write, the others add
            heads, rows = tiles[i]
            keys = slice(rows.stop)
            probs = kept[i] if kept else _probabilities(q[heads, rows], k[heads, keys], ctx.scale)
            dprobs = torch.bmm(dy[heads, rows], v[heads, keys].mT)
            dscores = torch._softmax_backward_data(dprobs, probs, -1, probs.dtype)
            dq[heads, rows] = torch.bmm(dscores, k[heads, keys])
            new = 0 if rows.stop == q.shape[1] else 1
            dk[heads, keys].baddbmm_(dscores.mT, q[heads, rows], beta=new)
            dv[heads, keys].baddbmm_(probs.mT, dy[heads, rows], beta=new)
        return *(_from_heads(x, ctx.shape) for x in (dq.mul_(ctx.scale), dk.mul_(ctx.scale), dv)), None


def _probabilities(q_YTP: Tensor, k_YSP: Tensor, scale: float) -> Tensor:
    """(Y, T, S): softmax of the scores of T queries that stand at the end of S keys."""
    n_time, n_source = q_YTP.shape[1], k_YSP.shape[1]
    scores = torch.bmm(q_YTP, k_YSP.mT).mul_(scale)
    later = torch.full((n_time, n_time), -torch.inf, dtype=scores.dtype, device=scores.device).triu_(1)
    scores[:, :, n_source - n_time :].add_(later)
    return torch.softmax(scores, -1)


def _tiles(n_head: int, n_time: int) -> Iterator[tuple[slice, slice]]:
    """Heads and queries of one product after the other, the queries in ascending order."""
    n_block = -(-n_time // QUERIES)
    size = -(-n_time // n_block)
    for begin in range(0, n_time, size):
        rows = slice(begin, min(begin + size, n_time))
        step = max(1, SCORES // (size * rows.stop))
        for first in range(0, n_head, step):
            yield slice(first, first + step), rows


def _by_head(x_BTHP: Tensor) -> Tensor:
    """(Y, T, P), contiguous."""
    return x_BTHP.transpose(1, 2).reshape(-1, x_BTHP.shape[1], x_BTHP.shape[3])


def _from_heads(x_YTP: Tensor, shape: torch.Size) -> Tensor:
    """(B, T, H, P), a view."""
    return x_YTP.view(shape[0], shape[2], shape[1], shape[3]).transpose(1, 2)
