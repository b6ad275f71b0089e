"""Causal attention: grouped heads, sliding window, packed documents, and queries against a longer cache.

Letters: B batch, T query time, S source (key) positions, H heads, G key/value heads (G divides H), P head width.

A query at absolute position i sees the keys j with j <= i, j > i - window (when window > 0), j < lengths, and only
those of its own document.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.kernels.dispatch import choose


def attention(
    q_BTHP: Tensor,
    k_BSGP: Tensor,
    v_BSGP: Tensor,
    *,
    segments_BT: Tensor | None = None,
    window: int = 0,
    lengths: Tensor | None = None,
    start: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale * q k^T + mask) v -> (B, T, H, P), in q's dtype.

    `start` (B,): absolute position of each row's first query; keys and values then hold positions 0..S-1,
    S >= start + T (None: the queries stand at the end of the keys, S >= T). `lengths` (B,): the first so many keys of a
    row are valid. `segments_BT` (int) numbers documents; what lies before `start` belongs to the first query's
    document. `window`: 0 sees everything before. `scale`: 1 / sqrt(P) when None. A query that sees nothing gets zeros.
    """
    op = choose("attention", ATTENTION, "sdpa")
    return op(q_BTHP, k_BSGP, v_BSGP, segments_BT, window, lengths, start, scale)


def attention_ref(
    q_BTHP: Tensor,
    k_BSGP: Tensor,
    v_BSGP: Tensor,
    segments_BT: Tensor | None = None,
    window: int = 0,
    lengths: Tensor | None = None,
    start: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The oracle: every score, an explicit mask, in float32 (float64 for float64 inputs)."""
    dtype = torch.float64 if q_BTHP.dtype == torch.float64 else torch.float32
    repeats = q_BTHP.shape[2] // k_BSGP.shape[2]
    k_BSHP = k_BSGP.to(dtype).repeat_interleave(repeats, 2)
    v_BSHP = v_BSGP.to(dtype).repeat_interleave(repeats, 2)
    scale = q_BTHP.shape[3] ** -0.5 if scale is None else scale
    scores_BHTS = torch.einsum("bthp,bshp->bhts", q_BTHP.to(dtype) * scale, k_BSHP)
    mask_BTS = visible(q_BTHP.shape[:2], k_BSGP.shape[1], q_BTHP.device, segments_BT, window, lengths, start)
    scores_BHTS = scores_BHTS.masked_fill(~mask_BTS[:, None], -torch.inf)
    probs_BHTS = torch.nan_to_num(scores_BHTS.softmax(-1))  # a row without keys
    return torch.einsum("bhts,bshp->bthp", probs_BHTS, v_BSHP).to(q_BTHP.dtype)


def visible(
    queries: tuple[int, int] | torch.Size,
    n_source: int,
    device: torch.device,
    segments_BT: Tensor | None = None,
    window: int = 0,
    lengths: Tensor | None = None,
    start: Tensor | None = None,
) -> Tensor:
    """Which keys each query sees: bool, (B or 1, T, S)."""
    n_batch, n_time = queries
    at = torch.arange(n_time, device=device)[None]
    at = at + (n_source - n_time if start is None else start.to(device)[:, None])
    key = torch.arange(n_source, device=device)
    mask_BTS = key <= at[:, :, None]
    if window > 0:
        mask_BTS = mask_BTS & (key > at[:, :, None] - window)
    if lengths is not None:
        mask_BTS = mask_BTS & (key < lengths.to(device)[:, None, None])
    if segments_BT is not None:
        source = (key - at[:, :1]).clamp(0, n_time - 1).expand(n_batch, -1)
        mask_BTS = mask_BTS & (segments_BT[:, :, None] == segments_BT.gather(1, source)[:, None, :])
    return mask_BTS


def _attention_sdpa(
    q_BTHP: Tensor,
    k_BSGP: Tensor,
    v_BSGP: Tensor,
    segments_BT: Tensor | None = None,
    window: int = 0,
    lengths: Tensor | None = None,
    start: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    n_batch, n_time, n_head, _ = q_BTHP.shape
    n_source, n_group = k_BSGP.shape[1:3]
    window = 0 if window >= n_source else window
    q, k, v = (x.transpose(1, 2) for x in (q_BTHP, k_BSGP, v_BSGP))
    if segments_BT is None and not window and lengths is None and start is None and n_time in (1, n_source):
        causal = n_time > 1  # one query at the end sees every key
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=n_head != n_group)
        return y.transpose(1, 2)
    mask = visible((n_batch, n_time), n_source, q.device, segments_BT, window, lengths, start)[:, None]
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=n_head != n_group)
    return y.transpose(1, 2)


ATTENTION = {"sdpa": _attention_sdpa, "ref": attention_ref}
