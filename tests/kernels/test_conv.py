"""The short convolution against a window-by-window oracle in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import LENGTHS, compare, documents, leaves
from torch import Tensor

from nanochat.kernels.conv import causal_conv, causal_conv_ref, causal_conv_step


def inputs(n_batch: int, n_time: int, n_inner: int = 5, n_kernel: int = 4) -> list[Tensor]:
    """x, weight, bias, state in float64."""
    g = torch.Generator().manual_seed(n_time)
    shapes = (n_batch, n_time, n_inner), (n_inner, n_kernel), (n_inner,), (n_batch, n_kernel - 1, n_inner)
    return leaves([torch.randn(shape, generator=g) for shape in shapes], torch.float64)


@pytest.mark.parametrize("n_time", LENGTHS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("activation", [True, False])
def test_matches_the_oracle(n_time: int, packed: bool, activation: bool) -> None:
    options = {"segments_BT": documents(2, n_time)} if packed else {}
    tensors = leaves(inputs(2, n_time), torch.float32)
    compare(causal_conv, causal_conv_ref, tensors, 1e-5, activation=activation, **options)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("n_time", [2, 7, 24])
def test_long_rows_in_parts(n_time: int, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanochat.kernels.conv.BLOCK", 1)  # of three steps: as many as the next part needs
    segments = documents(2, n_time, 5) if packed else None
    compare(causal_conv, causal_conv_ref, leaves(inputs(2, n_time), torch.float32), 1e-5, segments_BT=segments)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 12), st.integers(1, 4), st.integers(1, 5), st.data())
def test_any_shape(n_batch: int, n_time: int, n_inner: int, n_kernel: int, data: st.DataObject) -> None:
    tensors = inputs(n_batch, n_time, n_inner, n_kernel)
    row = st.lists(st.integers(0, 2), min_size=n_time, max_size=n_time)
    segments = torch.tensor(data.draw(st.lists(row, min_size=n_batch, max_size=n_batch)))
    lengths = torch.tensor(data.draw(st.lists(st.integers(1, n_time), min_size=n_batch, max_size=n_batch)))
    got = causal_conv(*tensors, segments_BT=segments, lengths=lengths)
    wanted = causal_conv_ref(*tensors, segments_BT=segments, lengths=lengths)
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("n_time", [1, 2, 9])
def test_gradcheck(n_time: int) -> None:
    segments = torch.tensor([[0, 0, 0, 1, 2, 2, 2, 2, 2], [0, 1, 1, 1, 1, 1, 1, 1, 1]])[:, :n_time]
    assert torch.autograd.gradcheck(lambda *x: causal_conv(*x, segments_BT=segments), inputs(2, n_time, 2))


def test_without_bias_and_state() -> None:
    x, weight, _, _ = inputs(2, 9)
    zeros = torch.zeros(5, dtype=torch.float64), torch.zeros(2, 3, 5, dtype=torch.float64)
    torch.testing.assert_close(causal_conv(x, weight), causal_conv_ref(x, weight, *zeros))


@pytest.mark.parametrize("at", [1, 2, 3, 8])
def test_state_carries_over_a_cut(at: int) -> None:
    x, weight, bias, state = inputs(2, 12)
    whole, last = causal_conv(x, weight, bias, state)
    y1, middle = causal_conv(x[:, :at], weight, bias, state)
    y2, end = causal_conv(x[:, at:], weight, bias, middle)
    torch.testing.assert_close(torch.cat((y1, y2), 1), whole)
    torch.testing.assert_close(end, last)


def test_packed_documents_are_separate_documents() -> None:
    x, weight, bias, _ = inputs(1, 20)
    segments = torch.repeat_interleave(torch.arange(4), torch.tensor([7, 1, 2, 10]))[None]
    packed, last = causal_conv(x, weight, bias, segments_BT=segments)
    for n in range(4):
        part = (segments == n)[0]
        y, state = causal_conv(x[:, part], weight, bias)
        torch.testing.assert_close(packed[:, part], y)
    torch.testing.assert_close(last, state)


def test_padding_changes_nothing() -> None:
    x, weight, bias, state = inputs(3, 10)
    lengths = torch.tensor([10, 1, 6])
    y, last = causal_conv(x, weight, bias, state, lengths=lengths)
    for row, n in enumerate(lengths.tolist()):
        alone, end = causal_conv(x[row : row + 1, :n], weight, bias, state[row : row + 1])
        torch.testing.assert_close(y[row : row + 1, :n], alone)
        torch.testing.assert_close(last[row : row + 1], end)


@pytest.mark.parametrize("activation", [True, False])
def test_step_is_the_convolution_one_token_at_a_time(activation: bool) -> None:
    x, weight, bias, state = (t.detach().float() for t in inputs(2, 9))
    whole, last = causal_conv(x, weight, bias, state, activation=activation)
    running = state.clone()
    steps = [causal_conv_step(x[:, t], weight, bias, running, activation) for t in range(9)]
    torch.testing.assert_close(torch.stack(steps, 1), whole)
    torch.testing.assert_close(running, last)


def test_returned_state_does_not_alias_the_input() -> None:
    x, weight, bias, _ = (t.detach() for t in inputs(1, 8))
    _, state = causal_conv(x, weight, bias)
    x.zero_()
    assert state.abs().sum() > 0


def test_half_precision_activations() -> None:
    tensors = leaves(inputs(1, 20), torch.bfloat16, torch.float32, torch.float32, torch.bfloat16)
    assert causal_conv(*tensors)[0].dtype == torch.bfloat16
    compare(causal_conv, causal_conv_ref, tensors, 1e-2)
