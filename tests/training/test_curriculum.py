"""Short rows first."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import copy_run, make_tokenizer, train

from nanochat.data.batches import Batch
from nanochat.errors import UsageError
from nanochat.model.lm import LM
from nanochat.training.curriculum import cut, length_at


@given(start=st.integers(1, 64), doublings=st.integers(0, 8), grow=st.floats(0, 1), share=st.floats(0, 1))
def test_lengths_double_up_to_the_full_one(start: int, doublings: int, grow: float, share: float) -> None:
    full = start << doublings
    length = length_at(share, start, full, grow)
    assert full % length == 0
    assert length % start == 0
    assert (length == full) == (share >= grow or length == full)
    if share < grow:
        assert length_at(0.0, start, full, grow) == start <= length
        assert length_at(share / 2, start, full, grow) <= length
    else:
        assert length == full


def test_lengths_of_a_run() -> None:
    assert [length_at(i / 8, 4, 32, 0.75) for i in range(9)] == [4, 4, 8, 8, 16, 16, 32, 32, 32]


def test_cutting_keeps_every_token() -> None:
    ids = torch.arange(24).view(2, 12)
    batch = cut(Batch(ids, ids + 1, ids.float(), ids // 5), 4)
    assert batch.inputs.shape == (6, 4)
    assert batch.inputs.flatten().tolist() == list(range(24))
    assert batch.segments[0].tolist() == [0, 0, 0, 0]


def test_a_run_goes_from_short_to_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tokenizer(tmp_path)
    seen = []
    real = LM.loss

    def loss(self: LM, inputs: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(inputs.shape))
        return real(self, inputs, *rest)

    monkeypatch.setattr(LM, "loss", loss)
    train("base", tmp_path, start_len=8, num_iterations=8)
    assert seen == [(8, 8)] * 2 + [(4, 16)] * 2 + [(2, 32)] * 4


@pytest.mark.parametrize("start_len", [5, 64, 12, 33])
def test_a_length_that_doubling_does_not_lead_from(tmp_path: Path, start_len: int) -> None:
    make_tokenizer(tmp_path)
    with pytest.raises(UsageError, match=f"--start_len {start_len}"):
        train("base", tmp_path, start_len=start_len)


def test_conversations_are_not_cut(finished: Path, tmp_path: Path) -> None:
    root = copy_run(finished, tmp_path, "tokenizer", "base")
    for stage in ("mid", "sft"):
        with pytest.raises(UsageError, match="--start_len 8 is for base_train"):
            train(stage, root, start_len=8)
