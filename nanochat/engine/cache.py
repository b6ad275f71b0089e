"""What the engine does with a batch's list of states, one a layer, without asking what kind they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nanochat.model.mixer import State


def fork(states: Sequence[State], n: int) -> list[State]:
    """Each row n times, next to each other."""
    return [state.fork(n) for state in states]


def select(states: Sequence[State], rows: Sequence[int]) -> None:
    """Keep these rows, in this order."""
    index = torch.tensor(list(rows), dtype=torch.int64)
    for state in states:
        state.select(index)


def reserve(states: Sequence[State], n: int) -> None:
    """Room for n more tokens in every row."""
    for state in states:
        state.reserve(n)


def row(states: Sequence[State], i: int) -> list[State]:
    """One row as a batch of its own that shares its memory: to be read before the batch goes on."""
    return [state.map(lambda x: x[i : i + 1]) for state in states]


def growing(x: Tensor, empty: Tensor) -> int | None:
    """The dimension along which a state's tensor grows with every token; None when its size never changes."""
    return next((d for d in range(1, x.dim()) if x.size(d) != empty.size(d)), None)


def nbytes(states: Sequence[State]) -> int:
    return sum(state.nbytes for state in states)


def join(batches: list[list[State]]) -> list[State]:
    """The rows of several batches as one batch, in order. Empties `batches`, layer by layer, so that no more than one
    layer is held twice."""
    if len(batches) == 1:
        return batches.pop()
    n_layers = len(batches[0])
    joined = []
    for _ in range(n_layers):
        layer = [batch.pop(0) for batch in batches]
        joined.append(_join_layer(layer))
    batches.clear()
    return joined


def _join_layer(states: list[State]) -> State:
    # `State.map` visits the tensors in the order of `State.tensors`, batch first.
    parts = [list(state.tensors().values()) for state in states]
    whole = iter([_cat([part[i] for part in parts]) for i in range(len(parts[0]))])
    return states[0].map(lambda _: next(whole))


def _cat(parts: list[Tensor]) -> Tensor:
    """Along the batch. Where another dimension (the tokens in a cache) differs, shorter ones get zeros behind."""
    if len({part.shape[1:] for part in parts}) == 1:
        return torch.cat(parts)
    largest = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts))]
    out = parts[0].new_zeros(sum(part.size(0) for part in parts), *largest)
    row = 0
    for part in parts:
        inside = (slice(row, row + part.size(0)), *(slice(n) for n in part.shape[1:]))
        out[inside] = part
        row += part.size(0)
    return out
