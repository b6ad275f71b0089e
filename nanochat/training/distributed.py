"""What several processes need: gradients summed, and the loader cursors of all ranks in one checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

BUCKET_BYTES = 32 << 20


def reduce_gradients(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Sum every gradient over ranks, in buckets of about 32 MB (few large messages are faster than many small)."""
    if not dist.is_initialized():
        return
    bucket: list[Tensor] = []
    size = 0
    for p in parameters:
        assert p.grad is not None
        bucket.append(p.grad)
        size += p.grad.numel() * p.grad.element_size()
        if size >= BUCKET_BYTES:
            _reduce(bucket)
            bucket, size = [], 0
    if bucket:
        _reduce(bucket)


def _reduce(gradients: list[Tensor]) -> None:
    flat = torch.cat([g.reshape(-1) for g in gradients])
    dist.all_reduce(flat)
    for g, part in zip(gradients, flat.split([g.numel() for g in gradients])):
        g.copy_(part.view_as(g))


def gather(mine: Any) -> list[Any]:
    """What each rank has, in the order of ranks."""
    if not dist.is_initialized():
        return [mine]
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    return parts


def gather_state(state: dict[str, Any]) -> dict[str, Any]:
    """On rank 0 the loader cursors of all ranks as one: each rank knows its own lanes."""
    parts = gather(state)
    merged = parts[0]
    for other in parts[1:]:
        for name, cursor in other["cursors"].items():
            merged["cursors"][name]["lanes"].update(cursor["lanes"])
            for key, value in cursor["report"].items():
                merged["cursors"][name]["report"][key] += value
    return merged
