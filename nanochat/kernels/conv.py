"""Causal depthwise convolution over time, then SiLU: the short convolution of the Mamba blocks.

    y[t, e] = silu(bias[e] + sum_k weight[e, k] * x[t - K + 1 + k, e])

Letters: B batch, T time, E inner width, K kernel width. The state is the last K-1 inputs, oldest first: (B, K-1, E).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanochat.kernels.dispatch import choose
from nanochat.kernels.external import conv_causal_conv1d, run
from nanochat.kernels.segments import resets, state_dtype

MAX_TAPS = 4  # of the Triton kernel, which keeps the inputs under the window in registers
BLOCK = 1 << 18  # elements that stay in a CPU's cache while the taps pass over them: a few rows, or a part of one


def causal_conv(
    x_BTE: Tensor,
    weight_EK: Tensor,
    bias_E: Tensor | None = None,
    state: Tensor | None = None,
    segments_BT: Tensor | None = None,
    lengths: Tensor | None = None,
    activation: bool = True,
) -> tuple[Tensor, Tensor]:
    """Convolve, add the bias and (with `activation`) apply SiLU; returns `y_BTE` and the new state (B, K-1, E).

    `state` holds the K-1 inputs before the first token (zeros when None). `segments_BT` (int) numbers documents: the
    window never reaches into an earlier one. `lengths` (B,): rows are right-padded, the returned state holds the last
    K-1 inputs before position `lengths`.
    """
    unfit = f"more than {MAX_TAPS} taps" if weight_EK.shape[1] > MAX_TAPS else ""
    inputs = (x_BTE, weight_EK, bias_E, state, segments_BT, lengths, activation)
    return run("causal_conv", CAUSAL_CONV, "shifted", unfit, inputs)


def causal_conv_ref(
    x_BTE: Tensor,
    weight_EK: Tensor,
    bias_E: Tensor | None = None,
    state: Tensor | None = None,
    segments_BT: Tensor | None = None,
    lengths: Tensor | None = None,
    activation: bool = True,
) -> tuple[Tensor, Tensor]:
    """The oracle: a window a step, gradients by plain autograd."""
    n_kernel = weight_EK.shape[1]
    padded = _with_state(x_BTE, n_kernel, state)
    document = None if segments_BT is None else resets(segments_BT).cumsum(1)
    ys = []
    for t in range(x_BTE.shape[1]):
        window_BKE = padded[:, t : t + n_kernel]
        if document is not None:
            inside = F.pad(document, (n_kernel - 1, 0))[:, t : t + n_kernel] == document[:, t, None]
            window_BKE = torch.where(inside[:, :, None], window_BKE, 0.0)
        y_BE = (window_BKE * weight_EK.t().to(x_BTE.dtype)).sum(1)
        ys.append(y_BE if bias_E is None else y_BE + bias_E.to(x_BTE.dtype))
    y_BTE = torch.stack(ys, 1)
    return (F.silu(y_BTE) if activation else y_BTE), _final_state(padded, n_kernel, lengths)


def causal_conv_step(
    x_BE: Tensor, weight_EK: Tensor, bias_E: Tensor | None, state: Tensor, activation: bool = True
) -> Tensor:
    """One token of decoding, no gradient: shifts `state` (B, K-1, E) in place and returns `y_BE`."""
    op = choose("causal_conv_step", CAUSAL_CONV_STEP, "torch", x_BE)
    return op(x_BE, weight_EK, bias_E, state, activation)


def _causal_conv_step_torch(
    x_BE: Tensor, weight_EK: Tensor, bias_E: Tensor | None, state: Tensor, activation: bool = True
) -> Tensor:
    window_BKE = torch.cat((state, x_BE[:, None].to(state.dtype)), 1)
    state.copy_(window_BKE[:, 1:])
    y_BE = window_BKE.mul_(weight_EK.t().contiguous()).sum(1).to(x_BE.dtype)
    if bias_E is not None:
        y_BE += bias_E.to(x_BE.dtype)
    return F.silu(y_BE, inplace=True) if activation else y_BE


def _with_state(x_BTE: Tensor, n_kernel: int, state: Tensor | None) -> Tensor:
    """The inputs with the K-1 before them in front: (B, K-1+T, E)."""
    if state is None:
        return F.pad(x_BTE, (0, 0, n_kernel - 1, 0))
    return torch.cat((state.to(x_BTE.dtype), x_BTE), 1)


def _final_state(padded: Tensor, n_kernel: int, lengths: Tensor | None) -> Tensor:
    if lengths is None:
        return padded[:, padded.shape[1] - (n_kernel - 1) :].clone()
    index = lengths[:, None].to(torch.int64) + torch.arange(n_kernel - 1, device=padded.device)
    return padded.gather(1, index[:, :, None].expand(-1, -1, padded.shape[2]))


def final_state(x_BTE: Tensor, past: Tensor, lengths: Tensor | None) -> Tensor:
    """The last K-1 inputs of each row, (B, K-1, E), given those before it, `past`; nothing else is copied."""
    n_time, n_past = x_BTE.shape[1], past.shape[1]
    if lengths is None:
        return torch.cat((past[:, n_time:], x_BTE[:, max(0, n_time - n_past) :]), 1)
    index = lengths[:, None, None] + torch.arange(n_past, device=x_BTE.device)[:, None]
    index = index.expand(-1, -1, x_BTE.shape[2]).to(torch.int64)
    before, inside = past.gather(1, index.clamp(max=n_past - 1)), x_BTE.gather(1, (index - n_past).clamp(min=0))
    return torch.where(index < n_past, before, inside)


def _causal_conv_shifted(
    x_BTE: Tensor,
    weight_EK: Tensor,
    bias_E: Tensor | None = None,
    state: Tensor | None = None,
    segments_BT: Tensor | None = None,
    lengths: Tensor | None = None,
    activation: bool = True,
) -> tuple[Tensor, Tensor]:
    n_kernel = weight_EK.shape[1]
    past = x_BTE.new_zeros(x_BTE.shape[0], n_kernel - 1, x_BTE.shape[2]) if state is None else state.to(x_BTE.dtype)
    inside = None if segments_BT is None else _inside(segments_BT, n_kernel).to(state_dtype(x_BTE.dtype))
    y_BTE = _ShiftedConv.apply(x_BTE, weight_EK, bias_E, past, inside, activation)
    return y_BTE, final_state(x_BTE, past, lengths)


def _inside(segments_BT: Tensor, n_kernel: int) -> Tensor:
    """(K, B, T) bool: the input `lag` positions before belongs to the same document."""
    document = F.pad(resets(segments_BT).cumsum(1), (n_kernel - 1, 0))
    return (document.unfold(1, n_kernel, 1) == document[:, n_kernel - 1 :, None]).permute(2, 0, 1).flip(0)


class _ShiftedConv(torch.autograd.Function):
    """One multiply-add a tap, over a block of inputs at a time so that every tap finds them in cache."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x_BTE, weight_EK, bias_E, past, inside, activation = inputs
        dtype = state_dtype(x_BTE.dtype)
        taps_KE = weight_EK.t().flip(0).to(dtype).contiguous()  # by lag
        bias = taps_KE.new_zeros(taps_KE.shape[1]) if bias_E is None else bias_E.to(dtype)
        linear_BTE = torch.empty_like(x_BTE, memory_format=torch.contiguous_format)
        y_BTE = torch.empty_like(linear_BTE) if activation else linear_BTE
        for block in _blocks(x_BTE, past.shape[1]):
            rows, times = block
            x, before, linear = x_BTE[block].to(dtype), _before(block, x_BTE, past).to(dtype), linear_BTE[block]
            out = linear if linear.dtype == dtype else torch.empty_like(x)
            torch.addcmul(bias, x, taps_KE[0], out=out)
            for lag in range(1, len(taps_KE)):
                source = x[:, :-lag] if inside is None else x[:, :-lag] * inside[lag, rows, times][:, lag:, None]
                out[:, lag:].addcmul_(source, taps_KE[lag])
                head = before[:, before.shape[1] - lag :][:, : out.shape[1]]
                if inside is not None:
                    head = head * inside[lag, rows, times][:, :lag, None]
                out[:, :lag].addcmul_(head, taps_KE[lag])
            if out is not linear:
                linear.copy_(out)
            if activation:
                torch.ops.aten.silu.out(linear, out=y_BTE[block])
        ctx.save_for_backward(x_BTE, weight_EK, past, inside, linear_BTE if activation else None)
        ctx.bias_dtype = None if bias_E is None else bias_E.dtype
        return y_BTE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BTE: Tensor) -> tuple[Tensor | None, ...]:
        x_BTE, weight_EK, past, inside, linear_BTE = ctx.saved_tensors
        dtype = state_dtype(x_BTE.dtype)
        taps_KE = weight_EK.t().flip(0).to(dtype).contiguous()
        dx_BTE = torch.empty_like(x_BTE, memory_format=torch.contiguous_format)
        dpast, dtaps_KE = torch.zeros_like(past, dtype=dtype), torch.zeros_like(taps_KE)
        dbias_E = torch.zeros_like(taps_KE[0])
        for block in reversed(_blocks(x_BTE, past.shape[1])):
            rows, times = block
            x, before, grad = x_BTE[block].to(dtype), _before(block, x_BTE, past).to(dtype), dy_BTE[block]
            if linear_BTE is not None:
                grad = torch.ops.aten.silu_backward(grad, linear_BTE[block])
            grad = grad.to(dtype)
            dbias_E += grad.sum((0, 1))
            dx = grad * taps_KE[0]
            dtaps_KE[0] += (grad * x).sum((0, 1))
            if times.stop < x_BTE.shape[1]:  # what the block behind this one, done before, found for this one's end
                dx[:, dx.shape[1] - dpast.shape[1] :] += dpast[rows]
                dpast[rows] = 0.0
            for lag in range(1, len(taps_KE)):
                late = grad if inside is None else grad * inside[lag, rows, times, None]
                head, late = late[:, :lag], late[:, lag:]
                dx[:, : late.shape[1]].addcmul_(late, taps_KE[lag])
                part = slice(before.shape[1] - lag, before.shape[1] - lag + head.shape[1])
                dpast[rows, part].addcmul_(head, taps_KE[lag])
                dtaps_KE[lag] += (late * x[:, :-lag]).sum((0, 1)) + (head * before[:, part]).sum((0, 1))
            dx_BTE[block] = dx
        dbias = None if ctx.bias_dtype is None else dbias_E.to(ctx.bias_dtype)
        return dx_BTE, dtaps_KE.flip(0).t().to(weight_EK.dtype), dbias, dpast.to(past.dtype), None, None


