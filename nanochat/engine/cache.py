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


def join(batches: list[list[State]], empty: Sequence[State], room: int = 0) -> list[State]:
    """The rows of several batches as one batch, in order, with room for `room` more tokens in each. Empties `batches`,
    layer by layer, so that no more than one layer is held twice. `empty`: states that have read nothing."""
    if len(batches) == 1:
        return batches.pop()
    joined = []
    for nothing in empty:
        layer = [batch.pop(0) for batch in batches]
        joined.append(_join_layer(layer, nothing, room))
    batches.clear()
    return joined


def _join_layer(states: list[State], empty: State, room: int) -> State:
    # `State.map` visits the tensors in the order of `State.tensors`, batch first.
    parts = [list(state.tensors().values()) for state in states]
    columns = [[part[i] for part in parts] for i in range(len(parts[0]))]
    grow = [[growing(x, e) for x in column] for column, e in zip(columns, empty.tensors().values())]
    whole = iter([_cat(x, next((d for d in dims if d is not None), None), room) for x, dims in zip(columns, grow)])
    return states[0].map(lambda _: next(whole))


def _cat(parts: list[Tensor], d: int | None, room: int) -> Tensor:
    """Along the batch. Where dimension d (the tokens in a cache) differs, shorter ones get zeros behind; all get room
    for as many tokens more."""
    if d is None:
        return torch.cat(parts)
    shape = list(parts[0].shape)
    shape[0], shape[d] = sum(part.size(0) for part in parts), max(part.size(d) for part in parts) + room
    out, row = parts[0].new_empty(shape), 0
    for part in parts:
        rows = out[row : row + part.size(0)]
        rows.narrow(d, 0, part.size(d)).copy_(part)
        rows.narrow(d, part.size(d), shape[d] - part.size(d)).zero_()
        row += part.size(0)
    return out
