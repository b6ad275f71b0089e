"""S6 on the CPU in machine code: one pass forward, two passes backward, states in registers and the nearest cache.

The same recurrence as the chunked version of `scan`, which needs some twenty passes over (B, T, N, E) numbers; here
nothing of that size exists. Numba compiles two functions at the first use of a process (about two seconds), no compiler
is needed. Work items are `LANES` channels of one row; threads share them, and what several items add to is summed
afterwards, so that the result does not depend on the number of threads.

Letters: B batch, T time, E inner width, N state size, Z chunks, K items of a row.
"""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanochat.kernels.scan import NUMBA_LANES

LANES = NUMBA_LANES  # of a work item: two registers of sixteen
CHUNK = 32  # steps between saved states; what the backward pass computes again stays in the second-level cache
LOG_2 = math.log(2)
CUT = -1e4  # added to the exponent of a document's first step: its decay is zero
# Sums may be taken in another order, products contracted; NaN and infinity mean what they always do.
MATH = {"reassoc", "contract", "nsz", "arcp"}


@numba.njit(inline="always", fastmath=MATH)
def _exp2(x: Any) -> Any:
    """2^x, to half a unit in the last place or so: 2^f = 1 + f P(f) for |f| <= 1/2, and an exponent."""
    x = np.float32(-127.0) if x < np.float32(-127.0) else x
    x = np.float32(128.0) if x > np.float32(128.0) else x  # infinite
    n = np.floor(x + np.float32(0.5))
    f = x - n
    p = np.float32(0.00015453163359779865)
    p = p * f + np.float32(0.0013390863314270973)
    p = p * f + np.float32(0.009618083015084267)
    p = p * f + np.float32(0.055503569543361664)
    p = p * f + np.float32(0.24022650718688965)
    p = p * f + np.float32(0.6931471824645996)
    p = p * f + np.float32(1.0)
    return p * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)


# The loops over lanes have a fixed length and touch local arrays only: that is what makes them vector instructions.


