"""Truncated backpropagation through time (Williams & Peng 1990): rows that go on where the rows before them ended.

A document longer than a row is read in consecutive rows of one lane, and the state behind a row (Mamba's, and the last
row of keys and values of attention, as in Transformer-XL) is where the next begins. Gradients end at the row's border:
memory is that of one row, however long the document.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nanochat.model.lm import LM
from nanochat.model.mixer import State


class Carry:
    """The states that row i of each batch hands to row i of the next. A row that begins with <|bos|> begins anew."""

    def __init__(self, model: LM, n_rows: int, bos: int) -> None:
        self.model, self.bos = model, bos
        self.states = model.init_carry(n_rows)

    def loss(self, inputs: Tensor, targets: Tensor, weights: Tensor, segments: Tensor) -> Tensor:
        """As `LM.loss`, going on from the batch before."""
        goes_on = inputs[:, 0] != self.bos
        self.states = [_keep(state, goes_on) for state in self.states]
        loss = self.model.loss(inputs, targets, weights, segments, self.states)
        self.states = [state.map(torch.Tensor.detach) for state in self.states]
        return loss

    def state_dict(self) -> list[dict[str, Tensor]]:
        """The tensors of each layer's state, rows first."""
        return [dict(state.tensors()) for state in self.states]

    def load_state_dict(self, layers: list[dict[str, Tensor]], first: int = 0, step: int = 1) -> None:
        """Go on from rows first, first + step... of what `state_dict` gave."""
        self.states = [_filled(state, layer, slice(first, None, step)) for state, layer in zip(self.states, layers)]


def _keep(state: State, rows_B: Tensor) -> State:
    """Zeros where a row begins anew."""
    return state.map(lambda x: x * rows_B.view(-1, *[1] * (x.dim() - 1)).to(x.dtype))


def _filled(state: State, tensors: dict[str, Tensor], rows: slice) -> State:
    # `State.map` visits the tensors in the order of `State.tensors`
    names = iter(state.tensors())
    return state.map(lambda x: tensors[next(names)][rows].to(x.device, x.dtype))


def carried_rows(parts: list[Any]) -> list[dict[str, Tensor]]:
    """The states of all ranks in the order of the lanes: row i of rank r is lane i * ranks + r."""
    return [
        {name: torch.stack([part[i][name].cpu() for part in parts], 1).flatten(0, 1) for name in layer}
        for i, layer in enumerate(parts[0])
    ]
