"""The convolution's Triton kernels in the interpreter against the window-by-window oracle in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import compare, documents, leaves
from test_conv import inputs
from torch import Tensor

pytest.importorskip("triton")
from nanochat.errors import UsageError
from nanochat.kernels import triton_conv
from nanochat.kernels.conv import causal_conv, causal_conv_ref


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_KERNEL_CAUSAL_CONV", "triton")
    for name, value in {"BLOCK": 4, "BLOCK_BACKWARD": 2, "STRETCH": 4}.items():
        monkeypatch.setattr(triton_conv, name, value)


@pytest.mark.parametrize("n_time", [1, 2, 10])
@pytest.mark.parametrize("packed", [False, True])
def test_matches_the_oracle(n_time: int, packed: bool) -> None:
    options = {"segments_BT": documents(1, n_time, 3)} if packed else {}
    compare(causal_conv, causal_conv_ref, leaves(inputs(1, n_time, 3), torch.float32), 1e-5, **options)


@pytest.mark.parametrize("n_kernel", [1, 2, 3])
def test_fewer_taps_and_no_activation(n_kernel: int) -> None:
    tensors = leaves(inputs(1, 6, 3, n_kernel), torch.float32)
    if n_kernel == 1:  # no state to differentiate
        tensors = tensors[:3]
    compare(causal_conv, causal_conv_ref, tensors, 1e-5, activation=False)


def test_every_token_a_document() -> None:
    tensors = leaves(inputs(1, 7, 2), torch.float32)
    compare(causal_conv, causal_conv_ref, tensors, 1e-5, segments_BT=torch.arange(7)[None])


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.integers(1, 2), st.integers(1, 12), st.integers(1, 4), st.integers(1, 4), st.data())
def test_any_shape(n_batch: int, n_time: int, n_inner: int, n_kernel: int, data: st.DataObject) -> None:
    tensors = [x.detach().float() for x in inputs(n_batch, n_time, n_inner, n_kernel)]
    row = st.lists(st.integers(0, 1), min_size=n_time, max_size=n_time)
    segments = torch.tensor(data.draw(st.lists(row, min_size=n_batch, max_size=n_batch)))
    lengths = torch.tensor(data.draw(st.lists(st.integers(0, n_time), min_size=n_batch, max_size=n_batch)))
    got = causal_conv(*tensors, segments_BT=segments, lengths=lengths)
    wanted = causal_conv_ref(*tensors, segments_BT=segments, lengths=lengths)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_without_bias_and_state_on_a_view_in_half_precision() -> None:
    x, weight, _, _ = inputs(1, 9, 6)
    tensors = leaves([x, weight[:3]], torch.bfloat16, torch.float32)

    def run(op, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return op(x.chunk(2, -1)[1], weight)

    assert run(causal_conv, *tensors)[0].dtype == torch.bfloat16
    compare(lambda *t: run(causal_conv, *t), lambda *t: run(causal_conv_ref, *t), tensors, 1e-2)


def test_survives_compilation_without_a_graph_break() -> None:
    tensors = leaves(inputs(1, 5, 3), torch.float32)

    def loss(*x: Tensor) -> Tensor:
        y, state = causal_conv(*x)
        return y.square().sum() + state.square().sum()

    wanted = torch.autograd.grad(loss(*tensors), tensors)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*tensors), tensors)
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a, b)


def test_the_operator_keeps_its_contract() -> None:
    args = (*leaves(inputs(1, 5, 3), torch.float32), torch.zeros(1, 5, dtype=torch.int32), True)
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.nanochat.causal_conv, args, test_utils=utils)


def test_self_check() -> None:
    triton_conv.self_check(torch.device("cpu"))


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(UsageError, match=r"not torch\.float64"):
        causal_conv(*inputs(1, 2))
    with pytest.raises(UsageError, match="more than 4 taps"):
        causal_conv(*(x.float() for x in inputs(1, 2, 3, 5)))
