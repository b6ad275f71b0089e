"""Cross-entropy straight from hidden states: the (N, V) logits exist only a chunk of rows at a time.

Letters: N tokens, D model width, V vocabulary, M rows of one chunk. Targets of -1 are ignored. With `softcap` > 0 the
logits are softcap * tanh(hidden @ weight.T / softcap).

The gradients are computed while a chunk's logits are at hand, so that the product with the weight is done once:
three matmuls a chunk, and a handful of passes over a buffer that stays in cache.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanochat.kernels.dispatch import choose

IGNORE = -1
# logits of one chunk: small enough for a CPU's cache, but with fewer than CHUNK_ROWS rows the matmuls starve
CHUNK_BYTES, CHUNK_ROWS, CHUNK_BYTES_MAX = 8 << 20, 512, 64 << 20
COLUMNS = 4096  # of the vocabulary, that one CPU matmul takes at a time
BOUNDED = 20.0  # softcap up to which e^(2 * softcap), summed over any vocabulary, fits float32 and bf16 by far
BLOCK_BYTES = 8 << 20  # rows of logits that the passes between the matmuls take at a time: stays in cache


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
    op = choose("linear_cross_entropy", LINEAR_CROSS_ENTROPY, "chunked", hidden_ND)
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
        logits_MV = (hidden_ND[rows] * (2 / softcap if softcap else 1.0)) @ weight_VD.t()
        out_N[rows] = _logits_to_gradient(logits_MV, targets_N[rows, None], softcap, gradient=False)[0][:, 0]
    return out_N


def _chunk_rows(n_vocab: int, n_bytes: int) -> int:
    row = n_vocab * n_bytes
    return max(16, min(max(CHUNK_ROWS, CHUNK_BYTES // row), CHUNK_BYTES_MAX // row))


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


def _linear_cross_entropy_triton(*inputs: Any) -> Tensor:
    from nanochat.kernels import triton_loss

    return triton_loss.linear_cross_entropy(*inputs)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        hidden_ND, weight_VD, targets_N, weights_N, softcap, chunk, grad_enabled = inputs
        need_hidden, need_weight = (grad_enabled and need for need in ctx.needs_input_grad[:2])
        wide = _wide(hidden_ND.dtype)
        cast_VD = weight_VD.to(hidden_ND.dtype)
        dhidden_ND = torch.zeros_like(hidden_ND) if need_hidden else None
        dweight_VD = torch.empty_like(weight_VD, dtype=wide) if need_weight else None
        if dweight_VD is not None and not len(hidden_ND):
            dweight_VD.zero_()
        total = hidden_ND.new_zeros((), dtype=wide)
        n_row, n_vocab = hidden_ND.shape[0], weight_VD.shape[0]
        buffer_MV = hidden_ND.new_empty(min(chunk, n_row), n_vocab)
        # blocks of columns fit a CPU's cache; a half-precision sum over blocks would be rounded once a block
        blocked = hidden_ND.dtype == wide and hidden_ND.device.type == "cpu"
        columns = slices(n_vocab, COLUMNS if blocked else n_vocab)
        # the inner derivatives of the softcap are factors of whole rows: they go to narrow tensors, never to wide ones
        gain_in, gain_out = (2 / softcap, 4.0) if softcap else (1.0, 1.0)
        for part in slices(n_row, chunk):
            hidden_MD, weights_M1 = hidden_ND[part], weights_N[part, None].to(wide)
            logits_MV = buffer_MV[: hidden_MD.shape[0]]
            scaled_MD = hidden_MD * gain_in if softcap else hidden_MD
            for cols in columns:
                torch.mm(scaled_MD, cast_VD[cols].t(), out=logits_MV[:, cols])
            need = need_hidden or need_weight
            nll_M1, factors_M1 = _logits_to_gradient(logits_MV, targets_N[part, None], softcap, need)
            total += (nll_M1 * weights_M1).sum()
            rows_M1 = weights_M1 * gain_out if factors_M1 is None else weights_M1 * gain_out * factors_M1
            scaled_MD = (hidden_MD * rows_M1).to(hidden_MD.dtype)
            for cols in columns:
                if dweight_VD is not None:
                    accumulate(dweight_VD[cols], logits_MV[:, cols], scaled_MD, first=part.start == 0)
                if dhidden_ND is not None:
                    dhidden_ND[part].addmm_(logits_MV[:, cols], cast_VD[cols])
            if dhidden_ND is not None:
                dhidden_ND[part] *= rows_M1
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


def _logits_to_gradient(
    logits_MV: Tensor, targets_M1: Tensor, softcap: float, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Losses (M, 1); with `gradient`, overwrite the logits with d loss / d logits, a few cached rows at a time, and
    return the factors of the rows (M, 1) that they still lack (None: none).

    With a softcap, `logits` come multiplied by 2 / softcap, and the factor 4 of their gradient is left to the caller:
    softcap * tanh(x / softcap) is 2 * softcap * s minus a constant that the softmax ignores, s = sigmoid(2x / softcap);
    sigmoid is vectorised where tanh is ten times slower. Its derivative is 4 s (1 - s).
    """
    n_row, n_vocab = logits_MV.shape
    wide = _wide(logits_MV.dtype)
    n_block = max(1, BLOCK_BYTES // (n_vocab * 4))
    bounded = 0 < softcap <= BOUNDED and logits_MV.dtype != torch.float16
    buffer = logits_MV.new_empty(min(n_block, n_row), n_vocab, dtype=wide)
    narrow = torch.empty_like(buffer) if softcap and logits_MV.dtype != wide else buffer
    losses, factors = [], []
    for start in range(0, n_row, n_block):
        logits, targets = logits_MV[start : start + n_block], targets_M1[start : start + n_block]
        block = buffer[: logits.shape[0]]
        if softcap:
            squashed = logits if logits.dtype == wide else narrow[: logits.shape[0]].copy_(logits)
            squashed.sigmoid_()
            torch.mul(squashed, 2 * softcap / (math.log(2) if bounded else 1.0), out=block)
        elif logits.dtype == wide:
            block = logits
        else:
            block.copy_(logits)
        target = block.gather(1, targets)
        if bounded:  # no largest logit to take away first, and the sum goes into the factors
            torch.exp2(block, out=block)
            sums = block.sum(-1, keepdim=True)
            losses.append(sums.log2().sub_(target).mul_(math.log(2)))
            factors.append(sums.reciprocal())
        else:
            top = block.amax(-1, keepdim=True)
            torch.softmax(block, -1, out=block)
            # the largest probability is at least 1 / V, so this holds where the target's own has underflowed
            losses.append(top - target - block.amax(-1, keepdim=True).log_())
            sums = block.new_ones(()).expand_as(targets)
        if gradient:
            block.scatter_add_(1, targets, -sums)
            if softcap:
                torch.ops.aten.sigmoid_backward.grad_input(block, squashed, grad_input=block)
            if block is not logits:
                logits.copy_(block)
    if not losses:  # every target ignored
        return logits_MV.new_zeros(0, 1, dtype=wide), None
    return torch.cat(losses), torch.cat(factors) if bounded else None


def accumulate(total_VD: Tensor, gradient_MV: Tensor, hidden_MD: Tensor, first: bool) -> None:
    """total (+)= gradient.T @ hidden; the first one overwrites what was never set."""
    if total_VD.dtype == hidden_MD.dtype:
        total_VD.addmm_(gradient_MV.t(), hidden_MD, beta=0 if first else 1)
    elif first:
        total_VD.copy_(gradient_MV.t() @ hidden_MD)
    else:
        total_VD += gradient_MV.t() @ hidden_MD


def slices(n: int, step: int) -> list[slice]:
    """0 .. n in steps."""
    return [slice(i, min(i + step, n)) for i in range(0, n, step)]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


LINEAR_CROSS_ENTROPY = {
    "chunked": _linear_cross_entropy_chunked,
    "triton": _linear_cross_entropy_triton,
    "ref": linear_cross_entropy_ref,
}
