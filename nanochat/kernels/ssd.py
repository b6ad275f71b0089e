"""SSD, the scan of Mamba-2 (Dao & Gu 2024, arXiv 2405.21060, section 6): a scalar decay a head, so chunks are matmuls.

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T        y_t = h_t C_t + D x_t

Decays between two steps of a chunk are exponentials of differences of cumulative sums, always taken on the side where
they are at most 1. The sums are kept in float64 on a CPU; elsewhere the relative error of a decay is about 1e-7 times
the sum of |dt A| over a chunk.

Letters: B batch, T time, H heads, P head width, G groups (G divides H), N state size, Q steps in a chunk,
Z chunks of a row, Y chunks of several rows, R heads of a group.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanochat.kernels import external
from nanochat.kernels.blas import single_rows
from nanochat.kernels.dispatch import choose
from nanochat.kernels.segments import padding, resets, state_dtype

CHUNK = 64
LOWEST = -104.0  # exponent of a decay that is zero in float32
TRITON_WIDTH, TRITON_STATE = 128, 256  # the largest head and state whose tiles a GPU's shared memory holds
BLOCK = 1 << 18  # elements of the (Q, Q) decays of a few chunks that stay in a CPU's cache


def ssd(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    D_H: Tensor,
    state_BHPN: Tensor | None = None,
    segments_BT: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """State space duality with gradients for every float input, the initial state and the returned state.

    `dt_BTH` comes after softplus and bias, in float32; `A_H` is negative. `state_BHPN` is the state before the first
    token (zeros when None). `segments_BT` (int) numbers documents: the state is zeroed at the first token of each new
    one. `lengths` (B,): rows are right-padded, the returned state is the one after token `lengths - 1`.
    Returns `y_BTHP` in x's dtype and the state in float32 (float64 for float64 inputs).
    """
    wide = x_BTHP.shape[3] > TRITON_WIDTH or B_BTGN.shape[3] > TRITON_STATE
    unfit = f"heads wider than {TRITON_WIDTH} or more than {TRITON_STATE} states" if wide else ""
    inputs = (x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, state_BHPN, segments_BT, lengths)
    return external.run("ssd", SSD, "chunked", unfit, inputs)


def ssd_ref(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    D_H: Tensor,
    state_BHPN: Tensor | None = None,
    segments_BT: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The oracle: the two formulas above, one step at a time, gradients by plain autograd."""
    n_batch, n_time, n_head, n_width = x_BTHP.shape
    dtype = state_dtype(x_BTHP.dtype)
    x, dt, A, D = (v.to(dtype) for v in (x_BTHP, dt_BTH, A_H, D_H))
    repeats = n_head // B_BTGN.shape[2]
    B_BTHN = B_BTGN.to(dtype).repeat_interleave(repeats, 2)
    C_BTHN = C_BTGN.to(dtype).repeat_interleave(repeats, 2)
    state = x.new_zeros(n_batch, n_head, n_width, B_BTGN.shape[3]) if state_BHPN is None else state_BHPN.to(dtype)
    reset_BT = None if segments_BT is None else resets(segments_BT)
    valid_BT = None if lengths is None else ~padding(lengths, n_time)
    ys = []
    for t in range(n_time):
        if reset_BT is not None:
            state = torch.where(reset_BT[:, t, None, None, None], 0.0, state)
        decay_BH = torch.exp(dt[:, t] * A)
        update = (dt[:, t, :, None] * x[:, t])[..., None] * B_BTHN[:, t, :, None, :]
        new = decay_BH[..., None, None] * state + update
        ys.append((new * C_BTHN[:, t, :, None, :]).sum(-1) + D[:, None] * x[:, t])
        state = new if valid_BT is None else torch.where(valid_BT[:, t, None, None, None], new, state)
    return torch.stack(ys, 1).to(x_BTHP.dtype), state


def ssd_step(
    x_BHP: Tensor, dt_BH: Tensor, A_H: Tensor, B_BGN: Tensor, C_BGN: Tensor, D_H: Tensor, state_BHPN: Tensor
) -> Tensor:
    """One token of decoding, no gradient: updates `state_BHPN` in place and returns `y_BHP` in x's dtype."""
    op = choose("ssd_step", SSD_STEP, "torch", x_BHP)
    return op(x_BHP, dt_BH, A_H, B_BGN, C_BGN, D_H, state_BHPN)


