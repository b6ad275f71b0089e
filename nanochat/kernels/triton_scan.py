# mypy: disable-error-code="no-untyped-def,assignment"
"""S6 in Triton, fused: step size (bias, softplus), discretisation, scan, D and the SiLU gate, forward and backward.

One program, a single warp, walks over time with the states of a few channels in registers. Where there are too few
channels to fill the GPU, time is cut into splits: a first pass finds each split's own last state (what enters it would
be multiplied by exp(A * sum of steps)), a second carries states from split to split, then all splits run at once.

The forward pass keeps the state before every KEEP steps. The backward pass walks from the end: it computes a stretch of
KEEP steps again, noting the state before every UNROLL steps, then takes UNROLL steps back at a time with their decays
and states in registers. Gradients of B and C are sums over channels: each program writes its part, torch adds the parts
in a fixed order, and two runs give the same bits.

Decays are exponentials of one step, never quotients or logs of products; states and sums are float32.

Letters: B batch, T time, E inner width, N state size, S splits; states are tiles (BN, BLOCK), BN a power of 2 >= N.
With channels last, Triton gives four threads to a channel, and sums over states and over channels both stay short.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanochat.errors import UsageError
from nanochat.kernels.scan import SELECTIVE_SCAN
from nanochat.kernels.triton_common import DTYPES, compare, dense, launch, power_of_2, sigmoid, softplus

BLOCK = 32  # channels of a program
KEEP, UNROLL = 32, 4
PROGRAMS = 2048  # with fewer, time is split
MIN_SPLIT = 4 * KEEP  # steps
WIDE = 1 << 31  # rows of so many elements are counted in 64 bits, which costs a tenth of the time
LOG2E = tl.constexpr(1 / math.log(2))
LN2 = tl.constexpr(math.log(2))


# Loads are never masked: a channel or a token behind the end reads the last one's numbers, which cost nothing to read,
# and whose results are not stored and weigh zero in sums over channels.


@triton.jit
def _place(n_inner, BLOCK: tl.constexpr, BN: tl.constexpr):
    """The program's channels (BLOCK,), those of them to read, and the tile's states (BN, 1)."""
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    return e, tl.minimum(e, n_inner - 1), tl.arange(0, BN)[:, None]


@triton.jit
def _vector(x, n, N: tl.constexpr, BN: tl.constexpr):
    """B or C of one token (BN, 1) in float32, zero where the tile has more places than there are states."""
    x_N = tl.load(x + tl.minimum(n, N - 1)).to(tl.float32)
    if N < BN:
        x_N = tl.where(n < N, x_N, 0.0)
    return x_N


@triton.jit
def _drop(segments, t, n_time, PACKED: tl.constexpr):
    """What is added to the exponents of token t's decays: minus infinity where a new document begins."""
    drop = 0.0
    if PACKED:
        at = tl.minimum(t, n_time - 1)
        here, before = tl.load(segments + at), tl.load(segments + tl.maximum(at - 1, 0))
        drop = tl.where((here != before) & (t < n_time), -float("inf"), 0.0)
    return drop


@triton.jit
def _delta(dt_E, bias_E, t, length, BIAS: tl.constexpr):
    """The step size in float32; 0, which leaves the state alone, behind the row's end."""
    delta_E = dt_E.to(tl.float32)
    if BIAS:
        delta_E = softplus(delta_E + bias_E)
    return tl.where(t < length, delta_E, 0.0)


@triton.jit
def _decay(delta_E, A2, drop):
    return tl.exp2(delta_E[None, :] * A2 + drop)


