"""SSD: chunked matmuls against the sequential oracle in float64, and everything that a caller may split or pack."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import LENGTHS, compare, documents, leaves
from torch import Tensor

from nanochat.kernels.ssd import ssd, ssd_ref, ssd_step


def inputs(
    n_batch: int, n_time: int, n_head: int = 4, width: int = 3, n_group: int = 2, n_state: int = 5
) -> list[Tensor]:
    """x, dt, A, B, C, D, state in float64, with the magnitudes of a trained layer."""
    g = torch.Generator().manual_seed(n_time)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    dt = torch.rand(n_batch, n_time, n_head, generator=g, dtype=torch.float64)
    A = -1 - 4 * torch.rand(n_head, generator=g, dtype=torch.float64)
    B, C = normal(n_batch, n_time, n_group, n_state), normal(n_batch, n_time, n_group, n_state)
    state = normal(n_batch, n_head, width, n_state)
    return leaves([normal(n_batch, n_time, n_head, width), dt, A, B, C, normal(n_head), state], torch.float64)


def cut(tensors: list[Tensor], rows: slice, times: slice | Tensor) -> list[Tensor]:
    x, dt, A, B, C, D, _ = tensors
    return [x[rows, times], dt[rows, times], A, B[rows, times], C[rows, times], D]


@pytest.mark.parametrize("n_time", LENGTHS)
@pytest.mark.parametrize("packed", [False, True])
def test_matches_the_oracle(n_time: int, packed: bool) -> None:
    options = {"segments_BT": documents(2, n_time)} if packed else {}
    compare(ssd, ssd_ref, leaves(inputs(2, n_time), torch.float32), 1e-5, **options)


@pytest.mark.parametrize("packed", [False, True])
def test_long_rows_in_parts(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanochat.kernels.ssd.BLOCK", 2 * 4 * 64 * 64)  # two chunks of four heads
    segments = documents(2, 300, 40) if packed else None
    compare(ssd, ssd_ref, leaves(inputs(2, 300), torch.float32), 3e-5, segments_BT=segments)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 150), st.sampled_from([(1, 1), (2, 1), (2, 2), (6, 3)]), st.data())
def test_any_shape(n_batch: int, n_time: int, heads: tuple[int, int], data: st.DataObject) -> None:
    tensors = inputs(n_batch, n_time, heads[0], 2, heads[1], 3)
    firsts = data.draw(st.lists(st.integers(0, n_time), max_size=4))
    segments = (torch.arange(n_time)[:, None] >= torch.tensor([*firsts, n_time])).sum(1).expand(n_batch, -1)
    lengths = torch.tensor(data.draw(st.lists(st.integers(1, n_time), min_size=n_batch, max_size=n_batch)))
    y, state = ssd(*tensors, segments_BT=segments, lengths=lengths)
    wanted, wanted_state = ssd_ref(*tensors, segments_BT=segments, lengths=lengths)
    valid = torch.arange(n_time) < lengths[:, None]
    torch.testing.assert_close(y[valid], wanted[valid])
    torch.testing.assert_close(state, wanted_state)


@pytest.mark.parametrize("n_time", [5, 70])
def test_gradcheck(n_time: int) -> None:
    torch.manual_seed(0)
    lengths = torch.tensor([n_time - 2])
    tensors = inputs(1, n_time, 2, 1, 1, 1)
    segments = documents(1, n_time, 3 if n_time < 64 else 40)
    assert torch.autograd.gradcheck(
        lambda *x: ssd(*x, segments_BT=segments, lengths=lengths), tensors, fast_mode=n_time > 64
    )


@pytest.mark.parametrize("at", [1, 64, 100])
def test_state_carries_over_a_cut(at: int) -> None:
    tensors = inputs(2, 150)
    every = slice(None)
    whole, last = ssd(*tensors)
    y1, middle = ssd(*cut(tensors, every, slice(0, at)), tensors[-1])
    y2, end = ssd(*cut(tensors, every, slice(at, None)), middle)
    torch.testing.assert_close(torch.cat((y1, y2), 1), whole)
    torch.testing.assert_close(end, last)


def test_packed_documents_are_separate_documents() -> None:
    tensors = inputs(1, 200)
    segments = torch.repeat_interleave(torch.arange(5), torch.tensor([25, 39, 1, 100, 35]))[None]
    packed, last = ssd(*cut(tensors, slice(None), slice(None)), segments_BT=segments)
    for n in range(5):
        part = (segments == n)[0]
        y, state = ssd(*cut(tensors, slice(None), part))
        torch.testing.assert_close(packed[:, part], y)
    torch.testing.assert_close(last, state)


def test_padding_changes_nothing() -> None:
    tensors = inputs(3, 100)
    lengths = torch.tensor([100, 1, 70])
    y, last = ssd(*tensors, lengths=lengths)
    for row, n in enumerate(lengths.tolist()):
        r = slice(row, row + 1)
        alone, end = ssd(*cut(tensors, r, slice(0, n)), tensors[-1][r])
        torch.testing.assert_close(y[r, :n], alone)
        torch.testing.assert_close(last[r], end)


def test_step_is_the_scan_one_token_at_a_time() -> None:
    x, dt, A, B, C, D, state = (t.detach().float() for t in inputs(2, 9))
    whole, last = ssd(x, dt, A, B, C, D, state)
    running = state.clone()
    steps = [ssd_step(x[:, t], dt[:, t], A, B[:, t], C[:, t], D, running) for t in range(9)]
    torch.testing.assert_close(torch.stack(steps, 1), whole)
    torch.testing.assert_close(running, last)


@pytest.mark.parametrize("scale", [10, 1000])
def test_huge_steps_stay_finite(scale: float) -> None:
    """exp(+large) above the diagonal would be inf, and inf * 0 is NaN."""
    x, dt, *rest = leaves(inputs(1, 130), torch.float32)
    tensors = leaves([x, dt * scale, *rest], torch.float32)
    compare(ssd, ssd_ref, tensors, 1e-4, segments_BT=documents(1, 130, 40))


def test_one_huge_step_leaves_the_digits_of_the_small_ones() -> None:
    x, dt, *rest = (t.detach() for t in inputs(1, 32, 1, 2, 1, 3))
    dt = dt * 0.01
    dt[:, 3] = 1e6
    compare(ssd, ssd_ref, leaves([x, dt, *rest], torch.float32), 2e-5)


def test_half_precision_activations() -> None:
    wide, half = torch.float32, torch.bfloat16
    tensors = leaves(inputs(1, 70, 2, 2, 1, 2), half, wide, wide, half, half, wide)
    y, state = ssd(*tensors)
    assert (y.dtype, state.dtype) == (half, wide)
    compare(ssd, ssd_ref, tensors, 3e-2)