def _blocks(x_BTE: Tensor, n_past: int) -> list[tuple[slice, slice]]:
    """Rows and times of each block, in order; a block is never shorter than what the next one needs of it."""
    n_batch, n_time, n_inner = x_BTE.shape
    if x_BTE.device.type != "cpu":
        return [(slice(0, n_batch), slice(0, n_time))]
    n_row, n_step = max(1, BLOCK // (n_time * n_inner)), min(n_time, max(n_past, 1, BLOCK // n_inner))
    starts = range(0, max(1, n_time - max(0, n_past - 1)), n_step)
    stops = [*starts[1:], n_time]
    return [
        (slice(row, min(row + n_row, n_batch)), slice(*times))
        for row in range(0, n_batch, n_row)
        for times in zip(starts, stops, strict=True)
    ]


def _before(block: tuple[slice, slice], x_BTE: Tensor, past: Tensor) -> Tensor:
    """The K-1 inputs before a block."""
    rows, times = block
    return past[rows] if times.start == 0 else x_BTE[rows, times.start - past.shape[1] : times.start]


def _causal_conv_triton(*inputs: Any) -> tuple[Tensor, Tensor]:
    from nanochat.kernels import triton_conv

    return triton_conv.causal_conv(*inputs)


def _causal_conv_causal_conv1d(
    x_BTE: Tensor,
    weight_EK: Tensor,
    bias_E: Tensor | None = None,
    state: Tensor | None = None,
    segments_BT: Tensor | None = None,
    lengths: Tensor | None = None,
    activation: bool = True,
) -> tuple[Tensor, Tensor]:
    y_BTE = conv_causal_conv1d(x_BTE, weight_EK, bias_E, state, segments_BT, activation)
    return y_BTE, final_state(x_BTE, x_BTE.new_zeros(x_BTE.shape[0], weight_EK.shape[1] - 1, x_BTE.shape[2]), lengths)


def _causal_conv_step_triton(*inputs: Any) -> Tensor:
    from nanochat.kernels import triton_decode

    return triton_decode.causal_conv_step(*inputs)


CAUSAL_CONV: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "shifted": _causal_conv_shifted,
    "triton": _causal_conv_triton,
    "causal_conv1d": _causal_conv_causal_conv1d,
    "ref": causal_conv_ref,
}
CAUSAL_CONV_STEP: dict[str, Callable[..., Tensor]] = {
    "torch": _causal_conv_step_torch,
    "triton": _causal_conv_step_triton,
}
