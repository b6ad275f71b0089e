"""Attention of new tokens to a cache on a CPU without gradients, as plain products.

torch's fused kernel splits queries and keys for a cache that a CPU core does not need. Measured on one core of an AMD
Zen 5 (4 heads of 64, fp32, milliseconds):

    queries, keys, rows                 1 of 137 to 420, 128    125 of 140, 16    125 of 300, 16    20 of 20, 64
    F.scaled_dot_product_attention                      15.0               8.6              11.5             5.5
    products                                             9.3               3.6               9.2             0.7

Letters: B batch, T queries, S keys, H heads, G key/value heads, P head width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from nanochat.kernels.blas import single_rows

# rows of several lengths decode in runs of so many rows at least, and of so many bytes of keys and values at most (more
# would leave the cache while oneDNN packs them); one more run costs as much time as reading CALL_BYTES
RUN, RUN_BYTES, CALL_BYTES = 8, 8 << 20, 1 << 20
MANY = 1024  # keys of all rows from which this pays, where rows are of one length and the fused kernel needs no mask
SCORE_BYTES = 32 << 20  # of all scores at once; more of them leave the cache, and the fused kernel is better


def fits(q_BTHP: Tensor, n_source: int) -> bool:
    """Whether this is the faster way."""
    n_batch, n_time, n_head, _ = q_BTHP.shape
    return (
        q_BTHP.device.type == "cpu"
        and q_BTHP.dtype == torch.float32
        and not torch.is_grad_enabled()
        and (n_time == 1 or 4 * n_batch * n_head * n_time * n_source <= SCORE_BYTES)
    )


def step(
    q_BTHP: Tensor, k_BSGP: Tensor, v_BSGP: Tensor, window: int, start: Tensor | None, scale: float | None
) -> Tensor:
    """One query a row at its own position `start` (B,; None: behind the last key): runs of rows, each with as many keys
    as its longest row has."""
    y_BTHP = torch.empty_like(q_BTHP)
    n_group, width = k_BSGP.shape[2:]
    if start is None:
        start = torch.full((len(q_BTHP),), k_BSGP.shape[1] - 1)
    key_S = torch.arange(k_BSGP.shape[1])
    with single_rows():  # oneDNN would first copy the keys and values of every run
        for rows, n_source in runs((start + 1).tolist(), 8 * n_group * width):
            at, key = start[rows, None, None], key_S[:n_source]
            hidden_BTS = key > at if not window else (key > at) | (key <= at - window)
            k, v = k_BSGP[rows, :n_source], v_BSGP[rows, :n_source]
            y_BTHP[rows] = masked(q_BTHP[rows], k, v, hidden_BTS, scale)
    return y_BTHP


def masked(q_BTHP: Tensor, k_BSGP: Tensor, v_BSGP: Tensor, hidden_BTS: Tensor, scale: float | None) -> Tensor:
    """softmax(scale * q k^T) v -> (B, T, H, P), without the keys that are `hidden` from a query (not all of them)."""
    (B, T, H, P), G = q_BTHP.shape, k_BSGP.shape[2]
    q = (q_BTHP * (P**-0.5 if scale is None else scale)).transpose(1, 2)
    q_BGRP = q.reshape(B, G, H // G * T, P)
    k_BGSP, v_BGSP = k_BSGP.transpose(1, 2), v_BSGP.transpose(1, 2)
    if T == 1:  # a matrix and a few vectors are faster than vectors and a matrix
        scores = torch.matmul(k_BGSP, q_BGRP.transpose(2, 3)).transpose(2, 3)
    else:
        scores = torch.matmul(q_BGRP, k_BGSP.transpose(2, 3))
    scores.unflatten(2, (H // G, T)).masked_fill_(hidden_BTS[:, None, None], -torch.inf)
    y_BGRP = torch.matmul(scores.softmax(-1), v_BGSP)
    return y_BGRP.reshape(B, H, T, P).transpose(1, 2)


def runs(lengths: Sequence[int], n_bytes: int) -> list[tuple[slice, int]]:
    """Cut rows into runs, and the longest of each: where reading on to a longer neighbour's end costs more than another
    product, or too much would be read at once. `n_bytes`: of one token's keys and values."""
    found: list[tuple[slice, int]] = []
    for begin in range(0, len(lengths), RUN):
        block = lengths[begin : begin + RUN]
        end, longest = begin + len(block), max(block)
        if found:
            before, most = found[-1]
            both = max(most, longest)
            wasted = (both - most) * (begin - before.start) + (both - longest) * len(block)
            if wasted * n_bytes <= CALL_BYTES and both * (end - before.start) * n_bytes <= RUN_BYTES:
                found[-1] = slice(before.start, end), both
                continue
        found.append((slice(begin, end), longest))
    return found
