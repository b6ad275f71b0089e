# mypy: disable-error-code="no-untyped-def"
"""Cross-entropy from hidden states on a GPU: matrix products by torch, everything between them in one Triton kernel.

One program takes one row of logits: reads it, computes its loss, and writes d loss / d logits over it in place. Rows of
up to REGISTERS logits are read once and held in registers; longer ones are read twice, the second time from the L2
cache. The logits exist for one chunk of rows at a time, in the dtype of the activations.

Letters: N tokens, D model width, V vocabulary, M rows of one chunk.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanochat.kernels.loss import IGNORE, accumulate, slices
from nanochat.kernels.triton_common import compare, launch, power_of_2, sigmoid

CHUNK_BYTES, CHUNK_ROWS = 256 << 20, 256  # logits of one chunk: large products; and at least so many rows
REGISTERS, BLOCK = 1 << 15, 1 << 13  # longest row held in registers; logits at a time of longer ones


@triton.jit
def _squash(x, scale, CAPPED: tl.constexpr):
    """sigmoid(2 x / softcap) and the capped logit up to a constant that the softmax ignores (see `loss.py`)."""
    if CAPPED:
        s = sigmoid(x * (2.0 / scale))
        z = 2.0 * scale * s
    else:
        s, z = x, x
    return s, z


@triton.jit
def _slope(s, CAPPED: tl.constexpr):
    """d capped logit / d logit."""
    return 4.0 * s * (1.0 - s) if CAPPED else 1.0


@triton.jit
def _rows_kernel(
    logits, targets, weights, losses, n_vocab, softcap, V: tl.constexpr, WHOLE: tl.constexpr, CAPPED: tl.constexpr,
    GRADIENT: tl.constexpr,
):  # fmt: skip
    """losses[row] = weight * nll; with GRADIENT, the row of logits becomes the gradient of that."""
    row = tl.program_id(0).to(tl.int64)
    base, v = logits + row * n_vocab, tl.arange(0, V)
    target = tl.load(targets + row)
    weight = tl.where(target >= 0, tl.load(weights + row), 0.0)
    _wanted, wanted = _squash(tl.load(base + tl.maximum(target, 0)).to(tl.float32), softcap, CAPPED)
    tl.debug_barrier()  # nobody overwrites the target's logit before all have read it
    if WHOLE:
        s_V, z_V = _squash(tl.load(base + v, mask=v < n_vocab, other=0.0).to(tl.float32), softcap, CAPPED)
        z_V = tl.where(v < n_vocab, z_V, -float("inf"))
        top = tl.max(z_V, 0)
        total = tl.sum(tl.exp(z_V - top), 0)
        if GRADIENT:
            d_V = tl.exp(z_V - top) / total - tl.where(v == target, 1.0, 0.0)
            d_V = d_V * weight * _slope(s_V, CAPPED)
            tl.store(base + v, d_V.to(logits.dtype.element_ty), mask=v < n_vocab)
    else:
        # a maximum and a sum for each of the V places, joined at the end
        top_V, total_V = tl.full((V,), -float("inf"), tl.float32), tl.zeros((V,), tl.float32)
        for start in range(0, n_vocab, V):
            inside_V = v < n_vocab - start
            x_V = tl.load(base + start + v, mask=inside_V, other=0.0).to(tl.float32)
            _s_V, z_V = _squash(x_V, softcap, CAPPED)
            z_V = tl.where(inside_V, z_V, -float("inf"))
            new_V = tl.maximum(top_V, z_V)  # finite from the first block on, which is whole
            total_V = total_V * tl.exp(top_V - new_V) + tl.exp(z_V - new_V)
            top_V = new_V
        top = tl.max(top_V, 0)
        total = tl.sum(total_V * tl.exp(top_V - top), 0)
        if GRADIENT:
            for start in range(0, n_vocab, V):
                inside_V = v < n_vocab - start
                x_V = tl.load(base + start + v, mask=inside_V, other=0.0).to(tl.float32)
                s_V, z_V = _squash(x_V, softcap, CAPPED)
                d_V = tl.exp(z_V - top) / total - tl.where(start + v == target, 1.0, 0.0)
                d_V = d_V * weight * _slope(s_V, CAPPED)
                tl.store(base + start + v, d_V.to(logits.dtype.element_ty), mask=inside_V)
    # the target's own probability may underflow: its logarithm is never taken
    tl.store(losses + row, tl.where(weight != 0.0, weight * (tl.log(total) + top - wanted), 0.0))


def cross_entropy_rows(logits_MV: Tensor, targets_M: Tensor, weights_M: Tensor, softcap: float, grad: bool) -> Tensor:
    """(M,) weighted losses in float32; with `grad`, contiguous `logits_MV` is overwritten with their gradient."""
    n_row, n_vocab = logits_MV.shape
    losses_M = torch.empty(n_row, dtype=torch.float32, device=logits_MV.device)
    whole = n_vocab <= REGISTERS
    block = power_of_2(n_vocab) if whole else BLOCK
    launch(
        _rows_kernel, (n_row,), logits_MV, targets_M, weights_M, losses_M, n_vocab, softcap or 1.0, V=block,
        WHOLE=whole, CAPPED=softcap > 0, GRADIENT=grad, num_warps=max(1, min(16, block // 1024)),
    )  # fmt: skip
    return losses_M


@torch.library.custom_op("nanochat::linear_cross_entropy", mutates_args=())
def _loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, softcap: float, chunk: int, need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The loss, and its gradients for hidden (hidden's dtype) and weight (float32), empty where not needed."""
    n_row, n_vocab = hidden.shape[0], weight.shape[0]
    cast = weight.to(hidden.dtype)
    targets, weights = targets.contiguous(), weights.float().contiguous()
    dhidden = torch.empty_like(hidden if need_hidden else hidden[:0], memory_format=torch.contiguous_format)
    dweight = weight.new_zeros(weight.shape if need_weight else 0, dtype=torch.float32)
    total = hidden.new_zeros((), dtype=torch.float32)
    buffer = hidden.new_empty(min(chunk, n_row), n_vocab)
    for part in slices(n_row, chunk):
        logits = torch.mm(hidden[part], cast.t(), out=buffer[: len(targets[part])])
        total += cross_entropy_rows(logits, targets[part], weights[part], softcap, need_hidden or need_weight).sum()
        if need_hidden:
            torch.mm(logits, cast, out=dhidden[part])
        if need_weight:
            accumulate(dweight, logits, hidden[part], first=part.start == 0)
    return total, dhidden, dweight


