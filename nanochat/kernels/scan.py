"""S6, the selective scan of Mamba-1 (Gu & Dao 2023, arXiv 2312.00752, algorithm 2).

    h_t = exp(delta_t A) * h_{t-1} + (delta_t u_t) B_t        y_t = <h_t, C_t> + D u_t

Letters: B batch, T time, E inner width, N state size; `_LBNE` is one chunk of L steps, time first.

The chunked version walks the sequence in chunks of a few steps: one in-place multiply-add a step over the whole batch,
buffers that stay in cache, the state saved once a chunk and everything else computed again in the backward pass.
Training on a CPU takes `numba_scan` where Numba is installed.
Products of decays are never formed in log space: with a large delta that loses all digits.
"""

import functools
import importlib
import importlib.util
import logging
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanochat.errors import UsageError
from nanochat.kernels.blas import single_rows
from nanochat.kernels.dispatch import choose
from nanochat.kernels.external import run, scan_mamba_ssm
from nanochat.kernels.segments import padding, resets, state_dtype

logger = logging.getLogger("nanochat")

# Steps between saved states: long enough to hide the cost of a call, short enough for three buffers in cache.
CHUNK_MIN, CHUNK_MAX, CHUNK_ELEMENTS = 16, 32, 1 << 19
STEP_ELEMENTS = 1 << 15  # states of the rows that one CPU multiply-add advances
NUMBA_LANES = 32  # channels that `numba_scan` takes together
MAX_STATE = 64  # of a channel: what the Triton kernels hold in registers


# Two habits for the CPU: exp2 takes half of exp's time, and a twentieth where the result underflows; and a vector
# times a transposed matrix is up to seven times faster in MKL's batched product than the matrix times the vector.
LOG_2 = math.log(2)


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
) -> tuple[Tensor, Tensor]:
    """Selective scan with gradients for every float input, the initial state and the returned state.

    `delta_BTE` comes after softplus, in float32; or, with `bias_E`, before: the step is softplus(delta + bias), in
    float32 whatever delta's dtype. With `gate_BTE` the output is multiplied by silu(gate). `A_EN` is negative.
    `state_BEN` is the state before the first token (zeros when None). `segments_BT` (int) numbers documents: the state
    is zeroed at the first token of each new one. `lengths` (B,): rows are right-padded, the returned state is the one
    after token `lengths - 1`. Returns `y_BTE` in u's dtype and the state in float32 (float64 for float64 inputs).
    """
    default = "chunked"
    if u_BTE.device.type == "cpu" and torch.is_grad_enabled() and u_BTE.requires_grad and not numba_problem(u_BTE):
        default = "numba"  # not for inference, which would wait for it to be loaded
    unfit = f"more than {MAX_STATE} states a channel" if A_EN.shape[1] > MAX_STATE else ""
    inputs = (u_BTE, delta_BTE, A_EN, B_BTN, C_BTN, D_E, state_BEN, segments_BT, lengths, bias_E, gate_BTE)
    return run("selective_scan", SELECTIVE_SCAN, default, unfit, inputs)


def numba_problem(u_BTE: Tensor) -> str:
    """Why `numba_scan` cannot take such a call; empty when it can."""
    if u_BTE.device.type != "cpu":
        return f"it is for the CPU, not for {u_BTE.device.type}"
    if u_BTE.dtype == torch.float64:
        return "it computes in float32, not in float64"
    if u_BTE.shape[2] % NUMBA_LANES:
        return f"it takes multiples of {NUMBA_LANES} channels, not {u_BTE.shape[2]}"
    if torch.compiler.is_compiling():
        return "torch.compile cannot look into it"
    return "" if _has_numba() else "Numba is not installed: pip install 'nanochat[cpu]'"


@functools.cache
def _has_numba() -> bool:
    if importlib.util.find_spec("numba") is None:
        return False
    try:
        importlib.import_module("numba")
    except Exception as error:  # it wants another NumPy, for example
        logger.warning("Numba is installed, but cannot be imported (%s): Mamba trains without it", error)
        return False
    return True


