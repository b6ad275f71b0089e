"""SSD, the scan of Mamba-2 (Dao & Gu 2024, arXiv 2405.21060, section 6): a scalar decay a head, so chunks are matmuls.

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T        y_t = h_t C_t + D x_t

Letters: B batch, T time, H heads, P head width, G groups (G divides H), N state size, Q steps in a chunk, Z chunks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.kernels.dispatch import choose
from nanochat.kernels.segments import padding, resets, state_dtype

CHUNK = 64


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
    op = choose("ssd", SSD, "chunked")
    return op(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, state_BHPN, segments_BT, lengths)


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
    n_batch, n_head, n_width, n_state = state_BHPN.shape
    n_group = B_BGN.shape[1]
    dtype = state_BHPN.dtype
    x, dt, B, C = x_BHP.to(dtype), dt_BH.to(dtype), B_BGN.to(dtype), C_BGN.to(dtype)
    state_BHPN.mul_((dt * A_H).exp_()[:, :, None, None])
    rows = state_BHPN.view(n_batch, n_group, -1, n_state)
    rows.addcmul_((x * dt[:, :, None]).view(n_batch, n_group, -1, 1), B[:, :, None, :])
    y = torch.matmul(rows, C[:, :, :, None]).view(n_batch, n_head, n_width)
    return y.addcmul_(x, D_H.to(dtype)[:, None]).to(x_BHP.dtype)


def _ssd_chunked(
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
    dtype = state_dtype(x_BTHP.dtype)
    n_batch, n_time, n_head, n_width = x_BTHP.shape
    n_group, n_state = B_BTGN.shape[2:]
    n_in_group = n_head // n_group
    n_chunk = -(-n_time // CHUNK)
    size = CHUNK if n_time > CHUNK else n_time
    pad = n_chunk * size - n_time
    dt_BTH = dt_BTH.to(dtype)
    if lengths is not None:  # dt 0: decay 1, input 0; the state stays as it is
        dt_BTH = dt_BTH.masked_fill(padding(lengths, n_time)[:, :, None], 0.0)
    x, dt, B, C = x_BTHP, dt_BTH, B_BTGN, C_BTGN
    if pad:
        x, B, C = (F.pad(v, (0, 0, 0, 0, 0, pad)) for v in (x, B, C))
        dt = F.pad(dt, (0, 0, 0, pad))
    # head-major chunks: every contraction below is one batched matmul
    x = x.to(dtype).view(n_batch, n_chunk, size, n_group, n_in_group, n_width).permute(0, 1, 3, 4, 2, 5)
    dt_ = dt.view(n_batch, n_chunk, size, n_group, n_in_group).permute(0, 1, 3, 4, 2)  # B Z G R Q
    B = B.to(dtype).view(n_batch, n_chunk, size, n_group, n_state).transpose(2, 3)  # B Z G Q N
    C = C.to(dtype).view(n_batch, n_chunk, size, n_group, n_state).transpose(2, 3)
    cum = torch.cumsum(dt_ * A_H.to(dtype).view(n_group, n_in_group, 1), -1)  # B Z G R Q
    causal = torch.ones(size, size, dtype=torch.bool, device=x.device).tril()
    document = None
    if segments_BT is not None:
        document = resets(F.pad(segments_BT, (0, pad), mode="replicate") if pad else segments_BT).cumsum(1)
        document = document.view(n_batch, n_chunk, size)
        causal = (causal & (document[..., :, None] == document[..., None, :]))[:, :, None, None]
    # mask before exp: beyond the mask the difference is positive and may overflow
    decay = (cum[..., :, None] - cum[..., None, :]).masked_fill(~causal, -torch.inf).exp()
    scores = (C @ B.transpose(-1, -2))[:, :, :, None] * decay
    xdt = x * dt_[..., None]
    y = scores @ xdt  # B Z G R Q P
    # states: contribution of each chunk, then the short recurrence over chunks
    to_end = cum[..., -1:] - cum
    from_start = cum
    carry = cum[..., -1]
    if document is not None:
        last = document[:, :, -1:]
        before = torch.cat((torch.zeros_like(last[:, :1]), last[:, :-1]), 1)
        to_end = to_end.masked_fill((document != last)[:, :, None, None], -torch.inf)
        from_start = from_start.masked_fill((document != before)[:, :, None, None], -torch.inf)
        carry = carry.masked_fill((last != before)[..., None], -torch.inf)
    local = (xdt * to_end.exp()[..., None]).transpose(-1, -2) @ B[:, :, :, None]  # B Z G R P N
    carry = carry.exp()[..., None, None]
    if state_BHPN is None:
        state = local.new_zeros(n_batch, n_group, n_in_group, n_width, n_state)
    else:
        state = state_BHPN.to(dtype).view(n_batch, n_group, n_in_group, n_width, n_state)
    states = []
    for z in range(n_chunk):
        states.append(state)
        state = carry[:, z] * state + local[:, z]
    entering = torch.stack(states, 1)
    y = y + (C[:, :, :, None] @ entering.transpose(-1, -2)) * from_start.exp()[..., None]
    y = y + x * D_H.to(dtype).view(n_group, n_in_group, 1, 1)
    y = y.permute(0, 1, 4, 2, 3, 5).reshape(n_batch, n_chunk * size, n_head, n_width)[:, :n_time]
    return y.to(x_BTHP.dtype), state.reshape(n_batch, n_head, n_width, n_state)


SSD = {"chunked": _ssd_chunked, "ref": ssd_ref}
