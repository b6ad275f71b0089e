"""Causal attention: grouped heads, sliding window, packed documents, and queries against a longer cache.

Letters: B batch, T query time, S source (key) positions, H heads, G key/value heads (G divides H), P head width.

A query at absolute position i sees the keys j with j <= i, j > i - window (when window > 0), j < lengths, and only
those of its own document. No implementation but the oracle makes a mask of T x S: windows become blocks, documents
rows of their own, and where only a mask can say what is seen it is made for QUERIES queries at a time.

    flash   FlashAttention or torch's own copy of it (flash.py): half precision on a GPU
    flex    torch's compiled block masks: documents and windows inside of torch.compile on a GPU
    sdpa    everything else, on any device
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanochat.kernels import attention_cache, attention_products, flash
from nanochat.kernels.blas import single_rows
from nanochat.kernels.dispatch import choose
from nanochat.kernels.segments import document_starts

# documents share a batch when the shorter is at least SIMILAR times as long, or when none is longer than SHORT
SIMILAR, SHORT = 0.7, 32
WINDOW_MIN = 32  # blocks of fewer queries do not pay
QUERIES = 256  # that share a mask


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
    default, reason = _default(q_BTHP, window, segments_BT)
    op = choose("attention", ATTENTION, default, q_BTHP, reason)
    return op(q_BTHP, k_BSGP, v_BSGP, segments_BT, window, lengths, start, scale)


def attention_step(q_BHP: Tensor, k_BGSP: Tensor, v_BGSP: Tensor, scale: float) -> Tensor:
    """One query a head against all keys, without a gradient: (B, H, 1, P). Keys lie as a cache holds them."""
    q_B1HP = q_BHP[:, None]
    default, reason = _default(q_B1HP, 0, None)
    op = choose("attention", ATTENTION, default, q_BHP, reason)
    if op is not _attention_sdpa:
        y = op(q_B1HP, k_BGSP.transpose(1, 2), v_BGSP.transpose(1, 2), None, 0, None, None, scale)
        return y.transpose(1, 2)
    grouped = q_BHP.shape[1] != k_BGSP.shape[1]
    with single_rows():  # half the time: the products inside follow the same choice
        return F.scaled_dot_product_attention(q_BHP[:, :, None], k_BGSP, v_BGSP, scale=scale, enable_gqa=grouped)


def _default(q_BTHP: Tensor, window: int, segments_BT: Tensor | None) -> tuple[str, str]:
    """The implementation for such a call, and why."""
    if q_BTHP.device.type != "cuda":
        return "sdpa", ""
    if torch.compiler.is_compiling() and (window or segments_BT is not None):
        return "flex", "block masks inside of torch.compile"
    if q_BTHP.dtype not in (torch.bfloat16, torch.float16):
        return "sdpa", f"FlashAttention takes no {str(q_BTHP.dtype)[6:]}"
    package, reason = flash.find(str(q_BTHP.device), q_BTHP.shape[3])
    return ("flash" if package else "sdpa"), reason


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
    rows: slice = slice(None),
    keys: slice = slice(None),
) -> Tensor:
    """Which of the `keys` each of the query `rows` sees: bool, (B or 1, T, S)."""
    n_batch, n_time = queries
    at = torch.arange(n_time, device=device)[None]
    at = at + (n_source - n_time if start is None else start.to(device)[:, None])
    key = torch.arange(n_source, device=device)[keys]
    first, at = at[:, :1], at[:, rows]
    mask_BTS = key <= at[:, :, None]
    if window > 0:
        mask_BTS = mask_BTS & (key > at[:, :, None] - window)
    if lengths is not None:
        mask_BTS = mask_BTS & (key < lengths.to(device)[:, None, None])
    if segments_BT is not None:
        source = (key - first).clamp(0, n_time - 1).expand(n_batch, -1)
        mask_BTS = mask_BTS & (segments_BT[:, rows, None] == segments_BT.gather(1, source)[:, None, :])
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
    """Fused attention, without a mask wherever the shape of what is seen allows it."""
    n_time, n_source = q_BTHP.shape[1], k_BSGP.shape[1]
    window = 0 if window >= n_source else window
    many = start is not None or q_BTHP.shape[0] * n_source >= attention_cache.MANY
    if n_time == 1 and many and lengths is None and attention_cache.fits(q_BTHP, n_source):
        return attention_cache.step(q_BTHP, k_BSGP, v_BSGP, window, start, scale)
    if start is None and lengths is None:
        if n_time == 1:  # the last position sees the last `window` keys
            if window:
                k_BSGP, v_BSGP = k_BSGP[:, -window:], v_BSGP[:, -window:]
            return _sdpa(q_BTHP, k_BSGP, v_BSGP, scale)
        if n_time == n_source:
            if segments_BT is None:
                return _causal(q_BTHP, k_BSGP, v_BSGP, window, scale)
            return _packed(q_BTHP, k_BSGP, v_BSGP, segments_BT, window, scale)
    return _masked(q_BTHP, k_BSGP, v_BSGP, segments_BT, window, lengths, start, scale)


def _sdpa(
    q_BTHP: Tensor,
    k_BSGP: Tensor,
    v_BSGP: Tensor,
    scale: float | None,
    mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """`F.scaled_dot_product_attention` in this file's layout; transposed views cost it nothing."""
    grouped = q_BTHP.shape[2] != k_BSGP.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q_BTHP, k_BSGP, v_BSGP))
    y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=scale, enable_gqa=grouped)
    return y.transpose(1, 2)


