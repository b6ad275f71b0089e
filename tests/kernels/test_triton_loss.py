"""The Triton cross-entropy in the interpreter against all logits at once in float64."""

import math

import pytest
import torch
from kernel_cases import compare, leaves
from test_loss import inputs
from torch import Tensor

pytest.importorskip("triton")
from nanochat.kernels import triton_loss
from nanochat.kernels.loss import linear_cross_entropy, linear_cross_entropy_ref


@pytest.fixture(autouse=True)
def _triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_KERNEL_LINEAR_CROSS_ENTROPY", "triton")


@pytest.mark.parametrize("n_row", [1, 33])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("whole", [True, False])
def test_matches_the_oracle(n_row: int, softcap: float, whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows held in registers, and rows of several blocks of which the last is not full."""
    if not whole:
        monkeypatch.setattr(triton_loss, "REGISTERS", 32)
        monkeypatch.setattr(triton_loss, "BLOCK", 16)
    tensors, targets, weights = inputs(n_row)
    compare(
        lambda h, w: linear_cross_entropy(h, w, targets, weights, softcap, 16),
        lambda h, w: linear_cross_entropy_ref(h, w, targets, weights, softcap),
        leaves(tensors, torch.float32),
        1e-5,
    )


def test_half_precision_hidden() -> None:
    tensors, targets, weights = inputs(20)
    half = leaves(tensors, torch.bfloat16, torch.float32)
    value = linear_cross_entropy(*half, targets, weights, 5.0)
    value.backward()
    assert (value.dtype, half[0].grad.dtype, half[1].grad.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    compare(
        lambda h, w: linear_cross_entropy(h, w, targets, weights, 5.0, 8),
        lambda h, w: linear_cross_entropy_ref(h, w, targets, weights, 5.0),
        half,
        2e-2,
    )


def test_only_the_gradients_that_are_needed() -> None:
    tensors, targets, weights = inputs(9)
    hidden, weight = leaves(tensors, torch.float32)
    (alone,) = torch.autograd.grad(linear_cross_entropy(hidden.detach(), weight, targets, weights), weight)
    (other,) = torch.autograd.grad(linear_cross_entropy(hidden, weight.detach(), targets, weights), hidden)
    both = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets, weights), (hidden, weight))
    assert torch.equal(other, both[0])
    assert torch.equal(alone, both[1])
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, targets, weights).requires_grad


def test_everything_ignored_and_no_row() -> None:
    tensors, targets, weights = inputs(3)
    hidden, weight = leaves(tensors, torch.float32)
    for n_row in (3, 0):
        value = linear_cross_entropy(hidden[:n_row], weight, torch.full_like(targets, -1)[:n_row], weights[:n_row])
        assert value.item() == 0
        assert all(g.abs().sum() == 0 for g in torch.autograd.grad(value, (hidden, weight)))


def test_a_target_whose_probability_underflows() -> None:
    hidden, weight = torch.tensor([[300.0]]), torch.tensor([[1.0], [0.0]])
    value = linear_cross_entropy(hidden, weight, torch.tensor([1]), torch.ones(1))
    assert math.isclose(value.item(), 300.0, rel_tol=1e-6)


def test_one_graph_and_a_well_formed_operator() -> None:
    tensors, targets, weights = inputs(5)
    given = leaves(tensors, torch.float32)

    def run(h: Tensor, w: Tensor) -> Tensor:
        return linear_cross_entropy(h, w, targets, weights, 5.0)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    results = [(y := op(*given), *torch.autograd.grad(y, given)) for op in (run, compiled)]
    assert all(torch.equal(a, b) for a, b in zip(*results))
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(
        torch.ops.nanochat.linear_cross_entropy, (*given, targets, weights, 5.0, 4, True, True), test_utils=checks
    )


def test_the_check_that_a_gpu_makes_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_loss, "REGISTERS", 1024)
    monkeypatch.setattr(triton_loss, "BLOCK", 512)
    triton_loss.self_check(torch.device("cpu"))
