"""Short rows first: the length of the training rows over a run."""

from __future__ import annotations

from nanochat.data.batches import Batch


def length_at(share: float, start: int, full: int, grow_share: float) -> int:
    """Tokens a row when `share` of a run is done: `start`, doubled at equal intervals until it is `full` at
    `grow_share` (sequence length warmup, arXiv 2108.06084)."""
    doublings = (full // start).bit_length() - 1
    if not doublings or share >= grow_share:
        return full
    return start << int(share / grow_share * doublings)


def cut(batch: Batch, length: int) -> Batch:
    """The same tokens in rows of `length`, which divides those that the batch has."""
    return Batch(*(x.reshape(-1, length) for x in batch))