def _masked(
    q_BTHP: Tensor,
    k_BSGP: Tensor,
    v_BSGP: Tensor,
    segments_BT: Tensor | None,
    window: int,
    lengths: Tensor | None,
    start: Tensor | None,
    scale: float | None,
) -> Tensor:
    """A mask for QUERIES queries at a time, over the keys that they can reach."""
    n_batch, n_time = q_BTHP.shape[:2]
    n_source = k_BSGP.shape[1]
    ys = []
    for begin in range(0, n_time, QUERIES):
        rows = slice(begin, min(begin + QUERIES, n_time))
        keys = slice(0, n_source)
        if start is None:  # rows alike: what lies behind the last query, or too far before the first, is never seen
            past = n_source - n_time
            keys = slice(max(0, past + begin - window + 1) if window else 0, past + rows.stop)
        mask = visible((n_batch, n_time), n_source, q_BTHP.device, segments_BT, window, lengths, start, rows, keys)
        q, k, v = q_BTHP[:, rows], k_BSGP[:, keys], v_BSGP[:, keys]
        if lengths is None and attention_cache.fits(q, k.shape[1]):  # every query sees itself at least
            ys.append(attention_cache.masked(q, k, v, ~mask, scale))
        else:
            ys.append(_sdpa(q, k, v, scale, mask=mask[:, None]))
    return ys[0] if len(ys) == 1 else torch.cat(ys, 1)


