"""A finite stream ends, also when its last document is the last one of a read."""

from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from nanochat.data.batches import Packer, Piece


class Numbers:
    """`n` documents of two tokens."""

    name = "numbers"

    def __init__(self, n: int) -> None:
        self.n = n

    def read(self, epoch: int, start: int) -> Iterator[int]:
        return iter(range(start, self.n))

    def encode(self, raw: Sequence[int]) -> list[Piece | None]:
        return [Piece(np.array([i, i], dtype=np.int32), np.array([i, i], dtype=np.int32)) for i in raw]


@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize("n", [1, 7, 8, 9, 16, 31, 32])
@pytest.mark.parametrize("n_lanes", [1, 4])
def test_every_document_once_an_epoch_then_the_end(n: int, epochs: int, n_lanes: int) -> None:
    packer = Packer(Numbers(n), 2, n_lanes=n_lanes, read_ahead=8, buffer_size=4, epochs=epochs)
    seen: list[int] = []
    while (batch := packer.batch(1)) is not None:
        seen.append(int(batch.inputs[0, 0]))
        assert len(seen) <= n * epochs
    assert sorted(seen) == sorted([*range(n)] * epochs)