@numba.njit(nogil=True, fastmath=MATH)
def _forward(
    u: Any,
    delta: Any,
    A2: Any,
    B: Any,
    C: Any,
    D: Any,
    state: Any,
    border: Any,
    y: Any,
    before: Any,
    last: Any,
    items: Any,
) -> None:
    n_time, n_state, n_block = u.shape[1], A2.shape[0], u.shape[2] // LANES
    h = np.empty((n_state, LANES), np.float32)
    rate = np.empty((n_state, LANES), np.float32)
    du, dt, out = np.empty(LANES, np.float32), np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    for item in range(items[0], items[1]):
        b, at = item // n_block, item % n_block * LANES
        for n in range(n_state):
            for e in range(LANES):
                h[n, e], rate[n, e] = state[b, n, at + e], A2[n, at + e]
        for t in range(n_time):
            if t % CHUNK == 0:
                for n in range(n_state):
                    for e in range(LANES):
                        before[t // CHUNK, b, n, at + e] = h[n, e]
            cut = border[b, t]
            for e in range(LANES):
                dt[e] = delta[b, t, at + e]
                du[e] = dt[e] * u[b, t, at + e]
                out[e] = D[at + e] * u[b, t, at + e]
            for n in range(n_state):
                bn, cn = B[b, t, n], C[b, t, n]
                for e in range(LANES):
                    new = _exp2(dt[e] * rate[n, e] + cut) * h[n, e] + du[e] * bn
                    h[n, e] = new
                    out[e] += new * cn
            for e in range(LANES):
                y[b, t, at + e] = out[e]
        for n in range(n_state):
            for e in range(LANES):
                last[b, n, at + e] = h[n, e]


@numba.njit(nogil=True, fastmath=MATH)
def _backward(
    u: Any, delta: Any, A: Any, A2: Any, B: Any, C: Any, D: Any, border: Any, before: Any, dy: Any, dlast: Any,
    grad_u: Any, grad_delta: Any, grad_A: Any, grad_B: Any, grad_C: Any, grad_D: Any, grad_state: Any, items: Any,
) -> None:  # fmt: skip
    n_time, n_state, n_block = u.shape[1], A.shape[0], u.shape[2] // LANES
    states = np.empty((CHUNK + 1, n_state, LANES), np.float32)
    decays = np.empty((CHUNK, n_state, LANES), np.float32)
    rate, rate2 = np.empty((n_state, LANES), np.float32), np.empty((n_state, LANES), np.float32)
    h, g, dA = (
        np.empty((n_state, LANES), np.float32),
        np.empty((n_state, LANES), np.float32),
        np.empty((n_state, LANES), np.float32),
    )
    du, dt, dout = np.empty(LANES, np.float32), np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    dinput, dexponent, dD = np.empty(LANES, np.float32), np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    for item in range(items[0], items[1]):
        b, k, at = item // n_block, item % n_block, item % n_block * LANES
        dD[:] = 0
        for n in range(n_state):
            for e in range(LANES):
                rate[n, e], rate2[n, e] = A[n, at + e], A2[n, at + e]
                g[n, e], dA[n, e] = dlast[b, n, at + e], 0
        for z in range((n_time - 1) // CHUNK, -1, -1):
            start = z * CHUNK
            n_step = min(CHUNK, n_time - start)
            for n in range(n_state):
                for e in range(LANES):
                    h[n, e] = before[z, b, n, at + e]
                    states[0, n, e] = h[n, e]
            for i in range(n_step):
                t, new, decay = start + i, states[i + 1], decays[i]
                cut = border[b, t]
                for e in range(LANES):
                    dt[e] = delta[b, t, at + e]
                    du[e] = dt[e] * u[b, t, at + e]
                for n in range(n_state):
                    bn = B[b, t, n]
                    for e in range(LANES):
                        d = _exp2(dt[e] * rate2[n, e] + cut)
                        x = d * h[n, e] + du[e] * bn
                        h[n, e] = x
                        new[n, e] = x
                        decay[n, e] = d
            for i in range(n_step - 1, -1, -1):
                t, new, old, decay = start + i, states[i + 1], states[i], decays[i]
                for e in range(LANES):
                    dt[e], dout[e] = delta[b, t, at + e], dy[b, t, at + e]
                    du[e] = dt[e] * u[b, t, at + e]
                    dinput[e], dexponent[e] = 0, 0
                for n in range(n_state):
                    bn, cn = B[b, t, n], C[b, t, n]
                    db, dc = np.float32(0), np.float32(0)
                    for e in range(LANES):
                        dnew = g[n, e] + dout[e] * cn  # gradient of the state after this step
                        dinput[e] += dnew * bn
                        db += dnew * du[e]
                        dc += new[n, e] * dout[e]
                        dold = dnew * decay[n, e]
                        q = dold * old[n, e]  # gradient of the exponent delta * A
                        dexponent[e] += q * rate[n, e]
                        dA[n, e] += q * dt[e]
                        g[n, e] = dold
                    grad_B[k, b, t, n], grad_C[k, b, t, n] = db, dc
                for e in range(LANES):
                    x = u[b, t, at + e]
                    grad_delta[b, t, at + e] = dexponent[e] + dinput[e] * x
                    grad_u[b, t, at + e] = dinput[e] * dt[e] + dout[e] * D[at + e]
                    dD[e] += dout[e] * x
        for e in range(LANES):
            grad_D[b, at + e] = dD[e]
        for n in range(n_state):
            for e in range(LANES):
                grad_A[b, n, at + e], grad_state[b, n, at + e] = dA[n, e], g[n, e]


class _Scan(torch.autograd.Function):
    """Saves its inputs in float32 and the state before each chunk."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        u, delta, A_EN, B, C, D_E, state_BEN, reset_BT = inputs
        n_batch, n_time, n_inner = u.shape
        args = [_plain(v) for v in (u, delta, A_EN.t() / LOG_2, B, C, D_E, state_BEN.transpose(1, 2))]
        border_BT = _zeros(n_batch, n_time)
        if reset_BT is not None:
            border_BT.masked_fill_(reset_BT, CUT)
        y = _empty(*u.shape)
        before_ZBNE = _empty(-(-n_time // CHUNK), n_batch, A_EN.shape[1], n_inner)
        last_BNE = _empty(n_batch, A_EN.shape[1], n_inner)
        _share(_forward, n_batch * n_inner // LANES, *args, border_BT, y, before_ZBNE, last_BNE)
        ctx.save_for_backward(u, delta, A_EN, B, C, D_E, border_BT, before_ZBNE)
        ctx.state_dtype = state_BEN.dtype
        return y.to(u.dtype), last_BNE.transpose(1, 2).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BTE: Tensor, dlast_BEN: Tensor) -> tuple[Tensor | None, ...]:
        u, delta, A_EN, B, C, D_E, border_BT, before_ZBNE = ctx.saved_tensors
        n_batch, n_time, n_inner = u.shape
        n_state, n_block = A_EN.shape[1], n_inner // LANES
        ends = [_plain(v) for v in (dy_BTE, dlast_BEN.transpose(1, 2))]
        args = [_plain(v) for v in (u, delta, A_EN.t(), A_EN.t() / LOG_2, B, C, D_E)]
        du, ddelta = _empty(*u.shape), _empty(*u.shape)
        dA_BNE, dstate_BNE = (_empty(n_batch, n_state, n_inner) for _ in range(2))
        dB_KBTN, dC_KBTN = (_empty(n_block, n_batch, n_time, n_state) for _ in range(2))
        dD_BE = _empty(n_batch, n_inner)
        found = (du, ddelta, dA_BNE, dB_KBTN, dC_KBTN, dD_BE, dstate_BNE)
        _share(_backward, n_batch * n_block, *args, border_BT, before_ZBNE, *ends, *found)
        dA, dB, dC, dD = dA_BNE.sum(0).t(), dB_KBTN.sum(0), dC_KBTN.sum(0), dD_BE.sum(0)
        grads = (du, ddelta, dA, dB, dC, dD)
        like = (u, delta, A_EN, B, C, D_E)
        dstate = dstate_BNE.transpose(1, 2).to(ctx.state_dtype)
        return (*(grad.to(v.dtype) for grad, v in zip(grads, like, strict=True)), dstate, None)


def scan(*inputs: Any) -> tuple[Tensor, Tensor]:
    """(u_BTE, delta_BTE, A_EN, B_BTN, C_BTN, D_E, state_BEN, reset_BT or None) to (y_BTE, last_BEN).

    All on the CPU, E a multiple of `LANES`, delta in float32 after softplus.
    """
    u, delta, A_EN, B, C, D_E, state_BEN, reset_BT = inputs
    n_batch, n_time, n_inner = u.shape
    rows = (n_batch, n_time, A_EN.shape[1])
    # machine code checks no bounds: torch does, and says what does not fit
    delta, A_EN, B, C = delta.expand(u.shape), A_EN.expand(n_inner, -1), B.expand(rows), C.expand(rows)
    state_BEN = state_BEN.expand(n_batch, n_inner, -1).expand(-1, -1, rows[2])
    return _Scan.apply(u, delta, A_EN, B, C, D_E.expand(n_inner), state_BEN, reset_BT)


def _empty(*shape: int) -> Tensor:  # whatever torch's defaults are
    return torch.empty(*shape, dtype=torch.float32, device="cpu")


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.float32, device="cpu")


def _plain(v: Tensor) -> Tensor:
    return v.detach().to(torch.float32).contiguous()


def _share(function: Any, n_item: int, *tensors: Tensor) -> None:
    """Call the function on equal parts of the items, a thread each, as many as torch uses."""
    arrays = [v.numpy() for v in tensors]
    n_part = min(torch.get_num_threads(), n_item)
    parts = [(n_item * i // n_part, n_item * (i + 1) // n_part) for i in range(n_part)]
    waiting = [_threads(n_part - 1).submit(partial(function, *arrays, part)) for part in parts[1:]]
    function(*arrays, parts[0])
    for future in waiting:
        future.result()


@cache
def _threads(n: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n, thread_name_prefix="scan")


if hasattr(os, "register_at_fork"):  # a forked process has none of its parent's threads
    os.register_at_fork(after_in_child=_threads.cache_clear)