def _causal(q_BTHP: Tensor, k_BTGP: Tensor, v_BTGP: Tensor, window: int, scale: float | None) -> Tensor:
    """Queries and keys of the same positions: no mask, or blocks of `window` queries against twice as many keys."""
    n_batch, n_time, n_head, n_width = q_BTHP.shape
    if not 0 < window < n_time:
        if attention_products.fits(q_BTHP, k_BTGP):
            return attention_products.causal(q_BTHP, k_BTGP, v_BTGP, scale)
        if attention_cache.fits(q_BTHP, n_time):
            at = torch.arange(n_time)
            return attention_cache.masked(q_BTHP, k_BTGP, v_BTGP, (at > at[:, None])[None], scale)
        return _sdpa(q_BTHP, k_BTGP, v_BTGP, scale, is_causal=True)
    if n_time < 3 * window or window < WINDOW_MIN:
        return _masked(q_BTHP, k_BTGP, v_BTGP, None, window, None, None, scale)
    n_block = -(-n_time // window)
    pad = (0, 0, 0, 0, 0, n_block * window - n_time)  # keys behind every query
    q, k, v = (F.pad(x, pad).view(n_batch, n_block, window, -1, n_width) for x in (q_BTHP, k_BTGP, v_BTGP))
    first = _sdpa(q[:, 0], k[:, 0], v[:, 0], scale, is_causal=True)
    k2, v2 = (torch.cat((x[:, :-1], x[:, 1:]), 2).flatten(0, 1) for x in (k, v))
    at = torch.arange(window, device=q.device)[:, None]
    key = torch.arange(2 * window, device=q.device)
    rest = _sdpa(q[:, 1:].flatten(0, 1), k2, v2, scale, mask=(key > at) & (key <= at + window))
    y = torch.cat((first[:, None], rest.reshape(n_batch, n_block - 1, window, n_head, n_width)), 1)
    return y.flatten(1, 2)[:, :n_time]


def _packed(
    q_BTHP: Tensor, k_BTGP: Tensor, v_BTGP: Tensor, segments_BT: Tensor, window: int, scale: float | None
) -> Tensor:
    """Each document by itself: documents of similar length are gathered into one causal batch.

    The work grows with the documents' lengths, not with the row's: with documents of 80 tokens this takes less than
    half the time of one masked product over a row of 512, and a fifth over 1024.
    """
    groups, source, position = _document_groups(segments_BT)
    if groups == [tuple(segments_BT.shape)]:  # one document a row
        return _causal(q_BTHP, k_BTGP, v_BTGP, window, scale)
    q, k, v = (_Gather.apply(x.flatten(0, 1), source, position) for x in (q_BTHP, k_BTGP, v_BTGP))
    ys, begin = [], 0
    for n_doc, length in groups:
        rows = slice(begin, begin + n_doc * length)
        q_, k_, v_ = (x[rows].unflatten(0, (n_doc, length)) for x in (q, k, v))
        ys.append(_causal(q_, k_, v_, window, scale).flatten(0, 1))
        begin = rows.stop
    y = torch.cat(ys) if len(ys) > 1 else ys[0]
    return _Scatter.apply(y, position).view(q_BTHP.shape)


def _document_groups(segments_BT: Tensor) -> tuple[list[tuple[int, int]], Tensor, Tensor]:
    """Sort the documents of a batch by length and cut them into groups that waste little on padding.

    Returns the groups as (documents, padded length); `source`: for each place of the concatenated groups the flat token
    that goes there (padding takes some later token: causality hides it); `position`: for each flat token its place.
    """
    n_batch, n_time = segments_BT.shape
    device = segments_BT.device
    start = document_starts(segments_BT)
    lengths, order = start.diff().sort(descending=True)
    start, sizes = start[order], lengths.tolist()
    groups, padded, begin = [], [], 0
    while begin < len(sizes):
        longest, end = sizes[begin], begin + 1
        while end < len(sizes) and (sizes[end] >= SIMILAR * longest or longest <= SHORT):
            end += 1
        groups.append((end - begin, longest))
        padded += [longest] * (end - begin)
        begin = end
    # every place knows its document and its step inside it
    widths = torch.tensor(padded, device=device)
    place = torch.arange(sum(padded), device=device)
    document = torch.repeat_interleave(widths)
    step = place - (widths.cumsum(0) - widths)[document]
    source = (start[document] + step).clamp_(max=n_batch * n_time - 1)
    valid = step < lengths[document]
    position = torch.empty(n_batch * n_time, dtype=torch.int64, device=device)
    position[source[valid]] = place[valid]
    return groups, source, position


class _Gather(torch.autograd.Function):
    """x[source]. Every row of x has one place that counts, `position`; the gradient at all others is zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, position: Tensor) -> Tensor:
        ctx.save_for_backward(position)
        return x.index_select(0, source)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


class _Scatter(torch.autograd.Function):
    """y[position], where no place is taken twice."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, position: Tensor) -> Tensor:
        ctx.save_for_backward(position)
        ctx.n_place = y.shape[0]
        return y.index_select(0, position)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        out = grad.new_zeros(ctx.n_place, *grad.shape[1:])
        return out.index_copy_(0, ctx.saved_tensors[0], grad), None


def _attention_flash(
    q_BTHP: Tensor,
    k_BSGP: Tensor,
    v_BSGP: Tensor,
    segments_BT: Tensor | None = None,
    window: int = 0,
    lengths: Tensor | None = None,
    start: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    if not flash.takes(q_BTHP, k_BSGP, segments_BT, lengths, start):
        return _attention_sdpa(q_BTHP, k_BSGP, v_BSGP, segments_BT, window, lengths, start, scale)
    return flash.attention(q_BTHP, k_BSGP, v_BSGP, segments_BT, window, start, scale)


def _attention_flex(
    q_BTHP: Tensor,
    k_BSGP: Tensor,
    v_BSGP: Tensor,
    segments_BT: Tensor | None = None,
    window: int = 0,
    lengths: Tensor | None = None,
    start: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """For use inside of torch.compile, which fuses the making of the block mask; run eagerly it holds all scores."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    n_batch, n_time = q_BTHP.shape[:2]
    if n_time != k_BSGP.shape[1] or lengths is not None or start is not None:
        return _attention_sdpa(q_BTHP, k_BSGP, v_BSGP, segments_BT, window, lengths, start, scale)

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        mask = j <= i
        if window:
            mask = mask & (j > i - window)
        return mask if segments_BT is None else mask & (segments_BT[b, i] == segments_BT[b, j])

    rows = None if segments_BT is None else n_batch
    blocks = create_block_mask(seen, rows, None, n_time, n_time, device=q_BTHP.device)
    q, k, v = (x.transpose(1, 2) for x in (q_BTHP, k_BSGP, v_BSGP))
    y = flex_attention(q, k, v, block_mask=blocks, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    assert isinstance(y, Tensor)
    return y.transpose(1, 2)


ATTENTION = {"sdpa": _attention_sdpa, "flash": _attention_flash, "flex": _attention_flex, "ref": attention_ref}
