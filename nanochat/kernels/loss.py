"""Cross-entropy straight from hidden states: the (N, V) logits exist only a chunk of rows at a time.

Letters: N tokens, D model width, V vocabulary, M rows of one chunk. Targets of -1 are ignored. With `softcap` > 0 the
logits are softcap * tanh(hidden @ weight.T / softcap).

The gradients are computed while a chunk's logits are at hand, so that the product with the weight is done once:
three matmuls a chunk, and a handful of passes over a buffer that stays in cache.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanochat.kernels.dispatch import choose

IGNORE = -1
CHUNK_BYTES = 16 << 20  # logits of one chunk


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    weights_N: Tensor,
    softcap: float = 0.0,
    chunk: int | None = None,
) -> Tensor:
    """float32 scalar: sum over n of weights[n] * -log softmax(logits[n])[targets[n]].

    Gradients for hidden and weight. `weight_VD` is cast to hidden's dtype for the matmuls; its gradient is accumulated
    in float32. `chunk` is the number of rows at a time (None: chosen from the vocabulary's size).
    """
    op = choose("linear_cross_entropy", LINEAR_CROSS_ENTROPY, "chunked")
    return op(hidden_ND, weight_VD, targets_N, weights_N, softcap, chunk)


def linear_cross_entropy_ref(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    weights_N: Tensor,
    softcap: float = 0.0,
    chunk: int | None = None,
) -> Tensor:
    """The oracle: all logits at once, in float32 (float64 for float64 inputs), gradients by plain autograd."""
    dtype = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
    logits_NV = hidden_ND.to(dtype) @ weight_VD.to(dtype).t()
    if softcap:
        logits_NV = softcap * torch.tanh(logits_NV / softcap)
    keep_N = targets_N != IGNORE
    picked_N = logits_NV.log_softmax(-1).gather(1, targets_N.clamp(min=0)[:, None])[:, 0]
    return -(torch.where(keep_N, picked_N, 0.0) * weights_N.to(dtype)).sum()


@torch.no_grad()
def linear_nll(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, softcap: float = 0.0) -> Tensor:
    """(N,) float32: -log softmax(logits[n])[targets[n]], 0 where the target is ignored. All math in float32."""
    hidden_ND, weight_VD = hidden_ND.float(), weight_VD.float()
    out_N = hidden_ND.new_zeros(hidden_ND.shape[0])
    rows_M = torch.nonzero(targets_N != IGNORE)[:, 0]
    for rows in rows_M.split(_chunk_rows(weight_VD.shape[0], 4)):
        logits_MV = hidden_ND[rows] @ weight_VD.t()
        if softcap:
            logits_MV.div_(softcap).tanh_().mul_(softcap)
        picked_M = logits_MV.gather(1, targets_N[rows, None])[:, 0]
        out_N[rows] = logits_MV.logsumexp(-1) - picked_M
    return out_N


def _chunk_rows(n_vocab: int, n_bytes: int) -> int:
    return max(16, CHUNK_BYTES // (n_vocab * n_bytes))


def _linear_cross_entropy_chunked(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    weights_N: Tensor,
    softcap: float = 0.0,
    chunk: int | None = None,
) -> Tensor:
    # rows without a say are dropped before the matmul: padding and prompts are most of a fine-tuning batch
    rows = torch.nonzero((targets_N != IGNORE) & (weights_N != 0))[:, 0]
    if len(rows) < len(targets_N):
        hidden_ND, targets_N, weights_N = hidden_ND[rows], targets_N[rows], weights_N[rows]
    chunk = chunk or _chunk_rows(weight_VD.shape[0], hidden_ND.element_size())
    need = torch.is_grad_enabled()
    return _ChunkedLoss.apply(hidden_ND, weight_VD, targets_N, weights_N, softcap, chunk, need)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        hidden_ND, weight_VD, targets_N, weights_N, softcap, chunk, grad_enabled = inputs
        need_hidden, need_weight = (grad_enabled and need for need in ctx.needs_input_grad[:2])
        wide = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
        cast_VD = weight_VD.to(hidden_ND.dtype)
        dhidden_ND = torch.empty_like(hidden_ND) if need_hidden else None
        dweight_VD = torch.zeros_like(weight_VD, dtype=wide) if need_weight else None
        total = hidden_ND.new_zeros((), dtype=wide)
        n_row, n_vocab = hidden_ND.shape[0], weight_VD.shape[0]
        buffers = [hidden_ND.new_empty(min(chunk, n_row), n_vocab) for _ in range(2 if softcap else 1)]
        for start in range(0, n_row, chunk):
            part = slice(start, min(start + chunk, n_row))
            hidden, targets = hidden_ND[part], targets_N[part, None]
            weights = weights_N[part, None].to(wide)
            probs_MV, nll = _probabilities(hidden, cast_VD, targets, softcap, buffers)
            total += (nll * weights).sum()
            if dhidden_ND is not None or dweight_VD is not None:
                _logit_gradient(probs_MV, targets, softcap, buffers)
            # a row's weight scales its (narrow) hidden vector or gradient, never its (wide) logits
            if dweight_VD is not None:
                scaled = (hidden * weights).to(hidden.dtype)
                if dweight_VD.dtype == hidden.dtype:
                    dweight_VD.addmm_(probs_MV.t(), scaled)
                else:
                    dweight_VD += probs_MV.t() @ scaled
            if dhidden_ND is not None:
                torch.mul(probs_MV @ cast_VD, weights, out=dhidden_ND[part])
        ctx.save_for_backward(dhidden_ND, dweight_VD)
        ctx.weight_dtype = weight_VD.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dhidden_ND, dweight_VD = ctx.saved_tensors
        dhidden_ND = None if dhidden_ND is None else dhidden_ND * grad.to(dhidden_ND.dtype)
        dweight_VD = None if dweight_VD is None else (dweight_VD * grad).to(ctx.weight_dtype)
        return dhidden_ND, dweight_VD, None, None, None, None, None


def _probabilities(
    hidden_MD: Tensor, weight_VD: Tensor, targets_M1: Tensor, softcap: float, buffers: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Softmax of the chunk's logits in `buffers[-1]`, and the losses (M, 1); `buffers[0]` keeps the tanh."""
    buffers = [buffer[: hidden_MD.shape[0]] for buffer in buffers]
    wide = torch.float64 if hidden_MD.dtype == torch.float64 else torch.float32
    logits_MV = buffers[0]
    if softcap:
        torch.mm(hidden_MD / softcap, weight_VD.t(), out=logits_MV).tanh_()
        logits_MV = torch.mul(logits_MV, softcap, out=buffers[1])
    else:
        torch.mm(hidden_MD, weight_VD.t(), out=logits_MV)
    lse = torch.logsumexp(logits_MV.to(wide), -1, keepdim=True)
    nll = lse - logits_MV.gather(1, targets_M1)
    return torch.softmax(logits_MV, -1), nll


def _logit_gradient(probs_MV: Tensor, targets_M1: Tensor, softcap: float, buffers: list[Tensor]) -> None:
    """Softmax to gradient of the loss with respect to hidden @ weight.T, in place."""
    probs_MV.scatter_add_(1, targets_M1, torch.full_like(targets_M1, -1, dtype=probs_MV.dtype))
    if softcap:
        tanh_MV = buffers[0][: probs_MV.shape[0]]
        probs_MV.mul_(1 - tanh_MV * tanh_MV)


LINEAR_CROSS_ENTROPY = {"chunked": _linear_cross_entropy_chunked, "ref": linear_cross_entropy_ref}