@triton.jit
def _forward_kernel(
    u, dt, A, B, C, D, bias, gate, segments, lengths, entering, y, last, kept, whole,
    n_time, n_inner, steps, u_row, u_step, dt_row, dt_step, B_row, B_step, C_row, C_step, gate_row, gate_step,
    N: tl.constexpr, BLOCK: tl.constexpr, BN: tl.constexpr, KEEP: tl.constexpr,
    BIAS: tl.constexpr, GATE: tl.constexpr, PACKED: tl.constexpr, RAGGED: tl.constexpr, ENTERING: tl.constexpr,
    LOCAL: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """Scan one split. LOCAL: from zero, and only `last` (B, S, N, E) and `whole` (B, S, N, E), the split's decay."""
    e, e_read, n = _place(n_inner, BLOCK, BN)
    b, s, n_split = tl.program_id(1).to(tl.int64), tl.program_id(2), tl.num_programs(2)
    cell, inside = n * n_inner + e[None, :], (n < N) & (e < n_inner)[None, :]
    A2 = tl.load(A + cell, mask=inside, other=0.0) * LOG2E
    D_E = tl.load(D + e_read)
    bias_E = tl.load(bias + e_read) if BIAS else 0.0
    length = tl.load(lengths + b).to(tl.int32) if RAGGED else n_time
    h = tl.zeros((BN, BLOCK), tl.float32)
    if ENTERING:
        h = tl.load(entering + (b * n_split + s) * N * n_inner + cell, mask=inside, other=0.0)
    u, dt, B, C = u + b * u_row + e_read, dt + b * dt_row + e_read, B + b * B_row, C + b * C_row
    if GATE:
        gate += b * gate_row + e_read
    if PACKED:
        segments += b * n_time
    if not LOCAL:
        y += b * n_time * n_inner + e
    n_kept = tl.cdiv(n_time, KEEP)
    total_E, alive = tl.zeros((BLOCK,), tl.float32), 0.0
    first = (s * steps).to(tl.int64) if LONG else s * steps
    # the next token is on its way while this one is computed
    u_E, dt_E = tl.load(u + first * u_step), tl.load(dt + first * dt_step)
    B_N, C_N = _vector(B + first * B_step, n, N, BN), _vector(C + first * C_step, n, N, BN)
    if GATE:
        gate_E = tl.load(gate + first * gate_step)
    for t in range(first, tl.minimum(first + steps, n_time)):
        later = tl.minimum(t + 1, n_time - 1)
        u_next, dt_next = tl.load(u + later * u_step), tl.load(dt + later * dt_step)
        B_next, C_next = _vector(B + later * B_step, n, N, BN), _vector(C + later * C_step, n, N, BN)
        delta_E, drop = _delta(dt_E, bias_E, t, length, BIAS), _drop(segments, t, n_time, PACKED)
        if LOCAL:
            total_E += delta_E
            alive += drop
        else:
            if t % KEEP == 0:
                tl.store(kept + (b * n_kept + t // KEEP) * N * n_inner + cell, h, mask=inside)
        h = _decay(delta_E, A2, drop) * h + (delta_E * u_E.to(tl.float32))[None, :] * B_N
        if not LOCAL:
            y_E = tl.sum(h * C_N, 0) + D_E * u_E.to(tl.float32)
            if GATE:
                y_E *= gate_E.to(tl.float32) * sigmoid(gate_E.to(tl.float32))
                gate_E = tl.load(gate + later * gate_step)
            tl.store(y + t * n_inner, y_E.to(y.dtype.element_ty), mask=e < n_inner)
        u_E, dt_E, B_N, C_N = u_next, dt_next, B_next, C_next
    if LOCAL:
        tl.store(last + (b * n_split + s) * N * n_inner + cell, h, mask=inside)
        tl.store(whole + (b * n_split + s) * N * n_inner + cell, _decay(total_E, A2, alive), mask=inside)
    else:
        if s == n_split - 1:
            tl.store(last + b * N * n_inner + cell, h, mask=inside)


@triton.jit
def _carry_kernel(start, local, whole, carried, n_split, n_cell, BLOCK: tl.constexpr, REVERSE: tl.constexpr):
    """carried[b, s] = what enters split s: whole * (what entered the one before) + local; all (B, S, cells)."""
    cell = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b = tl.program_id(1).to(tl.int64)
    carry = tl.load(start + b * n_cell + cell, mask=cell < n_cell, other=0.0)
    for i in range(n_split):
        s = n_split - 1 - i if REVERSE else i
        place = (b * n_split + s) * n_cell + cell
        tl.store(carried + place, carry, mask=cell < n_cell)
        decay = tl.load(whole + place, mask=cell < n_cell, other=0.0)
        carry = decay * carry + tl.load(local + place, mask=cell < n_cell, other=0.0)


@triton.jit
def _gated(dy, gate, t, inside_E, dy_step, gate_step, GATE: tl.constexpr):
    """Gradients of the output and of the ungated output, and the gate; all (BLOCK,) in float32."""
    dout_E = tl.where(inside_E, tl.load(dy + t * dy_step).to(tl.float32), 0.0)
    gate_E, dscan_E = dout_E, dout_E
    if GATE:
        gate_E = tl.load(gate + t * gate_step).to(tl.float32)
        dscan_E = dout_E * gate_E * sigmoid(gate_E)
    return dout_E, dscan_E, gate_E


@triton.jit
def _local_gradient_kernel(
    dy, dt, A, C, bias, gate, segments, lengths, local, whole,
    n_time, n_inner, steps, dy_row, dy_step, dt_row, dt_step, C_row, C_step, gate_row, gate_step,
    N: tl.constexpr, BLOCK: tl.constexpr, BN: tl.constexpr,
    BIAS: tl.constexpr, GATE: tl.constexpr, PACKED: tl.constexpr, RAGGED: tl.constexpr,
    LONG: tl.constexpr,
):  # fmt: skip
    """Gradient that a split alone sends to the state before it, and its decay; both (B, S, N, E)."""
    e, e_read, n = _place(n_inner, BLOCK, BN)
    b, s, n_split = tl.program_id(1).to(tl.int64), tl.program_id(2), tl.num_programs(2)
    cell, inside = n * n_inner + e[None, :], (n < N) & (e < n_inner)[None, :]
    A2 = tl.load(A + cell, mask=inside, other=0.0) * LOG2E
    bias_E = tl.load(bias + e_read) if BIAS else 0.0
    length = tl.load(lengths + b).to(tl.int32) if RAGGED else n_time
    dy, dt, C = dy + b * dy_row + e_read, dt + b * dt_row + e_read, C + b * C_row
    if GATE:
        gate += b * gate_row + e_read
    if PACKED:
        segments += b * n_time
    g = tl.zeros((BN, BLOCK), tl.float32)
    total_E, alive = tl.zeros((BLOCK,), tl.float32), 0.0
    first = (s * steps).to(tl.int64) if LONG else s * steps
    stop = tl.minimum(first + steps, n_time)
    for back in range(stop - first):
        t = stop - 1 - back
        _, dscan_E, _ = _gated(dy, gate, t, e < n_inner, dy_step, gate_step, GATE)
        delta_E = _delta(tl.load(dt + t * dt_step), bias_E, t, length, BIAS)
        drop = _drop(segments, t, n_time, PACKED)
        total_E += delta_E
        alive += drop
        g += dscan_E[None, :] * _vector(C + t * C_step, n, N, BN)
        g *= _decay(delta_E, A2, drop)
    place = (b * n_split + s) * N * n_inner + cell
    tl.store(local + place, g, mask=inside)
    tl.store(whole + place, _decay(total_E, A2, alive), mask=inside)


@triton.jit
def _backward_kernel(
    dy, leaving, u, dt, A, B, C, D, bias, gate, segments, lengths, kept, notes,
    du, ddt, dA, dB, dC, dD, dbias, dgate, dstate,
    n_time, n_inner, steps, dy_row, dy_step, u_row, u_step, dt_row, dt_step, B_row, B_step, C_row, C_step,
    gate_row, gate_step,
    N: tl.constexpr, BLOCK: tl.constexpr, BN: tl.constexpr, KEEP: tl.constexpr,
    UNROLL: tl.constexpr, BIAS: tl.constexpr, GATE: tl.constexpr, PACKED: tl.constexpr, RAGGED: tl.constexpr,
    LONG: tl.constexpr,
):  # fmt: skip
    """All gradients of one split, given `leaving` (B, S, N, E), the gradient of the state behind it."""
    e, e_read, n = _place(n_inner, BLOCK, BN)
    b, s, n_split = tl.program_id(1).to(tl.int64), tl.program_id(2), tl.num_programs(2)
    cell, inside = n * n_inner + e[None, :], (n < N) & (e < n_inner)[None, :]
    n_N = tl.arange(0, BN)
    A2 = tl.load(A + cell, mask=inside, other=0.0) * LOG2E
    D_E = tl.load(D + e_read)
    bias_E = tl.load(bias + e_read) if BIAS else 0.0
    length = tl.load(lengths + b).to(tl.int32) if RAGGED else n_time
    u, dt, B, C = u + b * u_row + e_read, dt + b * dt_row + e_read, B + b * B_row, C + b * C_row
    dy += b * dy_row + e_read
    row = b * n_time * n_inner + e
    du, ddt, dgate = du + row, ddt + row, dgate + row
    if GATE:
        gate += b * gate_row + e_read
    if PACKED:
        segments += b * n_time
    block = (tl.program_id(0) * tl.num_programs(1) + b) * n_time * N + n_N
    dB, dC = dB + block, dC + block
    n_kept = tl.cdiv(n_time, KEEP)
    SIZE: tl.constexpr = BN * BLOCK
    notes += ((b * n_split + s) * tl.num_programs(0) + tl.program_id(0)) * (KEEP // UNROLL) * SIZE
    notes += n * BLOCK + tl.arange(0, BLOCK)[None, :]
    g = tl.load(leaving + (b * n_split + s) * N * n_inner + cell, mask=inside, other=0.0)
    dA_NE = tl.zeros((BN, BLOCK), tl.float32)
    dD_E, dbias_E = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    first = (s * steps).to(tl.int64) if LONG else s * steps
    n_stretch = tl.cdiv(tl.minimum(first + steps, n_time) - first, KEEP)
    for back in range(n_stretch):
        start = first + (n_stretch - 1 - back) * KEEP
        h = tl.load(kept + (b * n_kept + start // KEEP) * N * n_inner + cell, mask=inside, other=0.0)
        for j in range(KEEP // UNROLL):
            tl.store(notes + j * SIZE, h)
            for i in tl.static_range(UNROLL):
                true_t = start + j * UNROLL + i
                t = tl.minimum(true_t, n_time - 1)
                delta_E = _delta(tl.load(dt + t * dt_step), bias_E, true_t, length, BIAS)
                B_N, u_E = _vector(B + t * B_step, n, N, BN), tl.load(u + t * u_step).to(tl.float32)
                h *= _decay(delta_E, A2, _drop(segments, true_t, n_time, PACKED))
                h += (delta_E * u_E)[None, :] * B_N
        tl.debug_barrier()  # the notes are read by the threads of this program, not all by the one that wrote them
        for back_j in range(KEEP // UNROLL):
            j = KEEP // UNROLL - 1 - back_j
            h = tl.load(notes + j * SIZE)
            states = (h,)
            for i in tl.static_range(UNROLL - 1):
                true_t = start + j * UNROLL + i
                t = tl.minimum(true_t, n_time - 1)
                delta_E = _delta(tl.load(dt + t * dt_step), bias_E, true_t, length, BIAS)
                B_N, u_E = _vector(B + t * B_step, n, N, BN), tl.load(u + t * u_step).to(tl.float32)
                h *= _decay(delta_E, A2, _drop(segments, true_t, n_time, PACKED))
                h += (delta_E * u_E)[None, :] * B_N
                states = states + (h,)  # noqa: RUF005 (Triton knows no star)
            for i in tl.static_range(UNROLL):
                true_t = start + j * UNROLL + (UNROLL - 1 - i)
                t = tl.minimum(true_t, n_time - 1)
                store = e < tl.where(true_t < n_time, n_inner, 0)
                u_E, dt_E = tl.load(u + t * u_step).to(tl.float32), tl.load(dt + t * dt_step).to(tl.float32)
                B_N = _vector(B + t * B_step, n, N, BN)
                C_N = _vector(C + t * C_step, n, N, BN)
                dout_E, dscan_E, gate_E = _gated(dy, gate, t, store, dy_step, gate_step, GATE)
                delta_E = _delta(dt_E, bias_E, true_t, length, BIAS)
                input_E = delta_E * u_E
                decay = _decay(delta_E, A2, _drop(segments, true_t, n_time, PACKED))
                passed = decay * states[UNROLL - 1 - i]
                h = passed + input_E[None, :] * B_N
                g += dscan_E[None, :] * C_N
                if GATE:
                    y_E = tl.sum(h * C_N, 0) + D_E * u_E
                    sigma_E = sigmoid(gate_E)
                    dgate_E = dout_E * y_E * sigma_E * (1.0 + gate_E * (1.0 - sigma_E))
                    tl.store(dgate + t * n_inner, dgate_E.to(dgate.dtype.element_ty), mask=store)
                vector = n_N < tl.where(true_t < n_time, N, 0)
                tl.store(dC + t * N, tl.sum(h * dscan_E[None, :], 1), mask=vector)
                tl.store(dB + t * N, tl.sum(g * input_E[None, :], 1), mask=vector)
                dinput_E = tl.sum(g * B_N, 0)
                q = g * passed
                g *= decay
                dA_NE += q * delta_E[None, :]
                ddelta_E = tl.sum(q * A2, 0) * LN2 + dinput_E * u_E
                ddelta_E = tl.where(true_t < length, ddelta_E, 0.0)
                if BIAS:
                    ddelta_E *= sigmoid(dt_E + bias_E)
                    dbias_E += ddelta_E
                dD_E += dscan_E * u_E
                du_E = dinput_E * delta_E + dscan_E * D_E
                tl.store(ddt + t * n_inner, ddelta_E.to(ddt.dtype.element_ty), mask=store)
                tl.store(du + t * n_inner, du_E.to(du.dtype.element_ty), mask=store)
        tl.debug_barrier()  # the next stretch writes over the notes
    part = b * n_split + s
    if s == 0:
        tl.store(dstate + b * N * n_inner + cell, g, mask=inside)
    tl.store(dA + part * N * n_inner + cell, dA_NE, mask=inside)
    tl.store(dD + part * n_inner + e, dD_E, mask=e < n_inner)
    if BIAS:
        tl.store(dbias + part * n_inner + e, dbias_E, mask=e < n_inner)


class _Sizes(NamedTuple):
    """How a call is cut up: blocks of channels, splits of time; and what the kernels are compiled with."""

    n_batch: int
    n_time: int
    n_inner: int
    n_state: int
    steps: int  # of one split, a multiple of KEEP

    @classmethod
    def of(cls, u: Tensor, A: Tensor, steps: int) -> "_Sizes":
        n_batch, n_time, n_inner = u.shape
        if not steps:
            n_program = n_batch * triton.cdiv(n_inner, BLOCK)
            n_split = max(1, min(PROGRAMS // n_program, n_time // MIN_SPLIT))
            steps = triton.cdiv(triton.cdiv(n_time, n_split), KEEP) * KEEP
        return cls(n_batch, n_time, n_inner, A.shape[1], steps)

    @property
    def n_split(self) -> int:
        return triton.cdiv(self.n_time, self.steps)

    @property
    def grid(self) -> tuple[int, int, int]:
        return triton.cdiv(self.n_inner, BLOCK), self.n_batch, self.n_split

    @property
    def counts(self) -> tuple[int, int, int]:
        return self.n_time, self.n_inner, self.steps

    def states(self, like: Tensor, *lead: int) -> Tensor:
        return torch.empty(*lead, self.n_state, self.n_inner, dtype=torch.float32, device=like.device)

    def constants(
        self,
        bias: Tensor | None,
        gate: Tensor | None,
        segments: Tensor | None,
        lengths: Tensor | None,
        strides: list[int],
    ) -> dict[str, Any]:
        widest = max(self.n_inner, self.n_state, *strides[1::2])
        return {
            "N": self.n_state, "BLOCK": BLOCK, "BN": power_of_2(self.n_state, 1), "BIAS": bias is not None,
            "GATE": gate is not None, "PACKED": segments is not None, "RAGGED": lengths is not None,
            "LONG": (self.n_time + KEEP) * widest >= WIDE, "num_warps": 1,
        }  # fmt: skip

    def carry(self, start: Tensor, local: Tensor, whole: Tensor, reverse: bool) -> Tensor:
        """What enters each split, (B, S, N, E), from what enters the first (`reverse`: leaves the last)."""
        carried = torch.empty_like(local)
        n_cell = self.n_state * self.n_inner
        grid = (triton.cdiv(n_cell, 256), self.n_batch)
        launch(_carry_kernel, grid, start, local, whole, carried, self.n_split, n_cell, BLOCK=256, REVERSE=reverse)
        return carried


def _strides(*tensors: Tensor | None) -> list[int]:
    """Of row and step, in elements."""
    return [stride for x in tensors for stride in ((0, 0) if x is None else x.stride()[:2])]


@torch.library.custom_op("nanochat::selective_scan", mutates_args=())
def _scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor | None, gate: Tensor | None,
    state: Tensor | None, segments: Tensor | None, lengths: Tensor | None, steps: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y (B, T, E), the last state (B, N, E) and the state before every KEEP steps. A and state are (.., N, E)."""
    size = _Sizes.of(u, A.t(), steps)
    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    last = size.states(u, size.n_batch)
    kept = size.states(u, size.n_batch, triton.cdiv(size.n_time, KEEP))
    strides = _strides(u, dt, B, C, gate)
    constants = size.constants(bias, gate, segments, lengths, strides)

    def scan(entering: Tensor | None, last: Tensor, whole: Tensor | None) -> None:
        launch(
            _forward_kernel, size.grid, u, dt, A, B, C, D, bias, gate, segments, lengths, entering, y, last, kept,
            whole, *size.counts, *strides, KEEP=KEEP, ENTERING=entering is not None,
            LOCAL=whole is not None, **constants,
        )  # fmt: skip

    if size.n_split > 1:
        local, whole = (size.states(u, size.n_batch, size.n_split) for _ in range(2))
        scan(None, local, whole)
        state = size.carry(torch.zeros_like(last) if state is None else state, local, whole, reverse=False)
    scan(state, last, None)
    return y, last, kept


@_scan.register_fake
def _(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor | None, gate: Tensor | None,
    state: Tensor | None, segments: Tensor | None, lengths: Tensor | None, steps: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    n_batch, n_time, _ = u.shape
    last, kept = A.new_empty(n_batch, *A.shape), A.new_empty(n_batch, (n_time + KEEP - 1) // KEEP, *A.shape)
    return torch.empty_like(u, memory_format=torch.contiguous_format), last, kept


@torch.library.custom_op("nanochat::selective_scan_backward", mutates_args=())
def _scan_backward(
    dy: Tensor, dlast: Tensor | None, kept: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor,
    bias: Tensor | None, gate: Tensor | None, segments: Tensor | None, lengths: Tensor | None, steps: int,
) -> list[Tensor]:  # fmt: skip
    """Gradients of u, dt, A, B, C, D, bias, gate and state; empty for a bias or gate that there is not."""
    size = _Sizes.of(u, A.t(), steps)
    n_block, n_batch, n_split = size.grid
    strides = _strides(dy, u, dt, B, C, gate)
    constants = size.constants(bias, gate, segments, lengths, strides)
    leaving = size.states(u, n_batch).zero_() if dlast is None else dlast
    if n_split > 1:
        local, whole = (size.states(u, n_batch, n_split) for _ in range(2))
        launch(
            _local_gradient_kernel, size.grid, dy, dt, A, C, bias, gate, segments, lengths, local, whole, *size.counts,
            *_strides(dy, dt, C, gate), **constants,
        )  # fmt: skip
        leaving = size.carry(leaving, local, whole, reverse=True)
    du, ddt = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (u, dt))
    dgate = u.new_empty(0) if gate is None else torch.empty_like(gate, memory_format=torch.contiguous_format)
    dA, dstate = size.states(u, n_batch * n_split), size.states(u, n_batch)
    dD, dbias = (dA.new_empty(n_batch * n_split, size.n_inner) for _ in range(2))
    dB, dC = (dA.new_empty(n_block, n_batch, size.n_time, size.n_state) for _ in range(2))
    notes = dA.new_empty(n_block * n_batch * n_split * (KEEP // UNROLL) * constants["BN"] * BLOCK)
    launch(
        _backward_kernel, size.grid, dy, leaving, u, dt, A, B, C, D, bias, gate, segments, lengths, kept, notes,
        du, ddt, dA, dB, dC, dD, dbias, dgate, dstate, *size.counts, *strides,
        KEEP=KEEP, UNROLL=UNROLL, **constants,
    )  # fmt: skip
    dbias = u.new_empty(0) if bias is None else dbias.sum(0)
    return [du, ddt, dA.sum(0), dB.sum(0).to(B.dtype), dC.sum(0).to(C.dtype), dD.sum(0), dbias, dgate, dstate]


@_scan_backward.register_fake
def _(
    dy: Tensor, dlast: Tensor | None, kept: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor,
    bias: Tensor | None, gate: Tensor | None, segments: Tensor | None, lengths: Tensor | None, steps: int,
) -> list[Tensor]:  # fmt: skip
    like = [x if x is not None else u.new_empty(0) for x in (u, dt, A, B, C, D, bias, gate)]
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in like]
    return [*grads, A.new_empty(u.shape[0], *A.shape)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, state, segments, lengths, steps = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[2], *tensors, segments, lengths)
    ctx.steps, ctx.has_state = steps, state is not None


def _backward(ctx: Any, dy: Tensor | None, dlast: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    kept, *tensors, segments, lengths = ctx.saved_tensors
    dy = torch.zeros_like(tensors[0]) if dy is None else dense(dy)
    dlast = None if dlast is None else dlast.contiguous()
    *grads, dstate = _scan_backward(dy, dlast, kept, *tensors, segments, lengths, ctx.steps)
    given = [grad if x is not None else None for grad, x in zip(grads, tensors)]
    return *given, (dstate if ctx.has_state else None), None, None, None


_scan.register_autograd(_backward, setup_context=_setup_context)


def selective_scan(
    u_BTE: Tensor,
    delta_BTE: Tensor,
    A_EN: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    D_E: Tensor,
    state_BEN: Tensor | None = None,
    segments_BT: Tensor | None = None,
    lengths: Tensor | None = None,
    bias_E: Tensor | None = None,
    gate_BTE: Tensor | None = None,
    steps: int = 0,
) -> tuple[Tensor, Tensor]:
    """`scan.selective_scan` on the GPU. `steps`: of one split, a multiple of KEEP (0: chosen from the sizes)."""
    if u_BTE.dtype not in DTYPES:
        raise UsageError(f"the Triton scan takes float32, bfloat16 and float16, not {u_BTE.dtype}")
    u, dt, B, C = (dense(x) for x in (u_BTE, delta_BTE, B_BTN, C_BTN))
    gate = None if gate_BTE is None else dense(gate_BTE)
    state = None if state_BEN is None else state_BEN.float().transpose(1, 2).contiguous()
    bias = None if bias_E is None else bias_E.float()
    segments = None if segments_BT is None else segments_BT.contiguous()
    A_NE = A_EN.float().t().contiguous()
    y, last, _ = _scan(u, dt, A_NE, B, C, D_E.float(), bias, gate, state, segments, lengths, steps)
    return y, last.transpose(1, 2).contiguous()


def self_check(device: torch.device) -> None:
    """Outputs and gradients on this GPU against the oracle; AssertionError where they differ.

    Two splits of time, documents, an initial state, in float32 and bfloat16.
    """
    n_batch, n_time, n_inner, n_state = 1, KEEP + 5, BLOCK + BLOCK // 4, 16
    g = torch.Generator().manual_seed(0)
    sequence, vector = (n_batch, n_time, n_inner), (n_batch, n_time, n_state)
    shapes = [sequence, sequence, (n_inner, n_state), vector, vector, (n_inner,), (n_batch, n_inner, n_state)]
    inputs = [torch.randn(shape, generator=g) for shape in (*shapes, (n_inner,), sequence)]
    inputs[2] = -inputs[2].exp()
    segments = (torch.arange(n_time, device=device) >= KEEP - 3).int().expand(n_batch, -1)

    ops: tuple[Callable[..., Any], ...] = partial(selective_scan, steps=KEEP), SELECTIVE_SCAN["ref"]
    kernel, oracle = (lambda *x, op=op: op(*x[:7], segments, None, *x[7:]) for op in ops)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 3e-2)):
        given = [x.to(device, dtype if i in (0, 1, 3, 4, 8) else torch.float32) for i, x in enumerate(inputs)]
        compare(kernel, oracle, given, tolerance, str(dtype))
