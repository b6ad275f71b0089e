"""S6, the selective scan of Mamba-1 (Gu & Dao 2023, arXiv 2312.00752, algorithm 2).

    h_t = exp(delta_t A) * h_{t-1} + (delta_t u_t) B_t        y_t = <h_t, C_t> + D u_t

Letters: B batch, T time, E inner width, N state size; `_LBNE` is one chunk of L steps, time first.

The fast version walks the sequence in chunks of a few steps: one in-place multiply-add a step over the whole batch,
buffers that stay in cache, the state saved once a chunk and everything else computed again in the backward pass.
Products of decays are never formed in log space: with a large delta that loses all digits.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanochat.kernels.dispatch import choose
from nanochat.kernels.segments import padding, resets, state_dtype

# steps between saved states: long enough to hide the cost of a call, short enough for three buffers in cache
CHUNK_MIN, CHUNK_MAX, CHUNK_ELEMENTS = 16, 32, 1 << 19


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
) -> tuple[Tensor, Tensor]:
    """Selective scan with gradients for every float input, the initial state and the returned state.

    `delta_BTE` comes after softplus and bias, in float32; `A_EN` is negative. `state_BEN` is the state before the
    first token (zeros when None). `segments_BT` (int) numbers documents: the state is zeroed at the first token of
    each new one. `lengths` (B,): rows are right-padded, the returned state is the one after token `lengths - 1`.
    Returns `y_BTE` in u's dtype and the state in float32 (float64 for float64 inputs).
    """
    op = choose("selective_scan", SELECTIVE_SCAN, "chunked")
    return op(u_BTE, delta_BTE, A_EN, B_BTN, C_BTN, D_E, state_BEN, segments_BT, lengths)


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
) -> tuple[Tensor, Tensor]:
    """The oracle: the two formulas above, one step at a time, gradients by plain autograd."""
    n_batch, n_time, _ = u_BTE.shape
    dtype = state_dtype(u_BTE.dtype)
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
    return torch.stack(ys, 1).to(u_BTE.dtype), state


def selective_scan_step(
    u_BE: Tensor, delta_BE: Tensor, A_EN: Tensor, B_BN: Tensor, C_BN: Tensor, D_E: Tensor, state_BEN: Tensor
) -> Tensor:
    """One token of decoding, no gradient: updates `state_BEN` in place and returns `y_BE` in u's dtype."""
    dtype = state_BEN.dtype
    u = u_BE.to(dtype)
    delta = delta_BE.to(dtype)
    state_BEN.mul_((delta[:, :, None] * A_EN).exp_())
    state_BEN.addcmul_((delta * u)[:, :, None], B_BN.to(dtype)[:, None, :])
    y_BE = torch.bmm(state_BEN, C_BN.to(dtype)[:, :, None])[:, :, 0]
    return y_BE.addcmul_(u, D_E.to(dtype)).to(u_BE.dtype)


