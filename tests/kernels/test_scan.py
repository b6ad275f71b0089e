"""S6: the chunked scan against the sequential oracle in float64, and everything that a caller may split or pack."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import LENGTHS, compare, documents, leaves
from torch import Tensor

from nanochat.errors import UsageError
from nanochat.kernels.scan import SELECTIVE_SCAN, selective_scan, selective_scan_ref, selective_scan_step


def inputs(n_batch: int, n_time: int, n_inner: int, n_state: int) -> list[Tensor]:
    """u, delta, A, B, C, D, state in float64, with the magnitudes of a trained layer."""
    g = torch.Generator().manual_seed(n_time)
    u, B, C, D, state = (
        torch.randn(shape, generator=g, dtype=torch.float64)
        for shape in (
            (n_batch, n_time, n_inner),
            (n_batch, n_time, n_state),
            (n_batch, n_time, n_state),
            (n_inner,),
            (n_batch, n_inner, n_state),
        )
    )
    delta = torch.rand(n_batch, n_time, n_inner, generator=g, dtype=torch.float64)
    A = -torch.arange(1, n_state + 1, dtype=torch.float64) * (0.5 + torch.rand(n_inner, 1, generator=g))
    return [x.requires_grad_() for x in (u, delta, A, B, C, D, state)]


@pytest.mark.parametrize("n_time", LENGTHS)
@pytest.mark.parametrize("packed", [False, True])
def test_matches_the_oracle(n_time: int, packed: bool) -> None:
    options = {"segments_BT": documents(2, n_time)} if packed else {}
    compare(selective_scan, selective_scan_ref, leaves(inputs(2, n_time, 6, 4), torch.float32), 1e-5, **options)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 70), st.integers(1, 5), st.integers(1, 5), st.data())
def test_any_shape(n_batch: int, n_time: int, n_inner: int, n_state: int, data: st.DataObject) -> None:
    exact = inputs(n_batch, n_time, n_inner, n_state)
    row = st.lists(st.integers(0, 2), min_size=n_time, max_size=n_time)
    segments = torch.tensor(data.draw(st.lists(row, min_size=n_batch, max_size=n_batch)))
    lengths = torch.tensor(data.draw(st.lists(st.integers(1, n_time), min_size=n_batch, max_size=n_batch)))
    y, state = selective_scan(*exact, segments_BT=segments, lengths=lengths)
    wanted, wanted_state = selective_scan_ref(*exact, segments_BT=segments, lengths=lengths)
    valid = torch.arange(n_time) < lengths[:, None]
    torch.testing.assert_close(y[valid], wanted[valid])
    torch.testing.assert_close(state, wanted_state)


def test_gradcheck() -> None:
    torch.manual_seed(0)
    segments = torch.tensor([[0, 0, 1, 1, 2] * 4])
    lengths = torch.tensor([18])
    assert torch.autograd.gradcheck(
        lambda *x: selective_scan(*x, segments_BT=segments, lengths=lengths), inputs(1, 20, 2, 2)
    )


@pytest.mark.parametrize("cut", [1, 16, 31])
def test_state_carries_over_a_cut(cut: int) -> None:
    u, delta, A, B, C, D, state = inputs(2, 70, 4, 3)
    whole, last = selective_scan(u, delta, A, B, C, D, state)
    y1, middle = selective_scan(u[:, :cut], delta[:, :cut], A, B[:, :cut], C[:, :cut], D, state)
    y2, end = selective_scan(u[:, cut:], delta[:, cut:], A, B[:, cut:], C[:, cut:], D, middle)
    torch.testing.assert_close(torch.cat((y1, y2), 1), whole)
    torch.testing.assert_close(end, last)


def test_packed_documents_are_separate_documents() -> None:
    u, delta, A, B, C, D, _ = inputs(1, 60, 4, 3)
    segments = torch.repeat_interleave(torch.arange(4), torch.tensor([25, 1, 3, 31]))[None]
    packed, last = selective_scan(u, delta, A, B, C, D, segments_BT=segments)
    for n in range(4):
        part = (segments == n)[0]
        y, state = selective_scan(u[:, part], delta[:, part], A, B[:, part], C[:, part], D)
        torch.testing.assert_close(packed[:, part], y)
    torch.testing.assert_close(last, state)


def test_padding_changes_nothing() -> None:
    u, delta, A, B, C, D, state = inputs(3, 40, 4, 3)
    lengths = torch.tensor([40, 1, 17])
    y, last = selective_scan(u, delta, A, B, C, D, state, lengths=lengths)
    for row, n in enumerate(lengths.tolist()):
        r = slice(row, row + 1)
        alone, end = selective_scan(u[r, :n], delta[r, :n], A, B[r, :n], C[r, :n], D, state[r])
        torch.testing.assert_close(y[r, :n], alone)
        torch.testing.assert_close(last[r], end)


def test_step_is_the_scan_one_token_at_a_time() -> None:
    u, delta, A, B, C, D, state = (x.detach().float() for x in inputs(2, 9, 4, 3))
    whole, last = selective_scan(u, delta, A, B, C, D, state)
    running = state.clone()
    steps = [selective_scan_step(u[:, t], delta[:, t], A, B[:, t], C[:, t], D, running) for t in range(9)]
    torch.testing.assert_close(torch.stack(steps, 1), whole)
    torch.testing.assert_close(running, last)


def test_huge_steps_keep_their_digits() -> None:
    """Where products of decays underflow, a log-space formulation returns nonsense; this one must not."""
    u, delta, *rest = leaves(inputs(1, 64, 4, 4), torch.float32)
    compare(selective_scan, selective_scan_ref, leaves([u, delta * 40, *rest], torch.float32), 1e-5)


def test_half_precision_activations() -> None:
    wide, half = torch.float32, torch.bfloat16
    tensors = leaves(inputs(1, 33, 4, 3), half, wide, wide, half, half, wide)
    y, state = selective_scan(*tensors)
    assert (y.dtype, state.dtype) == (half, wide)
    compare(selective_scan, selective_scan_ref, tensors, 1e-2)


def test_implementation_by_name(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    args = inputs(1, 5, 2, 2)
    with caplog.at_level("INFO", logger="nanochat"):
        monkeypatch.setenv("NANOCHAT_KERNEL_SELECTIVE_SCAN", "ref")
        first, _ = selective_scan(*args)
        selective_scan(*args)
    assert [m for m in caplog.messages if "selective_scan: ref" in m] == caplog.messages[:1]
    torch.testing.assert_close(first, SELECTIVE_SCAN["chunked"](*args)[0])
    monkeypatch.setenv("NANOCHAT_KERNEL_SELECTIVE_SCAN", "fastest")
    with pytest.raises(UsageError, match=r"_SELECTIVE_SCAN=fastest.*chunked, mamba_ssm, numba, ref, triton"):
        selective_scan(*args)
