# mypy: disable-error-code="no-untyped-def"
"""One token of decoding in Triton: a single launch for the convolution's step, for S6's and for SSD's.

Each changes its state in place, reads and writes it once, and needs nothing else of its size. No gradients.

Letters: B batch, E inner width, N state size, H heads, P head width, G groups, K kernel width.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanochat.kernels import conv, scan, ssd
from nanochat.kernels.triton_common import compare, dense, launch, power_of_2, sigmoid, softplus

BLOCK_INNER, BLOCK_WIDTH, BLOCK_CONV = 32, 16, 256


@triton.jit
def _scan_step_kernel(
    u, dt, A, B, C, D, bias, gate, state, y, n_inner, u_row, dt_row, B_row, C_row, gate_row,
    N: tl.constexpr, BN: tl.constexpr, BLOCK: tl.constexpr, BIAS: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    e, n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BN)
    b = tl.program_id(1).to(tl.int64)
    e_in, inside = e < n_inner, (e < n_inner)[:, None] & (n < N)[None, :]
    cell = e[:, None] * N + n[None, :]
    u_E = tl.load(u + b * u_row + e, mask=e_in, other=0.0).to(tl.float32)
    delta_E = tl.load(dt + b * dt_row + e, mask=e_in, other=0.0).to(tl.float32)
    if BIAS:
        delta_E = softplus(delta_E + tl.load(bias + e, mask=e_in, other=0.0).to(tl.float32))
    B_N = tl.load(B + b * B_row + n, mask=n < N, other=0.0).to(tl.float32)
    C_N = tl.load(C + b * C_row + n, mask=n < N, other=0.0).to(tl.float32)
    state += b * n_inner * N + cell
    decay = tl.exp(delta_E[:, None] * tl.load(A + cell, mask=inside, other=0.0))
    h = decay * tl.load(state, mask=inside, other=0.0) + (delta_E * u_E)[:, None] * B_N[None, :]
    tl.store(state, h, mask=inside)
    y_E = tl.sum(h * C_N[None, :], 1) + u_E * tl.load(D + e, mask=e_in, other=0.0).to(tl.float32)
    if GATE:
        gate_E = tl.load(gate + b * gate_row + e, mask=e_in, other=0.0).to(tl.float32)
        y_E *= gate_E * sigmoid(gate_E)
    tl.store(y + b * n_inner + e, y_E.to(y.dtype.element_ty), mask=e_in)


@triton.jit
def _ssd_step_kernel(
    x, dt, A, B, C, D, state, y, n_head, n_rep, x_row, x_head, dt_row, B_row, B_group, C_row, C_group,
    P: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    p, n, h = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BN), tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    inside = (p < P)[:, None] & (n < N)[None, :]
    x_P = tl.load(x + b * x_row + h * x_head + p, mask=p < P, other=0.0).to(tl.float32)
    dt_H = tl.load(dt + b * dt_row + h).to(tl.float32)
    B_N = tl.load(B + b * B_row + h // n_rep * B_group + n, mask=n < N, other=0.0).to(tl.float32)
    C_N = tl.load(C + b * C_row + h // n_rep * C_group + n, mask=n < N, other=0.0).to(tl.float32)
    state += (b * n_head + h) * P * N + p[:, None] * N + n[None, :]
    decay = tl.exp(dt_H * tl.load(A + h).to(tl.float32))
    h_PN = decay * tl.load(state, mask=inside, other=0.0) + (dt_H * x_P)[:, None] * B_N[None, :]
    tl.store(state, h_PN, mask=inside)
    y_P = tl.sum(h_PN * C_N[None, :], 1) + x_P * tl.load(D + h).to(tl.float32)
    tl.store(y + (b * n_head + h) * P + p, y_P.to(y.dtype.element_ty), mask=p < P)


@triton.jit
def _conv_step_kernel(
    x, weight, bias, state, y, n_inner, x_row,
    K: tl.constexpr, BLOCK: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b, inside = tl.program_id(1).to(tl.int64), e < n_inner
    x_E = tl.load(x + b * x_row + e, mask=inside, other=0.0)
    state += b * (K - 1) * n_inner + e
    sum_E = x_E.to(tl.float32) * tl.load(weight + e * K + (K - 1), mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        sum_E += tl.load(bias + e, mask=inside, other=0.0).to(tl.float32)
    for k in tl.static_range(K - 1):
        past_E = tl.load(state + k * n_inner, mask=inside, other=0.0)
        sum_E += past_E.to(tl.float32) * tl.load(weight + e * K + k, mask=inside, other=0.0).to(tl.float32)
        if k > 0:  # each input moves one place towards the oldest, once that has been read
            tl.store(state + (k - 1) * n_inner, past_E, mask=inside)
    if K > 1:
        tl.store(state + (K - 2) * n_inner, x_E.to(state.dtype.element_ty), mask=inside)
    if ACTIVATION:
        sum_E *= sigmoid(sum_E)
    tl.store(y + b * n_inner + e, sum_E.to(y.dtype.element_ty), mask=inside)


@torch.library.custom_op("nanochat::selective_scan_step", mutates_args=("state",))
def _scan_step(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor, bias: Tensor | None,
    gate: Tensor | None,
) -> Tensor:  # fmt: skip
    n_batch, n_inner, n_state = state.shape
    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    launch(
        _scan_step_kernel, (triton.cdiv(n_inner, BLOCK_INNER), n_batch), u, dt, A, B, C, D, bias, gate, state, y,
        n_inner, u.stride(0), dt.stride(0), B.stride(0), C.stride(0), 0 if gate is None else gate.stride(0),
        N=n_state, BN=power_of_2(n_state, 1), BLOCK=BLOCK_INNER, BIAS=bias is not None, GATE=gate is not None,
        num_warps=1,
    )  # fmt: skip
    return y


@torch.library.custom_op("nanochat::ssd_step", mutates_args=("state",))
def _ssd_step(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor) -> Tensor:
    n_batch, n_head, n_width, n_state = state.shape
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    launch(
        _ssd_step_kernel, (triton.cdiv(n_width, BLOCK_WIDTH), n_head, n_batch), x, dt, A, B, C, D, state, y, n_head,
        n_head // B.shape[1], *x.stride()[:2], dt.stride(0), *B.stride()[:2], *C.stride()[:2], P=n_width, N=n_state,
        BN=power_of_2(n_state, 1), BLOCK=BLOCK_WIDTH, num_warps=4,
    )  # fmt: skip
    return y


@torch.library.custom_op("nanochat::causal_conv_step", mutates_args=("state",))
def _conv_step(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, activation: bool) -> Tensor:
    n_batch, n_inner = x.shape
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    launch(
        _conv_step_kernel, (triton.cdiv(n_inner, BLOCK_CONV), n_batch), x, weight, bias, state, y, n_inner,
        x.stride(0), K=weight.shape[1], BLOCK=BLOCK_CONV, BIAS=bias is not None, ACTIVATION=activation, num_warps=2,
    )  # fmt: skip
    return y


@_scan_step.register_fake
def _(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor, bias: Tensor | None,
    gate: Tensor | None,
) -> Tensor:  # fmt: skip
    return torch.empty_like(u, memory_format=torch.contiguous_format)


@_ssd_step.register_fake
def _(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_conv_step.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, activation: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def selective_scan_step(
    u_BE: Tensor,
    delta_BE: Tensor,
    A_EN: Tensor,
    B_BN: Tensor,
    C_BN: Tensor,
    D_E: Tensor,
    state_BEN: Tensor,
    bias_E: Tensor | None = None,
    gate_BE: Tensor | None = None,
) -> Tensor:
    """`scan.selective_scan_step` on the GPU, bias, softplus and gate in the same launch."""
    u, dt, B, C = (dense(x) for x in (u_BE, delta_BE, B_BN, C_BN))
    gate = None if gate_BE is None else dense(gate_BE)
    state = state_BEN.contiguous()
    y_BE = _scan_step(u, dt, A_EN.contiguous(), B, C, D_E, state, bias_E, gate)
    if state is not state_BEN:
        state_BEN.copy_(state)
    return y_BE


def ssd_step(
    x_BHP: Tensor, dt_BH: Tensor, A_H: Tensor, B_BGN: Tensor, C_BGN: Tensor, D_H: Tensor, state_BHPN: Tensor
) -> Tensor:
    """`ssd.ssd_step` on the GPU."""
    x, dt, B, C = (dense(v) for v in (x_BHP, dt_BH, B_BGN, C_BGN))
    state = state_BHPN.contiguous()
    y_BHP = _ssd_step(x, dt, A_H, B, C, D_H, state)
    if state is not state_BHPN:
        state_BHPN.copy_(state)
    return y_BHP


def causal_conv_step(
    x_BE: Tensor, weight_EK: Tensor, bias_E: Tensor | None, state: Tensor, activation: bool = True
) -> Tensor:
    """`conv.causal_conv_step` on the GPU."""
    own = state.contiguous()
    y_BE = _conv_step(dense(x_BE), weight_EK.contiguous(), bias_E, own, activation)
    if own is not state:
        state.copy_(own)
    return y_BE


def self_check(device: torch.device) -> None:
    """The three steps on this GPU, outputs and states, against plain torch; AssertionError where they differ."""
    g = torch.Generator().manual_seed(0)

    def check(table: Mapping[str, Callable[..., Tensor]], at: int, negative: int, *shapes: tuple[int, ...]) -> None:
        """`at`, `negative`: which of the arguments is the state, and which A (-1: there is none)."""
        inputs = [torch.randn(shape, generator=g).to(device) for shape in shapes]
        if negative >= 0:
            inputs[negative] = -inputs[negative].exp()

        def step(name: str, *x: Tensor) -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                state = x[at].clone()
                return table[name](*x[:at], state, *x[at + 1 :]), state

        compare(partial(step, "triton"), partial(step, "torch"), inputs, 1e-4, str(shapes))

    E, N, H, P, rows = BLOCK_INNER + 8, 16, 4, BLOCK_WIDTH + 8, 2
    vectors = (rows, N), (rows, N), (E,)
    check(scan.SELECTIVE_SCAN_STEP, 6, 2, (rows, E), (rows, E), (E, N), *vectors, (rows, E, N), (E,), (rows, E))
    groups = (rows, 2, N), (rows, 2, N), (H,)
    check(ssd.SSD_STEP, 6, 2, (rows, H, P), (rows, H), (H,), *groups, (rows, H, P, N))
    check(conv.CAUSAL_CONV_STEP, 3, -1, (rows, E), (E, 4), (E,), (rows, 3, E))
