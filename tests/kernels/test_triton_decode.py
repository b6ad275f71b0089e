"""One token at a time in Triton's interpreter, against plain torch; states change in place."""

from importlib import import_module

import pytest
import torch
from test_conv import inputs as conv_inputs
from test_scan import inputs as scan_inputs
from test_ssd import inputs as ssd_inputs
from torch import Tensor

pytest.importorskip("triton")
from nanochat.kernels import dispatch, triton_decode
from nanochat.kernels.conv import CAUSAL_CONV_STEP
from nanochat.kernels.scan import SELECTIVE_SCAN_STEP
from nanochat.kernels.ssd import SSD_STEP


def first_token(tensors: list[Tensor], *over_time: int) -> list[Tensor]:
    return [(x[:, 0] if i in over_time else x).detach().float() for i, x in enumerate(tensors)]


def check(table, tensors: list[Tensor], at: int, *more: object) -> None:
    """`at`: which argument is the state."""
    results = []
    for name in ("triton", "torch"):
        own = [x.clone() for x in tensors]
        results.append((table[name](*own, *more), own[at]))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("n_inner", [5, 40])
def test_scan_step(fused: bool, n_inner: int) -> None:
    tensors = first_token(scan_inputs(2, 1, n_inner, 3), 0, 1, 3, 4)
    if fused:
        tensors += [torch.randn(n_inner), torch.randn(2, n_inner)]
    check(SELECTIVE_SCAN_STEP, tensors, 6)


@pytest.mark.parametrize("n_group", [1, 2])
def test_ssd_step(n_group: int) -> None:
    tensors = first_token(ssd_inputs(2, 1, 4, 19, n_group, 5), 0, 1, 3, 4)
    check(SSD_STEP, tensors, 6)


@pytest.mark.parametrize("activation", [False, True])
@pytest.mark.parametrize("n_kernel", [1, 2, 4, 6])
def test_conv_step(n_kernel: int, activation: bool) -> None:
    check(CAUSAL_CONV_STEP, first_token(conv_inputs(2, 1, 5, n_kernel), 0), 3, activation)


def test_conv_step_without_bias() -> None:
    x, weight, _, state = first_token(conv_inputs(2, 1), 0)
    own = state.clone()
    y = CAUSAL_CONV_STEP["triton"](x, weight, None, own)
    torch.testing.assert_close(y, CAUSAL_CONV_STEP["torch"](x, weight, None, state))
    torch.testing.assert_close(own, state)


def test_a_state_that_is_a_view_is_changed_all_the_same() -> None:
    tensors = first_token(scan_inputs(2, 1, 4, 3), 0, 1, 3, 4)
    strided = tensors[6].transpose(1, 2).contiguous().transpose(1, 2)
    assert not strided.is_contiguous()
    SELECTIVE_SCAN_STEP["triton"](*tensors[:6], strided)
    SELECTIVE_SCAN_STEP["torch"](*tensors)
    torch.testing.assert_close(strided, tensors[6])


def test_half_precision_activations_keep_a_float_state() -> None:
    u, delta, A, B, C, D, state = first_token(scan_inputs(2, 1, 4, 3), 0, 1, 3, 4)
    half = [x.to(torch.bfloat16) for x in (u, delta, B, C)]
    own = state.clone()
    y = SELECTIVE_SCAN_STEP["triton"](half[0], half[1], A, half[2], half[3], D, own)
    wanted = SELECTIVE_SCAN_STEP["torch"](half[0], half[1], A, half[2], half[3], D, state)
    assert (y.dtype, own.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(own, state)


def test_self_check() -> None:
    triton_decode.self_check(torch.device("cpu"))


def test_every_operation_that_is_dispatched_can_check_its_kernel() -> None:
    for name in dispatch.TRITON.values():
        assert callable(import_module(f"nanochat.kernels.{name}").self_check)
