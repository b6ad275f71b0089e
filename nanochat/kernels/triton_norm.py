# mypy: disable-error-code="no-untyped-def"
"""Gated RMSNorm in Triton: one program a token and group, each of its channels read and written once.

Letters: L tokens, G groups, W channels of a group.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanochat.kernels.triton_common import compare, launch, power_of_2, sigmoid


@triton.jit
def _load_gated(y, z, y_row, z_row, eps, W: tl.constexpr, BW: tl.constexpr):
    """y, sigmoid(z), silu(z) and the normalised product of one token and group, and 1 / rms of the product."""
    row, w = tl.program_id(0).to(tl.int64), tl.arange(0, BW)
    at = tl.program_id(1) * W + w
    y_W = tl.load(y + row * y_row + at, mask=w < W, other=0.0).to(tl.float32)
    z_W = tl.load(z + row * z_row + at, mask=w < W, other=0.0).to(tl.float32)
    sigmoid_W = sigmoid(z_W)
    silu_W = z_W * sigmoid_W
    gated_W = y_W * silu_W
    inverse = 1.0 / tl.sqrt(tl.sum(gated_W * gated_W, 0) / W + eps)
    return y_W, sigmoid_W, silu_W, gated_W * inverse, inverse


@triton.jit
def _forward_kernel(y, z, out, y_row, z_row, out_row, eps, W: tl.constexpr, BW: tl.constexpr):
    _, _, _, normed_W, _ = _load_gated(y, z, y_row, z_row, eps, W, BW)
    row, w = tl.program_id(0).to(tl.int64), tl.arange(0, BW)
    tl.store(out + row * out_row + tl.program_id(1) * W + w, normed_W.to(out.dtype.element_ty), mask=w < W)


@triton.jit
def _backward_kernel(
    y, z, dout, dy, dz, y_row, z_row, dout_row, out_row, eps, W: tl.constexpr, BW: tl.constexpr
):  # fmt: skip
    y_W, sigmoid_W, silu_W, normed_W, inverse = _load_gated(y, z, y_row, z_row, eps, W, BW)
    row, w = tl.program_id(0).to(tl.int64), tl.arange(0, BW)
    at = tl.program_id(1) * W + w
    dout_W = tl.load(dout + row * dout_row + at, mask=w < W, other=0.0).to(tl.float32)
    dgated_W = inverse * (dout_W - normed_W * (tl.sum(dout_W * normed_W, 0) / W))
    dz_W = dgated_W * y_W * (sigmoid_W + silu_W * (1.0 - sigmoid_W))
    tl.store(dy + row * out_row + at, (dgated_W * silu_W).to(dy.dtype.element_ty), mask=w < W)
    tl.store(dz + row * out_row + at, dz_W.to(dz.dtype.element_ty), mask=w < W)


def _rows(x: Tensor) -> Tensor:
    """(L, E), copied only when the tokens do not lie at one distance or the channels not side by side."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def _options(n_channel: int) -> dict[str, int]:
    block = power_of_2(n_channel)
    return {"W": n_channel, "BW": block, "num_warps": max(1, min(16, block // 512))}


@torch.library.custom_op("nanochat::gated_rms_norm", mutates_args=())
def _gated_rms_norm(y: Tensor, z: Tensor, n_group: int, eps: float) -> Tensor:
    out = torch.empty_like(y, memory_format=torch.contiguous_format)
    y_LE, z_LE = _rows(y), _rows(z)
    n_row, n_inner = y_LE.shape
    launch(
        _forward_kernel, (n_row, n_group), y_LE, z_LE, out, y_LE.stride(0), z_LE.stride(0), n_inner, eps,
        **_options(n_inner // n_group),
    )  # fmt: skip
    return out


@torch.library.custom_op("nanochat::gated_rms_norm_backward", mutates_args=())
def _gated_rms_norm_backward(dout: Tensor, y: Tensor, z: Tensor, n_group: int, eps: float) -> tuple[Tensor, Tensor]:
    dy, dz = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (y, z))
    y_LE, z_LE, dout_LE = _rows(y), _rows(z), _rows(dout)
    n_row, n_inner = y_LE.shape
    launch(
        _backward_kernel, (n_row, n_group), y_LE, z_LE, dout_LE, dy, dz, y_LE.stride(0), z_LE.stride(0),
        dout_LE.stride(0), n_inner, eps, **_options(n_inner // n_group),
    )  # fmt: skip
    return dy, dz


@_gated_rms_norm.register_fake
def _(y: Tensor, z: Tensor, n_group: int, eps: float) -> Tensor:
    return torch.empty_like(y, memory_format=torch.contiguous_format)


@_gated_rms_norm_backward.register_fake
def _(dout: Tensor, y: Tensor, z: Tensor, n_group: int, eps: float) -> tuple[Tensor, Tensor]:
    dy, dz = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (y, z))
    return dy, dz


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y, z, ctx.n_group, ctx.eps = inputs
    ctx.save_for_backward(y, z)


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    return *_gated_rms_norm_backward(dout, *ctx.saved_tensors, ctx.n_group, ctx.eps), None, None


_gated_rms_norm.register_autograd(_backward, setup_context=_setup_context)


def gated_rms_norm(y: Tensor, z: Tensor, n_group: int, eps: float) -> Tensor:
    """(..., E) in y's dtype; y and z need not be contiguous."""
    return _gated_rms_norm(y, z, n_group, eps)


def self_check(device: torch.device) -> None:
    """Outputs and gradients on this GPU against the reference in float64; AssertionError where they differ."""
    from nanochat.kernels.norm import gated_rms_norm_ref

    g = torch.Generator().manual_seed(0)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        given = [torch.randn(5, 2 * 300, generator=g).to(device, dtype) for _ in range(2)]
        compare(
            lambda y, z: gated_rms_norm(y, z, 2, 1e-6), lambda y, z: gated_rms_norm_ref(y, z, 2, 1e-6), given,
            tolerance, str(dtype),
        )  # fmt: skip
