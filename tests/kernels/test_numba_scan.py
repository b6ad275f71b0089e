"""S6 in machine code: the float64 oracle, everything that the chunked scan can, and when it is chosen."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import LENGTHS, compare, documents, error, leaves
from test_numerics import DECAYS, STEPS, pick
from test_scan import inputs
from torch import Tensor

from nanochat.errors import UsageError
from nanochat.kernels import scan as scan_module
from nanochat.kernels.scan import NUMBA_LANES, SELECTIVE_SCAN, numba_problem, selective_scan, selective_scan_ref

pytest.importorskip("numba")
from nanochat.kernels import numba_scan

scan = SELECTIVE_SCAN["numba"]


@pytest.mark.parametrize("n_time", LENGTHS)
@pytest.mark.parametrize("packed", [False, True])
def test_matches_the_oracle(n_time: int, packed: bool) -> None:
    options = {"segments_BT": documents(2, n_time)} if packed else {}
    compare(scan, selective_scan_ref, leaves(inputs(2, n_time, 64, 4), torch.float32), 1e-6, **options)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 70), st.integers(1, 3), st.integers(1, 20), st.data())
def test_any_shape_documents_and_lengths(
    n_batch: int, n_time: int, n_block: int, n_state: int, data: st.DataObject
) -> None:
    tensors = leaves(inputs(n_batch, n_time, n_block * NUMBA_LANES, n_state), torch.float32)
    row = st.lists(st.integers(0, 2), min_size=n_time, max_size=n_time)
    segments = torch.tensor(data.draw(st.lists(row, min_size=n_batch, max_size=n_batch)))
    lengths = torch.tensor(data.draw(st.lists(st.integers(0, n_time), min_size=n_batch, max_size=n_batch)))
    inside = (torch.arange(n_time) < lengths[:, None])[..., None]

    def valid(run: Callable[..., Any]) -> Callable[..., Any]:
        def only(*tensors: Tensor) -> tuple[Tensor, Tensor]:
            y, state = run(*tensors, segments_BT=segments, lengths=lengths)
            return y * inside, state

        return only

    compare(valid(scan), valid(selective_scan_ref), tensors, 1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1 << 16), st.integers(1, 70))
def test_extreme_steps_and_decays(seed: int, n_time: int) -> None:
    u, delta, A, *rest = inputs(1, n_time, 32, 4)
    tensors = [u, pick(STEPS, delta.shape, seed), pick(DECAYS, A.shape, seed), *rest]
    compare(scan, selective_scan_ref, leaves(tensors, torch.float32), 1e-4)


def test_bias_and_gate() -> None:
    u, delta, *rest = leaves(inputs(2, 40, 32, 4), torch.float32)
    g = torch.Generator().manual_seed(1)
    bias, gate = torch.randn(32, generator=g), torch.randn(2, 40, 32, generator=g)

    def given_(run: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *x: run(*x[:-2], bias_E=x[-2], gate_BTE=x[-1])

    tensors = leaves([u, delta - 2, *rest, bias, gate], torch.float32)
    compare(given_(scan), given_(selective_scan_ref), tensors, 1e-6)


def test_half_precision_activations() -> None:
    wide, half = torch.float32, torch.bfloat16
    tensors = leaves(inputs(1, 33, 32, 3), half, wide, wide, half, half, wide)
    y, state = scan(*tensors)
    assert (y.dtype, state.dtype) == (half, wide)
    compare(scan, selective_scan_ref, tensors, 1e-2)


def test_the_exponential_has_no_bias() -> None:
    """A state that decays slowly for long sums up what each step gets wrong in the same direction."""
    n_time = 4096
    delta = 2e-3 * torch.rand(1, n_time, 32, generator=torch.Generator().manual_seed(0))  # roundings differ by step
    A = -torch.linspace(0.1, 5, 32)[:, None]
    u, one, state = torch.zeros(1, n_time, 32), torch.ones(1, n_time, 1), torch.ones(1, 32, 1)
    tensors = (u, delta, A, one, one, torch.zeros(32), state)
    exact = selective_scan_ref(*(x.double() for x in tensors))[0]
    assert error(scan(*tensors)[0], exact) < 2 * error(selective_scan_ref(*tensors)[0], exact) < 1e-5


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30, 0.0])
@pytest.mark.parametrize("which", range(2))
def test_extreme_inputs_are_not_hidden(value: float, which: int) -> None:
    tensors = [x.detach().float() for x in inputs(1, 20, 32, 2)]
    tensors[which][0, 7, 3] = value
    found, wanted = scan(*tensors), SELECTIVE_SCAN["chunked"](*tensors)
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("wrong", ["delta", "A", "B", "C", "D", "state"])
def test_shapes_that_do_not_fit_are_refused(wrong: str) -> None:
    tensors = [x.detach().float() for x in inputs(2, 8, 64, 2)]
    _, delta, A, B, C, D, state = tensors
    short = {
        "delta": delta[..., :32], "A": A[:32], "B": B[:, :5], "C": C.repeat(1, 1, 2), "D": D[:32],
        "state": state[:, :32],
    }  # fmt: skip
    i = ["u", *short].index(wrong)
    tensors[i] = short[wrong]
    with pytest.raises(RuntimeError):
        scan(*tensors)


def test_torch_s_defaults_do_not_matter() -> None:
    tensors = [x.detach().float() for x in inputs(1, 8, 32, 2)]
    wanted = scan(*tensors)
    for dtype in (torch.float64, torch.bfloat16):
        try:
            torch.set_default_dtype(dtype)
            found = scan(*tensors)
        finally:
            torch.set_default_dtype(torch.float32)
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, wanted))


def test_growth_without_bound_is_infinite() -> None:
    u, delta, A, *rest = (x.detach().float() for x in inputs(1, 8, 32, 2))
    state = scan(u, delta, A.abs() * 1e4, *rest)[1]
    assert not state.isfinite().any()


def test_threads_do_not_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> list[Tensor]:
        tensors = leaves(inputs(2, 100, 96, 16), torch.float32)
        y, state = scan(*tensors)
        return [y, state, *torch.autograd.grad((y.sum() + state.sum()), tensors)]

    wanted = run()
    for n in (1, 2, 5, 64):
        monkeypatch.setattr(numba_scan.torch, "get_num_threads", lambda n=n: n)
        assert all(torch.equal(a, b) for a, b in zip(run(), wanted))


def test_chosen_for_training_on_a_cpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    for name in ("numba", "chunked"):
        monkeypatch.setitem(SELECTIVE_SCAN, name, lambda *x, name=name: taken.append(name))
    fit, odd = ([x.float().detach() for x in inputs(1, 5, width, 2)] for width in (32, 31))
    exact = [x.double() for x in fit]
    for tensors, training, name in (
        (fit, True, "numba"),
        (fit, False, "chunked"),
        (odd, True, "chunked"),
        (exact, True, "chunked"),
    ):
        selective_scan(*(x.clone().requires_grad_(training) for x in tensors))
        assert taken.pop() == name
    with torch.no_grad():
        selective_scan(*(x.clone().requires_grad_() for x in fit))
    assert taken.pop() == "chunked"
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        scan_module._has_numba.cache_clear()
        selective_scan(*(x.clone().requires_grad_() for x in fit))
        assert taken.pop() == "chunked"
    with monkeypatch.context() as patch:  # an installation that is broken
        patch.setitem(sys.modules, "numba", None)
        scan_module._has_numba.cache_clear()
        selective_scan(*(x.clone().requires_grad_() for x in fit))
        assert taken.pop() == "chunked"
    scan_module._has_numba.cache_clear()


def test_what_it_cannot_take_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_KERNEL_SELECTIVE_SCAN", "numba")
    with pytest.raises(UsageError, match="SELECTIVE_SCAN=numba: it takes multiples of 32 channels, not 31"):
        selective_scan(*(x.float() for x in inputs(1, 5, 31, 2)))
    with pytest.raises(UsageError, match="float32, not in float64"):
        selective_scan(*inputs(1, 5, 32, 2))
    assert "for the CPU" in numba_problem(torch.empty(1, 5, 32, device="meta"))
    monkeypatch.setattr(scan_module, "_has_numba", lambda: False)
    with pytest.raises(UsageError, match=r"pip install 'nanochat\[cpu\]'"):
        selective_scan(*(x.float() for x in inputs(1, 5, 32, 2)))
