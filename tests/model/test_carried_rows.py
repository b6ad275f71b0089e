"""Training rows that go on where others ended: the same as one long row, in whatever pieces it comes."""

import pytest
import torch
from models import MODELS, model, tokens
from torch import Tensor

from nanochat.errors import UsageError

BOS = 60
close = torch.testing.assert_close


def documents(*lengths: int) -> tuple[Tensor, Tensor]:
    """Ids and document numbers, (1, T): each document begins with BOS, which occurs nowhere else."""
    ids = torch.cat([torch.cat((torch.tensor([BOS]), tokens(n - 1, seed=n) % BOS)) for n in lengths])
    numbers = torch.tensor([i for i, n in enumerate(lengths) for _ in range(n)], dtype=torch.int32)
    return ids[None], numbers[None]


def batches(ids: Tensor, numbers: Tensor, T: int) -> list[tuple[Tensor, ...]]:
    """(inputs, targets, weights, segments) of consecutive rows of T tokens."""
    targets = torch.roll(ids, -1, 1)
    weights = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0))
    whole = (ids, targets, weights, numbers)
    return list(zip(*(x.split(T, dim=1) for x in whole)))


@pytest.mark.parametrize("T", [12, 5, 1])
@pytest.mark.parametrize("name", MODELS)
def test_rows_in_sequence_are_as_one_long_row(name: str, T: int) -> None:
    """With borders of documents anywhere, even a token before that of the row; two rows with different borders."""
    lm = model(name, sequence_len=48)  # so much attention carries: the whole past
    pairs = [documents(17, 19, 1, 11), documents(11, 2, 35)]
    ids, numbers = (torch.cat(x) for x in zip(*pairs))
    with torch.no_grad():
        expected = lm(ids, segments_BT=numbers)
        states, found = lm.init_carry(2), []
        for inputs, _, _, segments in batches(ids, numbers, T):
            goes_on = inputs[:, 0] != BOS
            states = [s.map(lambda x: x * goes_on.view(-1, *[1] * (x.dim() - 1)).to(x.dtype)) for s in states]  # noqa: B023
            found.append(lm(inputs, states, segments))
    close(torch.cat(found, 1), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["M", "M2", "hybrid"])
def test_gradients_are_those_of_a_long_row(name: str) -> None:
    lm = model(name, sequence_len=24).double()
    ids, numbers = documents(20, 4)
    (first, second), (whole,) = batches(ids, numbers, 12), batches(ids, numbers, 24)
    lm.compute_dtype = torch.float64
    parameters = list(lm.parameters())
    inputs, targets, weights, segments = whole
    expected = torch.autograd.grad(lm.loss(inputs, targets, weights, segments), parameters)
    states = lm.init_carry(1)
    loss = lm.loss(*first, states) + lm.loss(*second, states)
    for found, wanted in zip(torch.autograd.grad(loss, parameters), expected):
        close(found, wanted, rtol=1e-7, atol=1e-9)


def test_attention_carries_a_row_or_its_window() -> None:
    lm = model("window", sequence_len=16)
    sizes = [state.tensors()["k"].size(1) for state in lm.init_carry(1)]
    before = 4 + lm.config.key_offset  # a query sees itself and so many; the first of them needs the one before
    assert sizes == [before, before, 16]  # window 5 on two layers, full attention on the third


def test_a_kv_cache_is_no_place_for_several_documents() -> None:
    lm = model("T")
    with pytest.raises(UsageError, match="init_carry"):
        lm(tokens(1, 4), lm.init_states(1), torch.zeros(1, 4, dtype=torch.int32))
