"""Numbers and boundaries that break kernels: huge and vanishing steps, A near 0, empty and one-token documents."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import test_conv
import test_scan
import test_ssd
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import compare, leaves
from torch import Tensor

from nanochat.kernels.attention import attention, attention_ref
from nanochat.kernels.conv import causal_conv, causal_conv_ref
from nanochat.kernels.scan import selective_scan, selective_scan_ref
from nanochat.kernels.ssd import ssd, ssd_ref


class Recurrence(NamedTuple):
    fast: Callable[..., Any]
    oracle: Callable[..., Any]
    inputs: Callable[[int, int], list[Tensor]]  # batch, time -> x, steps, A, B, C, D, state
    extreme: float  # tolerance with steps of 10,000, which multiply roundings


RECURRENCES = {
    "selective_scan": Recurrence(selective_scan, selective_scan_ref, lambda b, t: test_scan.inputs(b, t, 3, 4), 1e-4),
    "ssd": Recurrence(ssd, ssd_ref, lambda b, t: test_ssd.inputs(b, t, 2, 3, 1, 4), 1e-3),
}
STEPS = [0.0, 1e-30, 1e-6, 1e-2, 1.0, 30.0, 1e4]
DECAYS = [0.0, -1e-38, -1e-20, -1e-4, -1.0, -16.0, -1e4]


@pytest.fixture(params=RECURRENCES)
def op(request: pytest.FixtureRequest) -> Recurrence:
    return RECURRENCES[request.param]


@pytest.fixture(params=["default", "triton"])
def n_time(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """How long a row is: short in Triton's interpreter, which is slow."""
    if request.param == "default":
        return 70
    pytest.importorskip("triton")
    for name in RECURRENCES:
        monkeypatch.setenv(f"NANOCHAT_KERNEL_{name.upper()}", "triton")
    return 10


def pick(values: list[float], shape: torch.Size, seed: int) -> Tensor:
    """A tensor of randomly chosen values."""
    g = torch.Generator().manual_seed(seed)
    return torch.tensor(values, dtype=torch.float64)[torch.randint(len(values), shape, generator=g)]


@pytest.mark.parametrize("seed", [0, 1])
def test_extreme_steps_and_decays_in_one_row(op: Recurrence, seed: int, n_time: int) -> None:
    x, dt, A, *rest = (t.detach() for t in op.inputs(1, n_time))
    tensors = leaves([x, pick(STEPS, dt.shape, seed), pick(DECAYS, A.shape, seed), *rest], torch.float32)
    compare(op.fast, op.oracle, tensors, op.extreme)


def test_a_state_that_never_decays_is_a_sum(op: Recurrence, n_time: int) -> None:
    x, dt, A, *rest = (t.detach() for t in op.inputs(1, n_time))
    compare(op.fast, op.oracle, leaves([x, dt, A * 1e-30, *rest], torch.float32), 1e-5)


DOCUMENTS = {
    "every token": lambda t: t,
    "empty ones between": lambda t: t * 3 + 7,
    "numbers that go down": lambda t: -(t // 4),
    "one": lambda t: t * 0,
}


@pytest.fixture(params=DOCUMENTS)
def number(request: pytest.FixtureRequest) -> Callable[[Tensor], Tensor]:
    """The document of each token."""
    return DOCUMENTS[request.param]


def test_documents(op: Recurrence, number: Callable[[Tensor], Tensor], n_time: int) -> None:
    segments = number(torch.arange(n_time)[None])
    # 1e-4: where the gradient of A nearly cancels, little is left of it to be relative to
    compare(op.fast, op.oracle, leaves(op.inputs(1, n_time), torch.float32), 1e-4, segments_BT=segments)


def test_documents_of_attention_and_convolution(number: Callable[[Tensor], Tensor]) -> None:
    segments = number(torch.arange(40)[None])
    g = torch.Generator().manual_seed(0)
    heads = leaves([torch.randn(1, 40, 2, 8, generator=g) for _ in range(3)], torch.float32)
    compare(attention, attention_ref, heads, 3e-5, segments_BT=segments)
    compare(causal_conv, causal_conv_ref, leaves(test_conv.inputs(1, 40), torch.float32), 1e-5, segments_BT=segments)


def test_rows_of_no_tokens_leave_the_state_alone(op: Recurrence, n_time: int) -> None:
    tensors, lengths = leaves(op.inputs(3, n_time), torch.float32), torch.tensor([0, n_time, 0])
    _, state = op.fast(*tensors, lengths=lengths)
    assert torch.equal(state[::2], tensors[-1][::2])
    torch.testing.assert_close(state, op.oracle(*tensors, lengths=lengths)[1], rtol=1e-4, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(sorted(RECURRENCES)), st.integers(1, 2), st.integers(1, 80), st.data())
def test_fuzzed_steps_decays_documents_and_lengths(name: str, n_batch: int, n_time: int, data: st.DataObject) -> None:
    op = RECURRENCES[name]
    x, dt, A, *rest = (t.detach() for t in op.inputs(n_batch, n_time))
    seed = data.draw(st.integers(0, 1 << 16))
    tensors = leaves([x, pick(STEPS, dt.shape, seed), pick(DECAYS, A.shape, seed), *rest], torch.float32)
    documents = st.lists(st.integers(0, 2), min_size=n_time, max_size=n_time)
    segments = torch.tensor([data.draw(documents) for _ in range(n_batch)]).cumsum(1)
    lengths = torch.tensor(data.draw(st.lists(st.integers(0, n_time), min_size=n_batch, max_size=n_batch)))
    inside = (torch.arange(n_time) < lengths[:, None]).view(n_batch, n_time, *[1] * (x.dim() - 2))

    def valid(run: Callable[..., Any]) -> Callable[..., Any]:
        def only(*tensors: Tensor) -> tuple[Tensor, Tensor]:
            y, state = run(*tensors, segments_BT=segments, lengths=lengths)
            return y * inside, state  # what stands behind a row's end is nobody's

        return only

    compare(valid(op.fast), valid(op.oracle), tensors, op.extreme)