def selective_scan_ref(
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
) -> tuple[Tensor, Tensor]:
    """The oracle: the two formulas above, one step at a time, gradients by plain autograd."""
    n_batch, n_time, _ = u_BTE.shape
    dtype = state_dtype(u_BTE.dtype)
    delta_BTE = _step_size(delta_BTE, bias_E, dtype)
    u_BTE_, delta_BTE, A_EN, B_BTN, C_BTN = (x.to(dtype) for x in (u_BTE, delta_BTE, A_EN, B_BTN, C_BTN))
    state = u_BTE_.new_zeros(n_batch, *A_EN.shape) if state_BEN is None else state_BEN.to(dtype)
    reset_BT = None if segments_BT is None else resets(segments_BT)
    valid_BT = None if lengths is None else ~padding(lengths, n_time)
    ys = []
    for t in range(n_time):
        if reset_BT is not None:
            state = torch.where(reset_BT[:, t, None, None], 0.0, state)
        decay_BEN = torch.exp(delta_BTE[:, t, :, None] * A_EN)
        new = decay_BEN * state + (delta_BTE[:, t] * u_BTE_[:, t])[:, :, None] * B_BTN[:, t, None, :]
        ys.append((new * C_BTN[:, t, None, :]).sum(-1) + D_E.to(dtype) * u_BTE_[:, t])
        state = new if valid_BT is None else torch.where(valid_BT[:, t, None, None], new, state)
    return _gated(torch.stack(ys, 1).to(u_BTE.dtype), gate_BTE), state


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
    """One token of decoding, no gradient: updates `state_BEN` in place and returns `y_BE` in u's dtype.

    `bias_E` and `gate_BE` as in `selective_scan`.
    """
    op = choose("selective_scan_step", SELECTIVE_SCAN_STEP, "torch", u_BE)
    return op(u_BE, delta_BE, A_EN, B_BN, C_BN, D_E, state_BEN, bias_E, gate_BE)