def _selective_scan_chunked(
    u_BTE: Tensor,
    delta_BTE: Tensor,
    A_EN: Tensor,
    B_BTN: Tensor,
    C_BTN: Tensor,
    D_E: Tensor,
    state_BEN: Tensor | None = None,
    segments_BT: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    dtype = state_dtype(u_BTE.dtype)
    n_batch, n_time, _ = u_BTE.shape
    delta_BTE = delta_BTE.to(dtype)
    if lengths is not None:  # delta 0: decay 1, input 0; the state stays as it is
        delta_BTE = delta_BTE.masked_fill(padding(lengths, n_time)[:, :, None], 0.0)
    if state_BEN is None:
        state_BEN = torch.zeros(n_batch, *A_EN.shape, dtype=dtype, device=u_BTE.device)
    keep_BT = None if segments_BT is None else (~resets(segments_BT)).to(dtype)
    return _ChunkedScan.apply(u_BTE, delta_BTE, A_EN, B_BTN, C_BTN, D_E, state_BEN, keep_BT)


class _Chunks:
    """One pass over the sequence: chunk slices in time-first layout, and the two buffers that every chunk reuses."""

    def __init__(
        self, u_BTE: Tensor, delta_BTE: Tensor, A_EN: Tensor, B_BTN: Tensor, C_BTN: Tensor, keep_BT: Tensor | None
    ):
        self.dtype = delta_BTE.dtype
        n_batch, self.n_time, n_inner = u_BTE.shape
        self.A_NE = A_EN.to(self.dtype).t().contiguous()
        # exp2 takes half of exp's time on a CPU, and a twentieth where the result underflows
        self.A2_NE = self.A_NE / math.log(2)
        self.size = max(CHUNK_MIN, min(CHUNK_MAX, CHUNK_ELEMENTS // (n_batch * self.A_NE.numel())))
        self.inputs = u_BTE, delta_BTE, B_BTN, C_BTN
        self.keep_BT = keep_BT
        shape = (min(self.size, self.n_time) + 1, n_batch, A_EN.shape[1], n_inner)
        self.decay = delta_BTE.new_empty(shape)
        self.h = delta_BTE.new_empty(shape)  # row 0 is the state before the chunk
        self.decay_steps, self.h_steps = self.decay.unbind(0), self.h.unbind(0)

    def slices(self, start: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """u, delta, B, C of one chunk: (L, B, E or N), in the state's dtype."""
        stop = min(start + self.size, self.n_time)
        u, delta, B, C = (x[:, start:stop].transpose(0, 1).to(self.dtype) for x in self.inputs)
        return u, delta, B, C

    def states(self, start: int, u_LBE: Tensor, delta_LBE: Tensor, B_LBN: Tensor, state_BNE: Tensor) -> Tensor:
        """Fill `decay[:L]` and `h[:L + 1]` for the chunk at `start`; returns delta * u, (L, B, E)."""
        n = u_LBE.shape[0]
        decay, h = self.decay[:n], self.h[: n + 1]
        torch.mul(delta_LBE[:, :, None, :], self.A2_NE, out=decay).exp2_()
        if self.keep_BT is not None:
            decay.mul_(self.keep_BT[:, start : start + n].t()[:, :, None, None])
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
    # vector times transposed matrix: the other order is seven times slower in MKL
    return torch.bmm(flat, x_LBNE.reshape(-1, n_state, n_inner).transpose(1, 2)).view(n_step, n_batch, n_state)


class _ChunkedScan(torch.autograd.Function):
    """`delta` and `state` decide the dtype of the recurrence; the other inputs are converted a chunk at a time."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        u_BTE, delta_BTE, A_EN, B_BTN, C_BTN, D_E, state_BEN, keep_BT = inputs
        chunks = _Chunks(u_BTE, delta_BTE, A_EN, B_BTN, C_BTN, keep_BT)
        n_batch, n_time, n_inner = u_BTE.shape
        y_BTE = torch.empty_like(u_BTE, memory_format=torch.contiguous_format)
        D = D_E.to(chunks.dtype)
        starts = range(0, n_time, chunks.size)
        saved = delta_BTE.new_empty(len(starts), n_batch, A_EN.shape[1], n_inner)
        state_BNE = state_BEN.transpose(1, 2).to(chunks.dtype)
        for i, start in enumerate(starts):
            saved[i] = state_BNE
            u, delta, B, C = chunks.slices(start)
            chunks.states(start, u, delta, B, state_BNE)
            n = u.shape[0]
            y_BTE[:, start : start + n] = _contract(chunks.h[1 : n + 1], C).addcmul_(u, D).transpose(0, 1)
            state_BNE = chunks.h[n]
        ctx.save_for_backward(u_BTE, delta_BTE, A_EN, B_BTN, C_BTN, D_E, keep_BT, saved)
        ctx.state_dtype = state_BEN.dtype
        return y_BTE, state_BNE.transpose(1, 2).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BTE: Tensor, dstate_BEN: Tensor) -> tuple[Tensor | None, ...]:
        u_BTE, delta_BTE, A_EN, B_BTN, C_BTN, D_E, keep_BT, saved = ctx.saved_tensors
        chunks = _Chunks(u_BTE, delta_BTE, A_EN, B_BTN, C_BTN, keep_BT)
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (u_BTE, delta_BTE, B_BTN, C_BTN)]
        dA_NE = torch.zeros_like(chunks.A_NE)
        D = D_E.to(chunks.dtype)
        dD_E = torch.zeros_like(D)
        g = torch.empty_like(chunks.h)
        g_steps = g.unbind(0)
        carry_BNE = dstate_BEN.transpose(1, 2)  # gradient of the state after the chunk
        for i in reversed(range(saved.shape[0])):
            start = i * chunks.size
            u, delta, B, C = chunks.slices(start)
            n = u.shape[0]
            dy = dy_BTE[:, start : start + n].transpose(0, 1).to(chunks.dtype)
            du_LBE = chunks.states(start, u, delta, B, saved[i])
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
        du_BTE, ddelta_BTE, dB_BTN, dC_BTN = grads
        dstate = carry_BNE.transpose(1, 2).to(ctx.state_dtype)
        return du_BTE, ddelta_BTE, dA_NE.t().to(A_EN.dtype), dB_BTN, dC_BTN, dD_E.to(D_E.dtype), dstate, None


SELECTIVE_SCAN = {"chunked": _selective_scan_chunked, "ref": selective_scan_ref}
