"""The chunked cross-entropy against all logits at once in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import compare, error, leaves
from torch import Tensor

from nanochat.kernels import loss
from nanochat.kernels.loss import linear_cross_entropy, linear_cross_entropy_ref, linear_nll


def inputs(n_row: int, n_vocab: int = 50, width: int = 8, scale: float = 1.0) -> tuple[list[Tensor], Tensor, Tensor]:
    """hidden and weight in float64, targets of which some are ignored, weights of which some are zero."""
    g = torch.Generator().manual_seed(n_row)
    hidden, weight = torch.randn(n_row, width, generator=g) * scale, torch.randn(n_vocab, width, generator=g)
    targets = torch.randint(-1, n_vocab, (n_row,), generator=g)
    weights = torch.rand(n_row, generator=g) * (torch.rand(n_row, generator=g) > 0.2)
    return leaves([hidden, weight], torch.float64), targets, weights


@pytest.mark.parametrize("n_row", [1, 2, 17, 64, 257])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("chunk", [None, 16])
def test_matches_the_oracle(n_row: int, softcap: float, chunk: int | None) -> None:
    tensors, targets, weights = inputs(n_row)
    compare(
        lambda h, w: linear_cross_entropy(h, w, targets, weights, softcap, chunk),
        lambda h, w: linear_cross_entropy_ref(h, w, targets, weights, softcap),
        leaves(tensors, torch.float32),
        1e-5,
    )


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(2, 60), st.integers(1, 20), st.sampled_from([0.0, 3.0]))
def test_any_shape(n_row: int, n_vocab: int, chunk: int, softcap: float) -> None:
    (hidden, weight), targets, weights = inputs(n_row, n_vocab)
    got = linear_cross_entropy(hidden, weight, targets, weights, softcap, chunk)
    torch.testing.assert_close(got, linear_cross_entropy_ref(hidden, weight, targets, weights, softcap))


def test_blocks_of_rows_and_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "COLUMNS", 7)
    monkeypatch.setattr(loss, "BLOCK_BYTES", 50 * 4 * 3)
    tensors, targets, weights = inputs(41)
    for softcap in (0.0, 5.0):
        compare(
            lambda h, w, cap=softcap: linear_cross_entropy(h, w, targets, weights, cap, 16),
            lambda h, w, cap=softcap: linear_cross_entropy_ref(h, w, targets, weights, cap),
            leaves(tensors, torch.float32),
            1e-5,
        )


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_gradcheck(softcap: float) -> None:
    tensors, targets, weights = inputs(7, 6, 3)
    weights = weights.double()
    assert torch.autograd.gradcheck(
        lambda h, w: 2 * linear_cross_entropy(h, w, targets, weights, softcap, 3), tensors
    )


def test_only_the_gradients_that_are_needed() -> None:
    (hidden, weight), targets, weights = inputs(9)
    (alone,) = torch.autograd.grad(linear_cross_entropy(hidden.detach(), weight, targets, weights), weight)
    both = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets, weights), (hidden, weight))
    torch.testing.assert_close(alone, both[1])
    with torch.no_grad():
        value = linear_cross_entropy(hidden, weight, targets, weights)
    assert not value.requires_grad
    torch.testing.assert_close(value, linear_cross_entropy_ref(hidden, weight, targets, weights).detach())


def test_everything_ignored() -> None:
    (hidden, weight), targets, weights = inputs(5)
    value = linear_cross_entropy(hidden, weight, torch.full_like(targets, -1), weights)
    assert value.item() == 0
    assert all(g.abs().sum() == 0 for g in torch.autograd.grad(value, (hidden, weight)))


def test_a_target_whose_probability_underflows() -> None:
    hidden, weight = torch.tensor([[300.0]]), torch.tensor([[1.0], [0.0]])
    value = linear_cross_entropy(hidden, weight, torch.tensor([1]), torch.ones(1))
    assert math.isclose(value.item(), 300.0, rel_tol=1e-6)


def test_half_precision_hidden() -> None:
    tensors, targets, weights = inputs(33)
    half = leaves(tensors, torch.bfloat16, torch.float32)
    value = linear_cross_entropy(*half, targets, weights, 5.0, 16)
    assert value.dtype == torch.float32
    value.backward()
    assert (half[0].grad.dtype, half[1].grad.dtype) == (torch.bfloat16, torch.float32)
    for softcap in (0.0, 5.0):
        compare(
            lambda h, w, cap=softcap: linear_cross_entropy(h, w, targets, weights, cap, 16),
            lambda h, w, cap=softcap: linear_cross_entropy_ref(h, w, targets, weights, cap),
            half,
            2e-2,
        )


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_nll_of_each_token(softcap: float) -> None:
    (hidden, weight), targets, _ = inputs(40)
    nll = linear_nll(hidden.float(), weight.float(), targets, softcap)
    assert nll.dtype == torch.float32
    assert not nll.requires_grad
    one = torch.eye(40, dtype=torch.float64)
    wanted = torch.stack([linear_cross_entropy_ref(hidden, weight, targets, row, softcap) for row in one])
    assert error(nll, wanted) < 1e-5
    assert (nll[targets == -1] == 0).all()