def _selective_scan_step_torch(
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
    dtype = state_BEN.dtype
    u = u_BE.to(dtype)
    delta = _step_size(delta_BE, bias_E, dtype).to(dtype)
    state_BEN.mul_(((delta / LOG_2)[:, :, None] * A_EN).exp2_())
    state_BEN.addcmul_((delta * u)[:, :, None], B_BN.to(dtype)[:, None, :])
    with single_rows():
        y_BE = torch.bmm(C_BN.to(dtype)[:, None, :], state_BEN.mT)[:, 0]
    return _gated(y_BE.addcmul_(u, D_E.to(dtype)).to(u_BE.dtype), gate_BE)


def _step_size(delta: Tensor, bias_E: Tensor | None, dtype: torch.dtype) -> Tensor:
    return delta if bias_E is None else F.softplus(delta.to(dtype) + bias_E)


def _gated(y: Tensor, gate: Tensor | None) -> Tensor:
    return y if gate is None else y * F.silu(gate)


def _selective_scan_triton(*inputs: Any) -> tuple[Tensor, Tensor]:
    from nanochat.kernels import triton_scan

    return triton_scan.selective_scan(*inputs)


def _selective_scan_step_triton(*inputs: Any) -> Tensor:
    from nanochat.kernels import triton_decode

    return triton_decode.selective_scan_step(*inputs)


def _selective_scan_numba(u_BTE: Tensor, *inputs: Any, **options: Any) -> tuple[Tensor, Tensor]:
    problem = numba_problem(u_BTE)
    if problem:
        raise UsageError(f"NANOCHAT_KERNEL_SELECTIVE_SCAN=numba: {problem}")
    from nanochat.kernels import numba_scan

    return _prepared(numba_scan.scan, u_BTE, *inputs, **options)


def _selective_scan_chunked(*inputs: Any, **options: Any) -> tuple[Tensor, Tensor]:
    return _prepared(_ChunkedScan.apply, *inputs, **options)


def _prepared(
    scan: Callable[..., tuple[Tensor, Tensor]],
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
) -> tuple[Tensor, Tensor]:
    dtype = state_dtype(u_BTE.dtype)
    n_batch, n_time, _ = u_BTE.shape
    # what every implementation on the CPU starts from
    delta_BTE = _step_size(delta_BTE, bias_E, dtype).to(dtype)
    if lengths is not None:  # delta 0: decay 1, input 0; the state stays as it is
        delta_BTE = delta_BTE.masked_fill(padding(lengths, n_time)[:, :, None], 0.0)
    if state_BEN is None:
        state_BEN = torch.zeros(n_batch, *A_EN.shape, dtype=dtype, device=u_BTE.device)
    reset_BT = None if segments_BT is None else resets(segments_BT)
    y_BTE, last_BEN = scan(u_BTE, delta_BTE, A_EN, B_BTN, C_BTN, D_E, state_BEN, reset_BT)
    return _gated(y_BTE, gate_BTE), last_BEN


class _Chunks:
    """A few rows of the batch: their chunks in time-first layout, and the two buffers that every chunk reuses."""

    def __init__(self, rows: slice, inputs: tuple[Tensor, ...], A_EN: Tensor, reset_BT: Tensor | None):
        self.inputs = [x[rows] for x in inputs]
        self.dtype = inputs[1].dtype
        n_batch, self.n_time, n_inner = self.inputs[0].shape
        self.size = _chunk_size(inputs[0], A_EN)
        self.starts = range(0, self.n_time, self.size)
        self.A_NE = A_EN.to(self.dtype).t().contiguous()
        self.A2_NE = self.A_NE / LOG_2
        self.resets: list[list[list[int]]] = [[] for _ in self.starts]
        for row, time in [] if reset_BT is None else torch.nonzero(reset_BT[rows]).tolist():
            self.resets[time // self.size].append([time % self.size, row])
        shape = (min(self.size, self.n_time) + 1, n_batch, A_EN.shape[1], n_inner)
        self.decay = inputs[1].new_empty(shape)
        self.h = inputs[1].new_empty(shape)  # row 0 is the state before the chunk
        self.decay_steps, self.h_steps = self.decay.unbind(0), self.h.unbind(0)

    def slices(self, start: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """u, delta, B, C of one chunk: (L, B, E or N), in the state's dtype."""
        stop = min(start + self.size, self.n_time)
        u, delta, B, C = (x[:, start:stop].transpose(0, 1).to(self.dtype) for x in self.inputs)
        return u, delta, B, C

    def states(self, i: int, u_LBE: Tensor, delta_LBE: Tensor, B_LBN: Tensor, state_BNE: Tensor) -> Tensor:
        """Fill `decay[:L]` and `h[:L + 1]` for chunk i; returns delta * u, (L, B, E)."""
        n = u_LBE.shape[0]
        decay, h = self.decay[:n], self.h[: n + 1]
        torch.mul(delta_LBE[:, :, None, :], self.A2_NE, out=decay).exp2_()
        for step, row in self.resets[i]:
            self.decay_steps[step][row].zero_()
        du_LBE = delta_LBE * u_LBE
        h[0] = state_BNE
        torch.mul(du_LBE[:, :, None, :], B_LBN[:, :, :, None], out=h[1:])
        for t in range(n):
            self.h_steps[t + 1].addcmul_(self.decay_steps[t], self.h_steps[t])
        return du_LBE


def _contract(x_LBNE: Tensor, vector_LBN: Tensor) -> Tensor:
    """Sum over N of x * vector -> (L, B, E)."""
    n_step, n_batch, n_state, n_inner = x_LBNE.shape
    flat = vector_LBN.reshape(n_step * n_batch, 1, n_state)
    return torch.bmm(flat, x_LBNE.reshape(-1, n_state, n_inner)).view(n_step, n_batch, n_inner)


def _contract_inner(x_LBNE: Tensor, vector_LBE: Tensor) -> Tensor:
    """Sum over E of x * vector -> (L, B, N)."""
    n_step, n_batch, n_state, n_inner = x_LBNE.shape
    flat = vector_LBE.reshape(n_step * n_batch, 1, n_inner)
    return torch.bmm(flat, x_LBNE.reshape(-1, n_state, n_inner).transpose(1, 2)).view(n_step, n_batch, n_state)


def _row_blocks(u_BTE: Tensor, A_EN: Tensor) -> list[slice]:
    n_batch = u_BTE.shape[0]
    step = n_batch if u_BTE.device.type != "cpu" else max(1, STEP_ELEMENTS // A_EN.numel())
    return [slice(i, min(i + step, n_batch)) for i in range(0, n_batch, step)]


def _chunk_size(u_BTE: Tensor, A_EN: Tensor) -> int:
    first = _row_blocks(u_BTE, A_EN)[0]
    return max(CHUNK_MIN, min(CHUNK_MAX, CHUNK_ELEMENTS // (first.stop * A_EN.numel())))


class _ChunkedScan(torch.autograd.Function):
    """`delta` decides the dtype of the recurrence; the other inputs are converted a chunk at a time."""

    @staticmethod
    @single_rows()
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        u, delta, A_EN, B, C, D_E, state_BEN, reset_BT = inputs
        y_BTE = torch.empty_like(u, memory_format=torch.contiguous_format)
        last_BEN = torch.empty_like(state_BEN, dtype=delta.dtype, memory_format=torch.contiguous_format)
        n_chunk = -(-u.shape[1] // _chunk_size(u, A_EN))
        before_ZBNE = delta.new_empty(n_chunk, u.shape[0], *A_EN.shape[::-1])  # the state before each chunk
        for rows in _row_blocks(u, A_EN):
            chunks = _Chunks(rows, (u, delta, B, C), A_EN, reset_BT)
            last_BEN[rows] = _forward(chunks, D_E, state_BEN[rows], y_BTE[rows], before_ZBNE[:, rows])
        ctx.save_for_backward(u, delta, A_EN, B, C, D_E, reset_BT, before_ZBNE)
        ctx.state_dtype = state_BEN.dtype
        return y_BTE, last_BEN

    @staticmethod
    @once_differentiable
    @single_rows()
    def backward(ctx: Any, dy_BTE: Tensor, dlast_BEN: Tensor) -> tuple[Tensor | None, ...]:
        u, delta, A_EN, B, C, D_E, reset_BT, before_ZBNE = ctx.saved_tensors
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (u, delta, B, C)]
        dA_NE = torch.zeros(A_EN.shape[::-1], dtype=delta.dtype, device=u.device)
        dD_E = torch.zeros_like(D_E, dtype=delta.dtype)
        dstate_BEN = torch.empty_like(dlast_BEN, memory_format=torch.contiguous_format)
        for rows in _row_blocks(u, A_EN):
            chunks = _Chunks(rows, (u, delta, B, C), A_EN, reset_BT)
            parts = [grad[rows] for grad in grads]
            carry = dlast_BEN[rows]
            dstate_BEN[rows] = _backward(chunks, D_E, before_ZBNE[:, rows], dy_BTE[rows], carry, parts, dA_NE, dD_E)
        du, ddelta, dB, dC = grads
        dA, dD, dstate = dA_NE.t().to(A_EN.dtype), dD_E.to(D_E.dtype), dstate_BEN.to(ctx.state_dtype)
        return du, ddelta, dA, dB, dC, dD, dstate, None


def _forward(chunks: _Chunks, D_E: Tensor, state_BEN: Tensor, y_BTE: Tensor, before_ZBNE: Tensor) -> Tensor:
    """Fill y and the state before each chunk; returns the state after the last."""
    D = D_E.to(chunks.dtype)
    state_BNE = state_BEN.transpose(1, 2)
    for i, start in enumerate(chunks.starts):
        before_ZBNE[i] = state_BNE
        u, delta, B, C = chunks.slices(start)
        chunks.states(i, u, delta, B, before_ZBNE[i])
        n = u.shape[0]
        y_BTE[:, start : start + n] = _contract(chunks.h[1 : n + 1], C).addcmul_(u, D).transpose(0, 1)
        state_BNE = chunks.h[n]
    return state_BNE.transpose(1, 2)


def _backward(
    chunks: _Chunks,
    D_E: Tensor,
    before_ZBNE: Tensor,
    dy_BTE: Tensor,
    dlast_BEN: Tensor,
    grads: list[Tensor],
    dA_NE: Tensor,
    dD_E: Tensor,
) -> Tensor:
    """Fill the gradients of u, delta, B, C; add to those of A and D; returns that of the state before the rows."""
    D = D_E.to(chunks.dtype)
    g = torch.empty_like(chunks.h)
    g_steps = g.unbind(0)
    carry_BNE = dlast_BEN.transpose(1, 2)  # gradient of the state after the chunk
    for i, start in reversed(list(enumerate(chunks.starts))):
        u, delta, B, C = chunks.slices(start)
        n = u.shape[0]
        dy = dy_BTE[:, start : start + n].transpose(0, 1).to(chunks.dtype)
        du_LBE = chunks.states(i, u, delta, B, before_ZBNE[i])
        decay, h = chunks.decay[:n], chunks.h[: n + 1]
        # gradient of each state: dy_t C_t + decay_{t+1} g_{t+1}
        torch.mul(dy[:, :, None, :], C[:, :, :, None], out=g[:n])
        g_steps[n - 1].add_(carry_BNE)
        for t in range(n - 2, -1, -1):
            g_steps[t].addcmul_(chunks.decay_steps[t + 1], g_steps[t + 1])
        dinput = _contract(g[:n], B)  # gradient of delta * u
        dD_E += (dy * u).sum((0, 1))
        dB, dC = _contract_inner(g[:n], du_LBE), _contract_inner(h[1:], dy)
        q = h[:-1].mul_(decay).mul_(g[:n])  # gradient of the exponent delta * A
        carry_BNE = decay[0] * g[0]
        ddelta = torch.mul(q, chunks.A_NE, out=g[:n]).sum(2).addcmul_(dinput, u)
        dA_NE += q.mul_(delta[:, :, None, :]).sum((0, 1))
        du = dinput.mul_(delta).addcmul_(dy, D)
        for grad, part in zip(grads, (du, ddelta, dB, dC), strict=True):
            grad[:, start : start + n] = part.transpose(0, 1)
    return carry_BNE.transpose(1, 2)


SELECTIVE_SCAN: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "chunked": _selective_scan_chunked,
    "numba": _selective_scan_numba,
    "triton": _selective_scan_triton,
    "mamba_ssm": scan_mamba_ssm,
    "ref": selective_scan_ref,
}
SELECTIVE_SCAN_STEP: dict[str, Callable[..., Tensor]] = {
    "torch": _selective_scan_step_torch,
    "triton": _selective_scan_step_triton,
}
