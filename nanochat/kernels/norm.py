"""Gated RMSNorm, the end of a Mamba-2 block: y * silu(z), then normalised within each group of channels.

    g = y * silu(z)        out = g / sqrt(mean(g^2 over the group) + eps)

Nothing but y and z is kept for the backward pass; all arithmetic is in float32 (float64 for float64 inputs) and rounded
once. No gain: the matrix behind it can absorb one.

Letters: L tokens, E inner width, G groups (G divides E), W = E / G channels of a group.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanochat.kernels.dispatch import choose
from nanochat.kernels.segments import state_dtype

BLOCK = 1 << 17  # elements of the rows that stay in a CPU's cache from one pass to the next


def gated_rms_norm(y: Tensor, z: Tensor, n_group: int, eps: float) -> Tensor:
    """(..., E) in y's dtype: y gated by z (..., E) and normalised within each of the `n_group` groups of channels."""
    op = choose("gated_rms_norm", GATED_RMS_NORM, "blocked", y)
    return op(y, z, n_group, eps)


def gated_rms_norm_ref(y: Tensor, z: Tensor, n_group: int, eps: float) -> Tensor:
    """The oracle: the two formulas above, gradients by plain autograd."""
    wide = state_dtype(y.dtype)
    gated = (y.to(wide) * F.silu(z.to(wide))).unflatten(-1, (n_group, -1))
    return (gated * (gated.square().mean(-1, keepdim=True) + eps).rsqrt()).flatten(-2).to(y.dtype)


def _gated_rms_norm_blocked(y: Tensor, z: Tensor, n_group: int, eps: float) -> Tensor:
    if torch.is_grad_enabled() or y.numel() > BLOCK:
        return _GatedNorm.apply(y, z, n_group, eps)
    gated_LGW = _grouped(F.silu(z.to(state_dtype(y.dtype))).mul_(y), n_group)  # a token: few calls count
    return F.rms_norm(gated_LGW, gated_LGW.shape[-1:], eps=eps).view(y.shape).to(y.dtype)


def _gated_rms_norm_triton(y: Tensor, z: Tensor, n_group: int, eps: float) -> Tensor:
    from nanochat.kernels import triton_norm

    return triton_norm.gated_rms_norm(y, z, n_group, eps)


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor, n_group: int, eps: float) -> Tensor:
        out = torch.empty_like(y, memory_format=torch.contiguous_format)
        out_LGW = _grouped(out, n_group)
        for rows, y_LGW, z_LGW in _blocks(y, z, n_group):
            gated_LGW = torch.sigmoid(z_LGW).mul_(z_LGW).mul_(y_LGW)
            out_LGW[rows] = gated_LGW.mul_(_inverse_rms(gated_LGW, eps))
        ctx.save_for_backward(y, z)
        ctx.n_group, ctx.eps = n_group, eps
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        y, z = ctx.saved_tensors
        dy, dz = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (y, z))
        dout_LGW, dy_LGW, dz_LGW = (_grouped(x, ctx.n_group) for x in (dout, dy, dz))
        for rows, y_LGW, z_LGW in _blocks(y, z, ctx.n_group):
            sigmoid = torch.sigmoid(z_LGW)
            silu = sigmoid * z_LGW
            normed = silu * y_LGW
            inverse = _inverse_rms(normed, ctx.eps)
            normed.mul_(inverse)
            dgated = dout_LGW[rows].to(normed.dtype) * inverse
            along = (dgated * normed).mean(-1, keepdim=True)
            dgated.addcmul_(normed, along, value=-1)
            dy_LGW[rows] = dgated * silu
            # d silu / dz = sigmoid * (1 + z * (1 - sigmoid)) = sigmoid + silu * (1 - sigmoid)
            dz_LGW[rows] = dgated.mul_(y_LGW).mul_(sigmoid.addcmul_(silu, 1 - sigmoid))
        return dy, dz, None, None


def _grouped(x: Tensor, n_group: int) -> Tensor:
    """(..., E) to (L, G, W)."""
    return x.reshape(-1, n_group, x.shape[-1] // n_group)


def _blocks(y: Tensor, z: Tensor, n_group: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows of y and z that stay in cache, in float32 (float64 for float64)."""
    wide = state_dtype(y.dtype)
    y_LGW, z_LGW = _grouped(y, n_group), _grouped(z, n_group)
    n_row = y_LGW.shape[0]
    step = n_row if y.device.type != "cpu" else max(1, BLOCK // y.shape[-1])
    for start in range(0, n_row, max(1, step)):
        rows = slice(start, start + step)
        yield rows, y_LGW[rows].to(wide), z_LGW[rows].to(wide)


def _inverse_rms(x_LGW: Tensor, eps: float) -> Tensor:
    """(L, G, 1): 1 / sqrt(mean square + eps)."""
    return torch.linalg.vector_norm(x_LGW, dim=-1, keepdim=True).square_().div_(x_LGW.shape[-1]).add_(eps).rsqrt_()


GATED_RMS_NORM = {"blocked": _gated_rms_norm_blocked, "triton": _gated_rms_norm_triton, "ref": gated_rms_norm_ref}
