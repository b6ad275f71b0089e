# mypy: disable-error-code="no-untyped-def"
"""SSD in Triton: the chunked form of Mamba-2's scan (arXiv 2405.21060, section 6) in two kernels forward, four back.

    states    one program a head walks over the chunks; the state stays in float32 registers, and what enters each
              chunk is written down
    scan      one program a chunk and a few heads of a group: what the chunk's own steps give, and what enters it
    backward  the states again (nothing of them is kept from the forward pass), their gradients from the last chunk to
              the first, then those of x and dt and, apart for want of registers, those of B and C: summed over the
              heads of a program in registers and over programs in a fixed order, so two runs give the same bits

Products take the activations' dtype and sum in float32; steps, decays and states are float32. Decays are exponentials
of differences of sums over a chunk, masked before the exponential. A single step's exponent stops at LOWEST, where its
decay is zero in float32 anyway, so that one huge step does not cost the sums the digits of the small ones.

Letters: B batch, T time, H heads, P head width, G groups, N state size, Q steps in a chunk, Z chunks, R heads of a
group, S programs that share a group's heads.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanochat.kernels.triton_common import INTERPRET, compare, launch, packed, power_of_2, precision

FORWARD_CHUNK, BACKWARD_CHUNK = 128, 64  # half as long for float32 or N > 128: the tiles must fit in shared memory
HEADS_FORWARD, HEADS_BACKWARD = 8, 16  # at most so many heads of a group in one program
STATE_PROGRAMS = 256  # with fewer, the states of a head are divided among programs
LOWEST = tl.constexpr(-150.0)  # log2 of the smallest decay of one step: zero in float32
LOG2E = tl.constexpr(1 / math.log(2))
INTERPRETED = tl.constexpr(INTERPRET)


@triton.jit
def _documents(document, b, z, n_time, Q: tl.constexpr, PACKED: tl.constexpr):
    """The document of each step (Q,), of the chunk's last step, and of the step before the chunk (0: the row's)."""
    if PACKED:
        row = document + b * n_time
        doc_Q = tl.load(row + tl.minimum(z * Q + tl.arange(0, Q), n_time - 1))
        last = tl.load(row + tl.minimum(z * Q + Q - 1, n_time - 1))
        before = tl.load(row + z * Q - 1, mask=z > 0, other=0)
    else:
        doc_Q, last, before = tl.zeros((Q,), tl.int32), 0, 0
    return doc_Q, last, before


@triton.jit
def _decays(dt, A, doc_Q, last, before, b, h, z, n_time, n_head, Q: tl.constexpr, PACKED: tl.constexpr):
    """Of one head: the chunk's steps and the cumulative log2 of its decays (Q,); what is left of the entering state
    at each step, of each step at the chunk's end (Q,), and of the entering state there. No step behind the row's end.
    """
    t = z * Q + tl.arange(0, Q)
    dt_Q = tl.load(dt + (b * n_time + t) * n_head + h, mask=t < n_time, other=0.0)
    log_Q = tl.maximum(dt_Q * (tl.load(A + h) * LOG2E), LOWEST)
    cum_Q, total = tl.cumsum(log_Q, 0), tl.sum(log_Q, 0)
    from_start_Q, to_end_Q, whole = tl.exp2(cum_Q), tl.exp2(total - cum_Q), tl.exp2(total)
    if PACKED:
        from_start_Q = tl.where(doc_Q == before, from_start_Q, 0.0)
        to_end_Q = tl.where(doc_Q == last, to_end_Q, 0.0)
        whole = tl.where(last == before, whole, 0.0)
    return dt_Q, cum_Q, from_start_Q, to_end_Q, whole


@triton.jit
def _seen(doc_Q, Q: tl.constexpr, PACKED: tl.constexpr):
    """Which steps of a chunk (columns) a step (row) sees."""
    q = tl.arange(0, Q)
    seen_QQ = q[:, None] >= q[None, :]
    if PACKED:
        seen_QQ = seen_QQ & (doc_Q[:, None] == doc_Q[None, :])
    return seen_QQ


@triton.jit
def _pairs(cum_Q, seen_QQ):
    """What is left of each step (column) at each that sees it (row)."""
    return tl.exp2(tl.where(seen_QQ, cum_Q[:, None] - cum_Q[None, :], -float("inf")))


@triton.jit
def _tile(base, rows, columns, n_row, n_column, stride):
    """(rows, columns) of a matrix whose rows lie `stride` apart; zeros outside of it."""
    inside = (rows < n_row)[:, None] & (columns < n_column)[None, :]
    return tl.load(base + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr):
    """a @ b in float32; the interpreter, which multiplies bfloat16's bits as integers, gets the values in float32."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _states_kernel(
    x, dt, A, B, document, first, entering, last, n_time, n_chunk, n_head, n_rep, x_row, x_step, B_row, B_step,
    P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Fill `entering` (B, Z, H, P, N), the state before each chunk, and `last` (B, H, P, N)."""
    b, h = (tl.program_id(0) // n_head).to(tl.int64), tl.program_id(0) % n_head
    p, n = tl.program_id(1) * BP + tl.arange(0, BP), tl.program_id(2) * BN + tl.arange(0, BN)
    inside = (p < P)[:, None] & (n < N)[None, :]
    cell = p[:, None] * N + n[None, :]
    state = tl.load(first + (b * n_head + h) * P * N + cell, mask=inside, other=0.0)
    for z in range(n_chunk):
        tl.store(entering + ((b * n_chunk + z) * n_head + h) * P * N + cell, state, mask=inside)
        doc_Q, doc_last, doc_before = _documents(document, b, z, n_time, Q, PACKED)
        dt_Q, _cum_Q, _from_start_Q, to_end_Q, whole = _decays(
            dt, A, doc_Q, doc_last, doc_before, b, h, z, n_time, n_head, Q, PACKED
        )
        t = z * Q + tl.arange(0, Q)
        x_QP = _tile(x + b * x_row + h * P, t, p, n_time, P, x_step)
        B_QN = _tile(B + b * B_row + h // n_rep * N, t, n, n_time, N, B_step)
        weighted_QN = (B_QN * (dt_Q * to_end_Q)[:, None]).to(x_QP.dtype)
        state = state * whole + _dot(tl.trans(x_QP), weighted_QN, PRECISION)
    tl.store(last + (b * n_head + h) * P * N + cell, state, mask=inside)


@triton.jit
def _scan_kernel(
    x, dt, A, B, C, D, document, entering, y, n_time, n_chunk, n_head, n_group, n_share,
    x_row, x_step, B_row, B_step, C_row, C_step,
    P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, HEADS: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Fill `y` for one chunk and HEADS heads: decays times scores, times x; and the entering state, read by C."""
    z, b = tl.program_id(0), (tl.program_id(1) // (n_group * n_share)).to(tl.int64)
    share = tl.program_id(1) % (n_group * n_share)  # the programs of a row: the heads of a group lie together
    t, n = z * Q + tl.arange(0, Q), tl.arange(0, BN)
    p = tl.program_id(2) * BP + tl.arange(0, BP)
    B_QN = _tile(B + b * B_row + share // n_share * N, t, n, n_time, N, B_step)
    C_QN = _tile(C + b * C_row + share // n_share * N, t, n, n_time, N, C_step)
    scores_QQ = _dot(C_QN, tl.trans(B_QN), PRECISION)
    doc_Q, doc_last, doc_before = _documents(document, b, z, n_time, Q, PACKED)
    seen_QQ = _seen(doc_Q, Q, PACKED)
    for i in range(HEADS):
        h = share * HEADS + i
        dt_Q, cum_Q, from_start_Q, _to_end_Q, _whole = _decays(
            dt, A, doc_Q, doc_last, doc_before, b, h, z, n_time, n_head, Q, PACKED
        )
        x_QP = _tile(x + b * x_row + h * P, t, p, n_time, P, x_step)
        state_PN = _tile(entering + ((b * n_chunk + z) * n_head + h) * P * N, p, n, P, N, N).to(x_QP.dtype)
        y_QP = _dot(C_QN, tl.trans(state_PN), PRECISION) * from_start_Q[:, None]
        weights_QQ = (_pairs(cum_Q, seen_QQ) * scores_QQ * dt_Q[None, :]).to(x_QP.dtype)
        y_QP += _dot(weights_QQ, x_QP, PRECISION)
        y_QP += tl.load(D + h) * x_QP
        place = (b * n_time + t[:, None]) * n_head * P + h * P + p[None, :]
        tl.store(y + place, y_QP.to(x_QP.dtype), mask=(t < n_time)[:, None] & (p < P)[None, :])


@triton.jit
def _state_gradients_kernel(
    dy, dt, A, C, document, dlast, dleaving, dfirst, n_time, n_chunk, n_head, n_rep, dy_row, dy_step, C_row, C_step,
    P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Fill `dleaving` (B, Z, H, P, N), the gradient of the state after each chunk, and `dfirst` (B, H, P, N)."""
    b, h = (tl.program_id(0) // n_head).to(tl.int64), tl.program_id(0) % n_head
    p, n = tl.program_id(1) * BP + tl.arange(0, BP), tl.program_id(2) * BN + tl.arange(0, BN)
    inside = (p < P)[:, None] & (n < N)[None, :]
    cell = p[:, None] * N + n[None, :]
    dstate = tl.load(dlast + (b * n_head + h) * P * N + cell, mask=inside, other=0.0)
    for back in range(n_chunk):
        z = n_chunk - 1 - back
        tl.store(dleaving + ((b * n_chunk + z) * n_head + h) * P * N + cell, dstate, mask=inside)
        doc_Q, doc_last, doc_before = _documents(document, b, z, n_time, Q, PACKED)
        _dt_Q, _cum_Q, from_start_Q, _to_end_Q, whole = _decays(
            dt, A, doc_Q, doc_last, doc_before, b, h, z, n_time, n_head, Q, PACKED
        )
        t = z * Q + tl.arange(0, Q)
        dy_QP = _tile(dy + b * dy_row + h * P, t, p, n_time, P, dy_step)
        C_QN = _tile(C + b * C_row + h // n_rep * N, t, n, n_time, N, C_step)
        weighted_QN = (C_QN * from_start_Q[:, None]).to(dy_QP.dtype)
        dstate = dstate * whole + _dot(tl.trans(dy_QP), weighted_QN, PRECISION)
    tl.store(dfirst + (b * n_head + h) * P * N + cell, dstate, mask=inside)


@triton.jit
def _inputs_gradients_kernel(
    x, dt, A, B, C, D, document, entering, dleaving, dy, dx, ddt, dA, dD,
    n_time, n_chunk, n_head, n_group, n_share, x_row, x_step, B_row, B_step, C_row, C_step, dy_row, dy_step,
    P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, HEADS: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of x and dt for one chunk and HEADS heads, and the chunk's part of those of A and D."""
    z, b = tl.program_id(0), (tl.program_id(1) // (n_group * n_share)).to(tl.int64)
    share = tl.program_id(1) % (n_group * n_share)
    t, p, n = z * Q + tl.arange(0, Q), tl.arange(0, BP), tl.arange(0, BN)
    B_QN = _tile(B + b * B_row + share // n_share * N, t, n, n_time, N, B_step)
    C_QN = _tile(C + b * C_row + share // n_share * N, t, n, n_time, N, C_step)
    scores_QQ = _dot(C_QN, tl.trans(B_QN), PRECISION)
    doc_Q, doc_last, doc_before = _documents(document, b, z, n_time, Q, PACKED)
    seen_QQ = _seen(doc_Q, Q, PACKED)
    for i in range(HEADS):
        h = share * HEADS + i
        dt_Q, cum_Q, from_start_Q, to_end_Q, whole = _decays(
            dt, A, doc_Q, doc_last, doc_before, b, h, z, n_time, n_head, Q, PACKED
        )
        x_QP = _tile(x + b * x_row + h * P, t, p, n_time, P, x_step)
        dy_QP = _tile(dy + b * dy_row + h * P, t, p, n_time, P, dy_step)
        # inside the chunk
        weights_QQ = _pairs(cum_Q, seen_QQ) * scores_QQ
        dxdt_QP = _dot(tl.trans(weights_QQ.to(x_QP.dtype)), dy_QP, PRECISION)
        # the exponent of a weight is the sum over the steps between; none on the diagonal, where it would only cancel
        flow_QQ = _dot(dy_QP, tl.trans((x_QP * dt_Q[:, None]).to(x_QP.dtype)), PRECISION) * weights_QQ
        flow_QQ = tl.where(t[:, None] > t[None, :], flow_QQ, 0.0)
        dcum_Q = tl.sum(flow_QQ, 1) - tl.sum(flow_QQ, 0)
        # through the states that enter and leave
        base = ((b * n_chunk + z) * n_head + h) * P * N
        state_PN, dstate_PN = _tile(entering + base, p, n, P, N, N), _tile(dleaving + base, p, n, P, N, N)
        kept = tl.sum(tl.sum(state_PN.to(tl.float32) * dstate_PN.to(tl.float32), 1), 0) * whole
        read_QP = _dot(C_QN, tl.trans(state_PN.to(x_QP.dtype)), PRECISION)
        dcum_Q += tl.sum(read_QP * dy_QP, 1) * from_start_Q
        written_QP = _dot(B_QN, tl.trans(dstate_PN.to(x_QP.dtype)), PRECISION) * to_end_Q[:, None]
        dxdt_QP += written_QP
        dend_Q = tl.sum(written_QP * x_QP, 1) * dt_Q
        dlog_Q = tl.cumsum(dcum_Q, 0, reverse=True) + (tl.cumsum(dend_Q, 0) - dend_Q) + kept
        # outputs; where a decay is zero so is its gradient, which the sums above only have to rounding
        at, valid, A_h = (b * n_time + t) * n_head + h, t < n_time, tl.load(A + h)
        dlog_Q = tl.where(dt_Q * A_h * LOG2E > LOWEST, dlog_Q, 0.0)
        tl.store(ddt + at, dlog_Q * A_h + tl.sum(dxdt_QP * x_QP, 1), mask=valid)
        dx_QP = dxdt_QP * dt_Q[:, None] + tl.load(D + h) * dy_QP
        tl.store(dx + at[:, None] * P + p[None, :], dx_QP.to(x_QP.dtype), mask=valid[:, None] & (p < P)[None, :])
        part = (b * n_chunk + z) * n_head + h
        tl.store(dA + part, tl.sum(dlog_Q * dt_Q, 0))
        tl.store(dD + part, tl.sum(tl.sum(dy_QP.to(tl.float32) * x_QP, 1), 0))


@triton.jit
def _maps_gradients_kernel(
    x, dt, A, B, C, document, entering, dleaving, dy, dB, dC,
    n_batch, n_time, n_chunk, n_head, n_group, n_share, x_row, x_step, B_row, B_step, C_row, C_step, dy_row, dy_step,
    P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, HEADS: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of B and C for one chunk, of the HEADS heads that are this program's share of a group."""
    z, b = tl.program_id(0), (tl.program_id(1) // (n_group * n_share)).to(tl.int64)
    share = tl.program_id(1) % (n_group * n_share)
    group = share // n_share
    t, p, n = z * Q + tl.arange(0, Q), tl.arange(0, BP), tl.arange(0, BN)
    doc_Q, doc_last, doc_before = _documents(document, b, z, n_time, Q, PACKED)
    seen_QQ = _seen(doc_Q, Q, PACKED)
    dscores_QQ = tl.zeros((Q, Q), tl.float32)
    dB_QN, dC_QN = tl.zeros((Q, BN), tl.float32), tl.zeros((Q, BN), tl.float32)
    for i in range(HEADS):
        h = share * HEADS + i
        dt_Q, cum_Q, from_start_Q, to_end_Q, _whole = _decays(
            dt, A, doc_Q, doc_last, doc_before, b, h, z, n_time, n_head, Q, PACKED
        )
        x_QP = _tile(x + b * x_row + h * P, t, p, n_time, P, x_step)
        dy_QP = _tile(dy + b * dy_row + h * P, t, p, n_time, P, dy_step)
        xdt_QP = x_QP * dt_Q[:, None]
        dscores_QQ += _dot(dy_QP, tl.trans(xdt_QP.to(x_QP.dtype)), PRECISION) * _pairs(cum_Q, seen_QQ)
        base = ((b * n_chunk + z) * n_head + h) * P * N
        state_PN = _tile(entering + base, p, n, P, N, N).to(x_QP.dtype)
        dC_QN += _dot((dy_QP * from_start_Q[:, None]).to(x_QP.dtype), state_PN, PRECISION)
        dstate_PN = _tile(dleaving + base, p, n, P, N, N).to(x_QP.dtype)
        dB_QN += _dot((xdt_QP * to_end_Q[:, None]).to(x_QP.dtype), dstate_PN, PRECISION)
    B_QN = _tile(B + b * B_row + group * N, t, n, n_time, N, B_step)
    C_QN = _tile(C + b * C_row + group * N, t, n, n_time, N, C_step)
    dC_QN += _dot(dscores_QQ.to(B_QN.dtype), B_QN, PRECISION)
    dB_QN += _dot(tl.trans(dscores_QQ.to(B_QN.dtype)), C_QN, PRECISION)
    row = (share % n_share * n_batch + b) * n_time + t
    place = (row[:, None] * n_group + group) * N + n[None, :]
    inside = (t < n_time)[:, None] & (n < N)[None, :]
    tl.store(dB + place, dB_QN, mask=inside)
    tl.store(dC + place, dC_QN, mask=inside)


class _Sizes:
    """The sizes of a call, and how its work is cut: chunks of `Q` steps, `heads` heads of a group to a program."""

    def __init__(self, x_BTHP: Tensor, B_BTGN: Tensor, chunk: int, heads: int):
        self.B, self.T, self.H, self.P = x_BTHP.shape
        self.G, self.N = B_BTGN.shape[2:]
        narrow = x_BTHP.dtype != torch.float32 and self.N <= 128
        self.Q = min(chunk if narrow else chunk // 2, power_of_2(self.T))
        self.Z = -(-self.T // self.Q)
        self.BP, self.BN = power_of_2(self.P), power_of_2(self.N)
        self.heads = math.gcd(self.H // self.G, heads)
        self.share = self.H // self.G // self.heads
        self.warps = 8 if self.Q >= 32 else 4
        # what is written of a state is read as an operand of products in the activations' dtype
        self.saved = torch.bfloat16 if x_BTHP.dtype == torch.bfloat16 else torch.float32

    @property
    def counts(self) -> tuple[int, int, int]:
        return self.T, self.Z, self.H

    def options(self, document: Tensor | None) -> dict[str, Any]:
        return {"P": self.P, "N": self.N, "Q": self.Q, "PACKED": document is not None, "PRECISION": precision()}

    def state_blocks(self) -> tuple[int, int]:
        """Width and state size of one program's part of a head's state."""
        BP, BN = min(self.BP, 64), min(self.BN, 128)
        while BN > 32 and self.B * self.H * -(-self.P // BP) * -(-self.N // BN) < STATE_PROGRAMS:
            BN //= 2
        return BP, BN


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    """How far apart rows and steps lie, of each."""
    return tuple(stride for x in tensors for stride in x.stride()[:2])


def _entering(
    size: _Sizes, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, first: Tensor, document: Tensor | None
) -> tuple[Tensor, Tensor]:
    entering = x.new_empty(size.B, size.Z, size.H, size.P, size.N, dtype=size.saved)
    last = torch.empty_like(first)
    BP, BN = size.state_blocks()
    grid = (size.B * size.H, -(-size.P // BP), -(-size.N // BN))
    launch(
        _states_kernel, grid, x, dt, A, B, document, first, entering, last, *size.counts, size.H // size.G,
        *_strides(x, B), BP=BP, BN=BN, num_warps=4, num_stages=3, **size.options(document),
    )  # fmt: skip
    return entering, last


@torch.library.custom_op("nanochat::ssd", mutates_args=())
def _ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, first: Tensor, document: Tensor | None
) -> tuple[Tensor, Tensor]:
    x, B, C, dt = packed(x), packed(B), packed(C), dt.contiguous()
    size = _Sizes(x, B, FORWARD_CHUNK, HEADS_FORWARD)
    entering, last = _entering(size, x, dt, A, B, first, document)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    BP = min(size.BP, 64)
    grid = (size.Z, size.B * size.G * size.share, -(-size.P // BP))
    launch(
        _scan_kernel, grid, x, dt, A, B, C, D, document, entering, y, *size.counts, size.G, size.share,
        *_strides(x, B, C), BP=BP, BN=size.BN, HEADS=size.heads,
        num_warps=size.warps, num_stages=2, **size.options(document),
    )  # fmt: skip
    return y, last


@torch.library.custom_op("nanochat::ssd_backward", mutates_args=())
def _ssd_backward(
    dy: Tensor, dlast: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, first: Tensor,
    document: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dy, x, B, C, dt, dlast = packed(dy), packed(x), packed(B), packed(C), dt.contiguous(), dlast.contiguous()
    size = _Sizes(x, B, BACKWARD_CHUNK, HEADS_BACKWARD)
    entering, _ = _entering(size, x, dt, A, B, first, document)
    dleaving, dfirst = torch.empty_like(entering), torch.empty_like(first)
    BP, BN = size.state_blocks()
    launch(
        _state_gradients_kernel, (size.B * size.H, -(-size.P // BP), -(-size.N // BN)), dy, dt, A, C, document, dlast,
        dleaving, dfirst, *size.counts, size.H // size.G, *_strides(dy, C), BP=BP, BN=BN, num_warps=4, num_stages=3,
        **size.options(document),
    )  # fmt: skip
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    ddt = torch.empty_like(dt)
    dA, dD = (dt.new_empty(size.B * size.Z, size.H) for _ in range(2))
    dB, dC = (dt.new_empty(size.share, *B.shape) for _ in range(2))
    grid, strides = (size.Z, size.B * size.G * size.share), (*_strides(x, B, C), *dy.stride()[:2])
    options: dict[str, Any] = {"BP": size.BP, "BN": size.BN, "HEADS": size.heads, "num_warps": size.warps}
    launch(
        _inputs_gradients_kernel, grid, x, dt, A, B, C, D, document, entering, dleaving, dy, dx, ddt, dA, dD,
        *size.counts, size.G, size.share, *strides, num_stages=1, **options, **size.options(document),
    )  # fmt: skip
    launch(
        _maps_gradients_kernel, grid, x, dt, A, B, C, document, entering, dleaving, dy, dB, dC, size.B, *size.counts,
        size.G, size.share, *strides, num_stages=1, **options, **size.options(document),
    )  # fmt: skip
    return dx, ddt, dA.sum(0), dB.sum(0).to(B.dtype), dC.sum(0).to(C.dtype), dD.sum(0), dfirst


@_ssd.register_fake
def _(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, first: Tensor, document: Tensor | None
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(first)


@_ssd_backward.register_fake
def _(
    dy: Tensor, dlast: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, first: Tensor,
    document: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    return tuple(torch.empty_like(v, memory_format=torch.contiguous_format) for v in (x, dt, A, B, C, D, first))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
    return *_ssd_backward(dy, dlast, *ctx.saved_tensors), None


_ssd.register_autograd(_backward, setup_context=_setup_context)


def ssd(
    x_BTHP: Tensor, dt_BTH: Tensor, A_H: Tensor, B_BTGN: Tensor, C_BTGN: Tensor, D_H: Tensor, state_BHPN: Tensor,
    document_BT: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y (B, T, H, P) in x's dtype and the last state in float32. `document_BT`: how many resets before each token."""
    B_BTGN, C_BTGN = B_BTGN.to(x_BTHP.dtype), C_BTGN.to(x_BTHP.dtype)
    document_BT = None if document_BT is None else document_BT.to(torch.int32)
    return _ssd(x_BTHP, dt_BTH, A_H.float(), B_BTGN, C_BTGN, D_H.float(), state_BHPN.float().contiguous(), document_BT)


def self_check(device: torch.device) -> None:
    """Outputs and gradients on this GPU against the plain chunks in float64; AssertionError where they differ.

    Two chunks, documents, an initial state, in float32 and bfloat16.
    """
    from nanochat.kernels.ssd import SSD

    g = torch.Generator().manual_seed(0)
    n_batch, n_time, n_head, n_width, n_group, n_state = 1, 150, 2, 64, 1, 128
    shapes = [(n_batch, n_time, n_head, n_width), (n_batch, n_time, n_head), (n_head,)]
    shapes += [(n_batch, n_time, n_group, n_state)] * 2 + [(n_head,), (n_batch, n_head, n_width, n_state)]
    inputs = [torch.randn(shape, generator=g) for shape in shapes]
    inputs[1], inputs[2] = inputs[1].abs() * 0.1, -1 - inputs[2].abs()
    segments = torch.arange(n_time).div(80, rounding_mode="floor").expand(n_batch, -1).to(device)
    for dtype, tolerance in ((torch.float32, 5e-3), (torch.bfloat16, 3e-2)):
        narrow = (0, 3, 4)
        given = [x.to(device, dtype if i in narrow else torch.float32) for i, x in enumerate(inputs)]
        kernel, oracle = (lambda *x, op=SSD[name]: op(*x, segments) for name in ("triton", "chunked"))
        compare(kernel, oracle, given, tolerance, str(dtype))
