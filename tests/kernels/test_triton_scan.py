"""S6's Triton kernels in the interpreter against the sequential oracle in float64. It is slow: sizes are small."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import compare, documents, leaves
from test_scan import inputs
from torch import Tensor

pytest.importorskip("triton")
from nanochat.errors import UsageError
from nanochat.kernels import triton_scan
from nanochat.kernels.scan import selective_scan, selective_scan_ref


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_KERNEL_SELECTIVE_SCAN", "triton")
    for name, value in {"BLOCK": 4, "KEEP": 4, "UNROLL": 2}.items():
        monkeypatch.setattr(triton_scan, name, value)


def fused(n_batch: int, n_time: int, n_inner: int, n_state: int) -> list[Tensor]:
    """As `inputs`, with bias and gate; steps before softplus."""
    g = torch.Generator().manual_seed(7)
    bias, gate = torch.randn(n_inner, generator=g), torch.randn(n_batch, n_time, n_inner, generator=g)
    return leaves([*inputs(n_batch, n_time, n_inner, n_state), bias, gate], torch.float32)


def call(op, *tensors: Tensor, segments: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return op(*tensors[:7], segments, None, *tensors[7:])


@pytest.mark.parametrize("n_time", [1, 7])
@pytest.mark.parametrize("packed", [False, True])
def test_matches_the_oracle(n_time: int, packed: bool) -> None:
    options = {"segments_BT": documents(2, n_time, 3)} if packed else {}
    compare(selective_scan, selective_scan_ref, fused(2, n_time, 2, 3)[:7], 1e-5, **options)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("min_split", "n_inner"), [(4, 3), (1000, 5)])
def test_bias_gate_splits_of_time_and_blocks(
    packed: bool, min_split: int, n_inner: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_scan, "MIN_SPLIT", min_split)
    segments = documents(1, 9, 5) if packed else None
    compare(
        lambda *x: call(selective_scan, *x, segments=segments),
        lambda *x: call(selective_scan_ref, *x, segments=segments),
        fused(1, 9, n_inner, 4),
        1e-5,
    )


@settings(max_examples=5, deadline=None, derandomize=True)
@given(st.integers(1, 2), st.integers(1, 9), st.integers(1, 5), st.integers(1, 5), st.data())
def test_any_shape(n_batch: int, n_time: int, n_inner: int, n_state: int, data: st.DataObject) -> None:
    tensors = [x.float() for x in inputs(n_batch, n_time, n_inner, n_state)]
    row = st.lists(st.integers(0, 1), min_size=n_time, max_size=n_time)
    segments = torch.tensor(data.draw(st.lists(row, min_size=n_batch, max_size=n_batch)))
    lengths = torch.tensor(data.draw(st.lists(st.integers(0, n_time), min_size=n_batch, max_size=n_batch)))
    y, state = selective_scan(*tensors, segments_BT=segments, lengths=lengths)
    wanted, wanted_state = selective_scan_ref(*tensors, segments_BT=segments, lengths=lengths)
    valid = torch.arange(n_time) < lengths[:, None]
    torch.testing.assert_close(y[valid], wanted[valid], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, wanted_state, rtol=1e-4, atol=1e-5)


def test_gradients_of_padded_rows() -> None:
    lengths = torch.tensor([5, 2])
    valid = (torch.arange(5) < lengths[:, None])[:, :, None]

    def masked(op, *x: Tensor) -> tuple[Tensor, Tensor]:
        y, state = op(*x[:7], None, lengths, *x[7:])
        return y * valid, state

    compare(lambda *x: masked(selective_scan, *x), lambda *x: masked(selective_scan_ref, *x), fused(2, 5, 3, 2), 1e-5)


def test_state_carries_over_a_cut_with_its_gradient() -> None:
    u, delta, A, B, C, D, state = fused(1, 9, 4, 4)[:7]
    whole, last = selective_scan(u, delta, A, B, C, D, state)
    y1, middle = selective_scan(u[:, :5], delta[:, :5], A, B[:, :5], C[:, :5], D, state)
    y2, end = selective_scan(u[:, 5:], delta[:, 5:], A, B[:, 5:], C[:, 5:], D, middle)
    torch.testing.assert_close(torch.cat((y1, y2), 1), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(end, last, rtol=1e-4, atol=1e-5)
    for got, wanted in zip(torch.autograd.grad(end.sum(), (u, state)), torch.autograd.grad(last.sum(), (u, state))):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("factor", [40.0, 0.0])
def test_huge_and_empty_steps(factor: float) -> None:
    u, delta, *rest = fused(1, 9, 4, 4)[:7]
    compare(selective_scan, selective_scan_ref, leaves([u, delta * factor, *rest], torch.float32), 1e-5)


def test_every_token_a_document_with_wide_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_scan, "WIDE", 1)
    tensors = fused(1, 6, 4, 4)[:7]
    compare(selective_scan, selective_scan_ref, tensors, 1e-5, segments_BT=torch.arange(6)[None])


def test_tiny_steps_keep_their_digits() -> None:
    """softplus far below zero: its own relative accuracy, not that of 1 + exp(x)."""
    u, delta, A, B, C, D, _, bias, _ = (x.detach() for x in fused(1, 4, 4, 4))
    zeros = torch.zeros_like(D)
    y, _ = selective_scan(u, delta - 12, A, B, C, zeros, bias_E=bias)
    exact = (x.double() for x in (u, delta - 12, A, B, C, zeros))
    wanted, _ = selective_scan_ref(*exact, bias_E=bias.double())
    assert ((y - wanted).norm() / wanted.norm()) < 1e-6


def test_views_and_half_precision() -> None:
    """Inputs are slices of wider tensors, as in the mixer; A, D, the bias and the state stay in float32."""
    u, delta, A, B, C, D, state, bias, gate = (x.detach() for x in fused(1, 9, 4, 4))
    tensors = leaves(
        [torch.cat((u, gate), -1), torch.cat((delta, B, C), -1), A, D, state, bias],
        torch.bfloat16,
        torch.bfloat16,
        torch.float32,
    )

    def run(op, wide: Tensor, maps: Tensor, A: Tensor, D: Tensor, state: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        (u, gate), (delta, B, C) = wide.chunk(2, -1), maps.split((4, 4, 4), -1)
        return op(u, delta, A, B, C, D, state, None, None, bias, gate)

    y, last = run(selective_scan, *tensors)
    assert (y.dtype, last.dtype) == (torch.bfloat16, torch.float32)
    compare(lambda *x: run(selective_scan, *x), lambda *x: run(selective_scan_ref, *x), tensors, 2e-2)


def test_survives_compilation_without_a_graph_break() -> None:
    tensors = fused(1, 5, 4, 2)

    def loss(*x: Tensor) -> Tensor:
        y, state = call(selective_scan, *x)
        return y.square().sum() + state.square().sum()

    wanted = torch.autograd.grad(loss(*tensors), tensors)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*tensors), tensors)
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a, b)


def test_the_operator_keeps_its_contract() -> None:
    """Shapes of the fake version, no hidden aliases or mutations, gradients registered."""
    u, delta, A, B, C, D, state, bias, gate = fused(1, 5, 4, 2)
    A, state = A.detach().t().contiguous(), state.detach().transpose(1, 2).contiguous()
    args = (u, delta, A, B, C, D, bias, gate, state, torch.zeros(1, 5, dtype=torch.int32), torch.tensor([4]), 0)
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.nanochat.selective_scan, args, test_utils=utils)


def test_self_check() -> None:
    triton_scan.self_check(torch.device("cpu"))


def test_double_precision_is_refused() -> None:
    with pytest.raises(UsageError, match=r"not torch\.float64"):
        selective_scan(*inputs(1, 2, 2, 2))