def _ssd_step_torch(
    x_BHP: Tensor, dt_BH: Tensor, A_H: Tensor, B_BGN: Tensor, C_BGN: Tensor, D_H: Tensor, state_BHPN: Tensor
) -> Tensor:
    n_batch, n_head, n_width, n_state = state_BHPN.shape
    n_group = B_BGN.shape[1]
    dtype = state_BHPN.dtype
    x, dt, B, C = x_BHP.to(dtype), dt_BH.to(dtype), B_BGN.to(dtype), C_BGN.to(dtype)
    state_BHPN.mul_((dt * A_H).exp_()[:, :, None, None])
    rows = state_BHPN.view(n_batch, n_group, -1, n_state)
    rows.addcmul_((x * dt[:, :, None]).view(n_batch, n_group, -1, 1), B[:, :, None, :])
    # vector times transposed matrix: the other order is five times slower in MKL's batched product
    with single_rows():
        y = torch.bmm(C.reshape(-1, 1, n_state), rows.flatten(0, 1).mT).view(n_batch, n_head, n_width)
    return y.addcmul_(x, D_H.to(dtype)[:, None]).to(x_BHP.dtype)


def _prepare(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    D_H: Tensor,
    state_BHPN: Tensor | None = None,
    segments_BT: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """The inputs with padding as steps of 0, a state, and instead of segments how many resets lie before each token."""
    dtype = state_dtype(x_BTHP.dtype)
    n_batch, n_time, n_head, n_width = x_BTHP.shape
    dt_BTH = dt_BTH.to(dtype)
    if lengths is not None:  # dt 0: decay 1, input 0; the state stays as it is
        dt_BTH = dt_BTH.masked_fill(padding(lengths, n_time)[:, :, None], 0.0)
    if state_BHPN is None:
        state_BHPN = dt_BTH.new_zeros(n_batch, n_head, n_width, B_BTGN.shape[3])
    document_BT = None if segments_BT is None else resets(segments_BT).cumsum(1)
    return x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, state_BHPN, document_BT


def _ssd_chunked(*inputs: Any) -> tuple[Tensor, Tensor]:
    return _ChunkedSSD.apply(*_prepare(*inputs))


def _ssd_mamba_ssm(*inputs: Any) -> tuple[Tensor, Tensor]:
    return external.ssd_mamba_ssm(*_prepare(*inputs))


def _ssd_fla(*inputs: Any) -> tuple[Tensor, Tensor]:
    return external.ssd_fla(*_prepare(*inputs))


def _ssd_step_triton(*inputs: Any) -> Tensor:
    from nanochat.kernels import triton_decode

    return triton_decode.ssd_step(*inputs)


def _ssd_triton(*inputs: Any) -> tuple[Tensor, Tensor]:
    from nanochat.kernels import triton_ssd

    return triton_ssd.ssd(*_prepare(*inputs))


class _Decays(NamedTuple):
    """What is left of an input after the steps between two places of a chunk; zero across documents."""

    pair_YHQQ: Tensor  # from step j (last dimension) to step i
    to_end_YQH: Tensor  # from step j to the chunk's end
    from_start_YQH: Tensor  # from the chunk's start to step i
    whole_YH: Tensor  # over the whole chunk


class _Chunks:
    """Some chunks of some rows, (Y, Q, ...) with Y = rows * Z chunks, in the dtype of the recurrence."""

    def __init__(self, rows: slice, chunks: slice, inputs: tuple[Tensor, ...], document_BT: Tensor | None):
        x, dt, A_H, B, C = inputs
        self.rows, self.dtype = rows, dt.dtype
        self.size = min(CHUNK, x.shape[1])
        self.n_chunk = chunks.stop - chunks.start
        self.times = slice(chunks.start * self.size, min(chunks.stop * self.size, x.shape[1]))
        self.pad = chunks.stop * self.size - self.times.stop
        self.x_YQHP, self.dt_YQH, self.B_YQGN, self.C_YQGN = (self.cut(v) for v in (x, dt, B, C))
        self.n_group = B.shape[2]
        self.A_H = A_H.to(self.dtype)
        self.document_BZQ = None if document_BT is None else self.documents(document_BT)
        self.decays = self.make_decays(document_BT)

    def cut(self, v: Tensor) -> Tensor:
        v = v[self.rows, self.times].to(self.dtype)
        if self.pad:
            v = F.pad(v, (0, 0) * (v.dim() - 2) + (0, self.pad))
        return v.reshape(-1, self.size, *v.shape[2:])

    def join(self, v_YQ: Tensor) -> Tensor:
        """Chunks back to rows, without the padding."""
        v = v_YQ.reshape(-1, self.n_chunk * self.size, *v_YQ.shape[2:])
        return v[:, : v.shape[1] - self.pad]

    def documents(self, document_BT: Tensor) -> Tensor:
        document = document_BT[self.rows, self.times]
        document = F.pad(document, (0, self.pad), mode="replicate") if self.pad else document
        return document.reshape(-1, self.n_chunk, self.size)

    def make_decays(self, document_BT: Tensor | None) -> _Decays:
        # sums over a chunk in float64: their differences keep all digits of a float32, for 5% of the time
        wide = _sum_dtype(self.dt_YQH)
        # exp2 takes half of exp's time on a CPU
        cum_YQH = torch.cumsum(self.dt_YQH.to(wide) * (self.A_H.to(wide) / math.log(2)), 1)
        cum_YHQ = cum_YQH.transpose(1, 2).contiguous()
        to_end, from_start, whole = cum_YQH[:, -1:] - cum_YQH, cum_YQH.clone(), cum_YQH[:, -1].clone()
        pair = torch.sub(cum_YHQ[:, :, :, None], cum_YHQ[:, :, None, :]).to(self.dtype)
        if document_BT is not None:
            assert self.document_BZQ is not None
            inside = self.document_BZQ.flatten(0, 1)
            pair.masked_fill_((inside[:, :, None] != inside[:, None, :])[:, None], -torch.inf)
            last = self.document_BZQ[:, :, -1:]
            first = self.times.start  # a row's first document is number 0
            ahead = document_BT[self.rows, first - 1, None] if first else torch.zeros_like(last[:, 0])
            before = torch.cat((ahead[:, None], last[:, :-1]), 1)
            to_end.masked_fill_((self.document_BZQ != last).flatten(0, 1)[:, :, None], -torch.inf)
            from_start.masked_fill_((self.document_BZQ != before).flatten(0, 1)[:, :, None], -torch.inf)
            whole.masked_fill_((last != before).view(-1, 1), -torch.inf)
        # above the diagonal stand decays from later steps, up to infinity
        return _Decays(pair.exp2_().tril_(), *(v.to(self.dtype).exp2_() for v in (to_end, from_start, whole)))

    def by_group(self, v_YQ: Tensor) -> Tensor:
        """(Y, Q, H, P) to (Y * G, Q, R * P): the R heads of a group side by side, for one matmul."""
        v = v_YQ.reshape(v_YQ.shape[0], self.size, self.n_group, -1).transpose(1, 2)
        return v.reshape(-1, self.size, v.shape[3])

    def from_group(self, v: Tensor, shape: torch.Size | None = None) -> Tensor:
        """(Y * G, Q, R * P) to (Y, Q, H, P)."""
        v = v.view(-1, self.n_group, *v.shape[1:]).transpose(1, 2)
        return v.reshape(self.x_YQHP.shape if shape is None else shape)

    def by_head(self, v_YQHP: Tensor) -> Tensor:
        """(Y, Q, H, P) to (Y * H, Q, P)."""
        return v_YQHP.transpose(1, 2).reshape(-1, self.size, v_YQHP.shape[3])

    def from_heads(self, v: Tensor) -> Tensor:
        """(Y * H, Q, P) to (Y, Q, H, P), a view."""
        return v.view(self.x_YQHP.shape[0], -1, *v.shape[1:]).transpose(1, 2)

    def with_scores(self, pair_YHQQ: Tensor, scores: Tensor, out: Tensor | None = None) -> Tensor:
        """Decays times the scores (Y * G, Q, Q) of each head's group."""
        grouped = pair_YHQQ.view(scores.shape[0], -1, *scores.shape[1:])
        out = torch.empty_like(pair_YHQQ) if out is None else out
        torch.mul(grouped, scores[:, None], out=out.view(grouped.shape))
        return out

    def sum_heads(self, v_YHQQ: Tensor) -> Tensor:
        """(Y, H, Q, Q) to (Y * G, Q, Q)."""
        return v_YHQQ.view(v_YHQQ.shape[0] * self.n_group, -1, self.size, self.size).sum(1)

    def carry(self, state_BHPN: Tensor, local: Tensor, entering_BZHPN: Tensor) -> Tensor:
        """The short recurrence over chunks: fills the state before each chunk, returns the one after the last."""
        local = local.view(entering_BZHPN.shape)
        whole = self.decays.whole_YH.view(entering_BZHPN.shape[:3])[..., None, None]
        for z in range(self.n_chunk):
            entering_BZHPN[:, z] = state_BHPN
            state_BHPN = torch.addcmul(local[:, z], whole[:, z], state_BHPN)
        return state_BHPN


class _ChunkedSSD(torch.autograd.Function):
    """Saves the inputs and the state before each chunk; decays and scores are made again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        x, dt, A, B, C, D, state_BHPN, document = inputs
        y_BTHP = torch.empty_like(x, memory_format=torch.contiguous_format)
        last_BHPN = torch.empty_like(state_BHPN, dtype=dt.dtype, memory_format=torch.contiguous_format)
        last_BHPN.copy_(state_BHPN)
        n_chunk = -(-x.shape[1] // CHUNK)
        entering_BZHPN = dt.new_empty(x.shape[0], n_chunk, *state_BHPN.shape[1:])
        for rows, chunks in _blocks(x):
            c = _Chunks(rows, chunks, (x, dt, A, B, C), document)
            B_, C_ = c.by_group(c.B_YQGN), c.by_group(c.C_YQGN)
            xdt = c.x_YQHP * c.dt_YQH[..., None]
            local = torch.bmm(c.by_group(xdt * c.decays.to_end_YQH[..., None]).mT, B_)
            entering = entering_BZHPN[rows, chunks]
            last_BHPN[rows] = c.carry(last_BHPN[rows], local, entering)
            y = c.from_group(torch.bmm(C_, entering.view(local.shape).mT)).mul_(c.decays.from_start_YQH[..., None])
            y.addcmul_(c.x_YQHP, D.to(dt.dtype)[:, None])
            weights = c.with_scores(c.decays.pair_YHQQ, torch.bmm(C_, B_.mT), out=c.decays.pair_YHQQ)
            y += c.from_heads(torch.bmm(weights.flatten(0, 1), c.by_head(xdt)))
            y_BTHP[rows, c.times] = c.join(y)
        ctx.save_for_backward(x, dt, A, B, C, D, document, entering_BZHPN)
        ctx.state_dtype = state_BHPN.dtype
        return y_BTHP, last_BHPN

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BTHP: Tensor, dlast_BHPN: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, D, document, entering_BZHPN = ctx.saved_tensors
        dx, ddt, dB, dC = (torch.empty_like(v, memory_format=torch.contiguous_format) for v in (x, dt, B, C))
        dA, dD = torch.zeros_like(A, dtype=dt.dtype), torch.zeros_like(D, dtype=dt.dtype)
        dstate_BHPN = dlast_BHPN.clone()
        for rows, chunks in reversed(_blocks(x)):
            c = _Chunks(rows, chunks, (x, dt, A, B, C), document)
            dy = c.cut(dy_BTHP)
            xdt = c.x_YQHP * c.dt_YQH[..., None]
            dexponent, dxdt, dB_, dC_ = _diagonal_gradients(c, dy, xdt)
            dstate_BHPN[rows] = _state_gradients(
                c, dy, xdt, entering_BZHPN[rows, chunks], dstate_BHPN[rows], (dexponent, dxdt, dB_, dC_)
            )
            # where a decay is zero so is its gradient, which the sums of differences only have to rounding
            dexponent.masked_fill_(c.dt_YQH * c.A_H < LOWEST, 0.0)
            dD += (dy * c.x_YQHP).sum((0, 1, 3))
            dA += (dexponent * c.dt_YQH).sum((0, 1))
            part = rows, c.times
            ddt[part] = c.join((dxdt * c.x_YQHP).sum(-1).addcmul_(dexponent, c.A_H))
            dx[part] = c.join(dxdt.mul_(c.dt_YQH[..., None]).addcmul_(dy, D.to(dt.dtype)[:, None]))
            dB[part], dC[part] = (c.join(c.from_group(v, c.B_YQGN.shape)) for v in (dB_, dC_))
        return dx, ddt, dA.to(A.dtype), dB, dC, dD.to(D.dtype), dstate_BHPN.to(ctx.state_dtype), None


def _diagonal_gradients(c: _Chunks, dy: Tensor, xdt: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inside the chunks: gradients of dt * A (Y, Q, H), of x * dt, and of B and C by group."""
    B_, C_ = c.by_group(c.B_YQGN), c.by_group(c.C_YQGN)
    pair = c.decays.pair_YHQQ
    weights = c.with_scores(pair, torch.bmm(C_, B_.mT))
    dy_head = c.by_head(dy)
    dxdt = c.from_heads(torch.bmm(weights.flatten(0, 1).mT, dy_head)).contiguous()
    dweights = torch.bmm(dy_head, c.by_head(xdt).mT).view(pair.shape)
    # exponent of weights[i, j]: the steps in (j, i]. On the diagonal it is 0 whatever the decay, and would only cancel
    weights.mul_(dweights).diagonal(dim1=-2, dim2=-1).zero_()
    # in float64: a large weight between two later steps must drop out of the sums of the steps before them
    wide = _sum_dtype(weights)
    across = weights.sum(-1, dtype=wide) - weights.sum(-2, dtype=wide)
    dexponent = _reverse_cumsum(across.transpose(1, 2)).to(weights.dtype)
    dscores = c.sum_heads(dweights.mul_(pair))
    return dexponent, dxdt, torch.bmm(dscores.mT, C_), torch.bmm(dscores, B_)


def _state_gradients(
    c: _Chunks, dy: Tensor, xdt: Tensor, entering: Tensor, dlast_BHPN: Tensor, grads: tuple[Tensor, ...]
) -> Tensor:
    """Through the states between the chunks: adds to `grads`, returns the gradient of the state before the first."""
    dexponent, dxdt, dB_, dC_ = grads
    B_, C_ = c.by_group(c.B_YQGN), c.by_group(c.C_YQGN)
    to_end, from_start = c.decays.to_end_YQH[..., None], c.decays.from_start_YQH[..., None]
    flat = entering.reshape(B_.shape[0], -1, entering.shape[-1])
    dread = dy * from_start
    read = c.from_group(torch.bmm(C_, flat.mT))
    dexponent += _reverse_cumsum((dread * read).sum(-1))
    dread_ = c.by_group(dread)
    dC_.baddbmm_(dread_, flat)
    dentering = torch.bmm(dread_.mT, C_).view(entering.shape)
    whole = c.decays.whole_YH.view(entering.shape[:3])[..., None, None]
    dlocal = torch.empty_like(entering)
    dstate = dlast_BHPN
    for z in range(entering.shape[1] - 1, -1, -1):
        dlocal[:, z] = dstate
        dstate = torch.addcmul(dentering[:, z], whole[:, z], dstate)
    dexponent += ((dlocal * entering).sum((-2, -1)) * whole[..., 0, 0]).flatten(0, 1)[:, None]
    flat = dlocal.view(flat.shape)
    written = xdt * to_end
    dwritten = c.from_group(torch.bmm(B_, flat.mT))
    dB_.baddbmm_(c.by_group(written), flat)
    part = (dwritten * written).sum(-1)  # exponent of step j: the steps behind it
    dexponent += part.cumsum(1, dtype=_sum_dtype(part)).sub_(part)
    dxdt.addcmul_(dwritten, to_end)
    return dstate


def _sum_dtype(v: Tensor) -> torch.dtype:
    """Of sums whose differences count. GPUs are slow at float64."""
    return torch.float64 if v.device.type == "cpu" else v.dtype


def _reverse_cumsum(v_YQH: Tensor) -> Tensor:
    return v_YQH.flip(1).cumsum(1).flip(1)


def _blocks(x_BTHP: Tensor) -> list[tuple[slice, slice]]:
    """Rows and chunks that are computed together, in the order of time: whole rows, or a part of one."""
    n_batch, n_time, n_head, _ = x_BTHP.shape
    n_chunk = -(-n_time // CHUNK)
    fit = n_batch * n_chunk if x_BTHP.device.type != "cpu" else max(1, BLOCK // (n_head * min(CHUNK, n_time) ** 2))
    n_row, n_part = max(1, fit // n_chunk), min(fit, n_chunk)
    return [
        (slice(row, row + n_row), slice(chunk, min(chunk + n_part, n_chunk)))
        for row in range(0, n_batch, n_row)
        for chunk in range(0, n_chunk, n_part)
    ]


SSD: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "chunked": _ssd_chunked,
    "triton": _ssd_triton,
    "mamba_ssm": _ssd_mamba_ssm,
    "fla": _ssd_fla,
    "ref": ssd_ref,
}
SSD_STEP: dict[str, Callable[..., Tensor]] = {"torch": _ssd_step_torch, "triton": _ssd_step_triton}
