"""What every sequence mixer offers (attention, S6, SSD), and what every state that it carries can do.

A new kind is one file with a `Mixer` and a `State`, and one row in `lm.MIXERS`; the contract tests pick it up by
themselves.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
import torch.nn as nn
from torch import Tensor

from nanochat.model.layers import Ragged


class State(ABC):
    """What a mixer remembers of each row's past. It advances itself inside `Mixer.forward`."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The live content by name, batch first."""

    @abstractmethod
    def map(self, fn: Callable[[Tensor], Tensor]) -> State:
        """A new state whose tensors (and per-row counters) are `fn` of these."""

    @abstractmethod
    def restore(self, snapshot: State) -> None:
        """Become a copy of `snapshot`."""

    def fork(self, n: int) -> State:
        """Each row repeated n times: (B, ...) to (B * n, ...)."""
        return self.map(lambda x: x.repeat_interleave(n, dim=0))

    def snapshot(self) -> State:
        """A copy that later forwards do not touch."""
        return self.map(torch.clone)

    def select(self, rows: Tensor) -> None:
        """Keep these batch rows, in this order."""
        self.restore(self.map(lambda x: x.index_select(0, rows.to(x.device))))

    def reserve(self, n: int) -> None:  # noqa: B027 (states of constant size have nothing to do)
        """Make room for n more tokens."""

    @property
    def nbytes(self) -> int:
        """Bytes of live content (not of spare room)."""
        return sum(x.numel() * x.element_size() for x in self.tensors().values())


class Mixer(nn.Module, ABC):
    """Mixes information over time within a row; never from later to earlier tokens, never across documents."""

    @abstractmethod
    def forward(
        self,
        x_BTD: Tensor,
        state: State | None = None,
        segments_BT: Tensor | None = None,
        ragged: Ragged | None = None,
        value_BTC: Tensor | None = None,
    ) -> Tensor:
        """Same shape as x. `segments_BT` numbers documents inside a row (training); `ragged` says that x is (1, N, D):
        rows of different lengths end to end, one per batch row of `state`; `value_BTC` is a value embedding, used by
        attention only.

        With both `state` and `segments_BT` (training on rows that go on where others ended) the first document of each
        row goes on from a state of `init_carry`, and the state is then that of its last document. Gradients flow
        through it until it is detached."""

    @abstractmethod
    def init_state(self, batch: int, max_len: int, device: torch.device, dtype: torch.dtype) -> State:
        """An empty state for `batch` rows with room for `max_len` tokens; `dtype` is that of the activations."""

    def init_carry(self, batch: int, room: int, device: torch.device, dtype: torch.dtype) -> State:
        """An empty state that one training row hands to the next; where it grows with the past, it keeps the last
        `room` tokens."""
        return self.init_state(batch, 0, device, dtype)

    @abstractmethod
    def init_weights(self) -> None:
        """Write every parameter of the mixer exactly once."""