@_loss.register_fake
def _(
    hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, softcap: float, chunk: int, need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dhidden = torch.empty_like(hidden if need_hidden else hidden[:0], memory_format=torch.contiguous_format)
    dweight = weight.new_empty(weight.shape if need_weight else 0, dtype=torch.float32)
    return hidden.new_empty((), dtype=torch.float32), dhidden, dweight


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)  # nobody differentiates the gradients: no zeros as large as the weight
    ctx.save_for_backward(*output[1:])
    ctx.weight_dtype, ctx.need = inputs[1].dtype, inputs[-2:]


def _backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    dhidden, dweight = ctx.saved_tensors
    need_hidden, need_weight = ctx.need
    if grad is None:
        return (None,) * 8
    dhidden = dhidden * grad.to(dhidden.dtype) if need_hidden else None
    dweight = (dweight * grad).to(ctx.weight_dtype) if need_weight else None
    return dhidden, dweight, None, None, None, None, None, None


_loss.register_autograd(_backward, setup_context=_setup_context)


def linear_cross_entropy(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, weights_N: Tensor, softcap: float = 0.0,
    chunk: int | None = None,
) -> Tensor:  # fmt: skip
    """float32 scalar; `chunk` rows at a time. Nothing here waits for the GPU: ignored rows are computed and dropped."""
    chunk = chunk or max(CHUNK_ROWS, CHUNK_BYTES // (weight_VD.shape[0] * hidden_ND.element_size()))
    need_hidden, need_weight = (torch.is_grad_enabled() and x.requires_grad for x in (hidden_ND, weight_VD))
    return _loss(hidden_ND, weight_VD, targets_N, weights_N, softcap, chunk, need_hidden, need_weight)[0]


def self_check(device: torch.device) -> None:
    """Loss and gradients on this GPU against the reference in float64; AssertionError where they differ."""
    from nanochat.kernels.loss import linear_cross_entropy_ref

    g = torch.Generator().manual_seed(0)
    n_row, width = 7, 64
    for n_vocab, dtype, tolerance in ((REGISTERS - 24, torch.float32, 5e-3), (REGISTERS + 1000, torch.bfloat16, 3e-2)):
        given = [torch.randn(n_row, width, generator=g), torch.randn(n_vocab, width, generator=g) * 0.1]
        targets = torch.randint(IGNORE, n_vocab, (n_row,), generator=g).to(device)
        weights = torch.rand(n_row, generator=g).to(device)
        compare(
            lambda h, w, t=targets, p=weights: linear_cross_entropy(h, w, t, p, 15.0, 4),
            lambda h, w, t=targets, p=weights: linear_cross_entropy_ref(h, w, t, p, 15.0),
            [x.to(device, dtype) for x in given], tolerance, str(dtype),
        )  # fmt: skip
