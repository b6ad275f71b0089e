"""SSD's Triton kernels in the interpreter against the sequential oracle in float64. Chunks are short: it is slow."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import compare, documents, leaves
from test_ssd import cut, inputs
from torch import Tensor

pytest.importorskip("triton")
from nanochat.kernels import triton_ssd
from nanochat.kernels.ssd import ssd, ssd_ref


@pytest.fixture(autouse=True)
def _short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_KERNEL_SSD", "triton")
    monkeypatch.setattr(triton_ssd, "FORWARD_CHUNK", 64)  # halved for float32
    monkeypatch.setattr(triton_ssd, "BACKWARD_CHUNK", 32)


@pytest.mark.parametrize("n_time", [1, 16, 17, 70])
@pytest.mark.parametrize("packed", [False, True])
def test_matches_the_oracle(n_time: int, packed: bool) -> None:
    options = {"segments_BT": documents(2, n_time)} if packed else {}
    compare(ssd, ssd_ref, leaves(inputs(2, n_time, 2, 3, 1), torch.float32), 1e-5, **options)


@pytest.mark.parametrize(("heads", "blocks"), [((6, 3), 16), ((4, 1), 1), ((3, 1), 2)])
def test_heads_shared_among_programs(heads: tuple[int, int], blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups, several heads a program, several programs a group, and states in parts."""
    monkeypatch.setattr(triton_ssd, "HEADS_FORWARD", 2)
    monkeypatch.setattr(triton_ssd, "HEADS_BACKWARD", 2)
    monkeypatch.setattr(triton_ssd, "STATE_PROGRAMS", blocks)
    compare(ssd, ssd_ref, leaves(inputs(1, 20, heads[0], 17, heads[1], 40), torch.float32), 1e-5)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(st.integers(1, 2), st.integers(1, 40), st.data())
def test_any_shape(n_batch: int, n_time: int, data: st.DataObject) -> None:
    tensors = [x.float() for x in inputs(n_batch, n_time, 1, 2, 1, 3)]
    firsts = data.draw(st.lists(st.integers(0, n_time), max_size=4))
    segments = (torch.arange(n_time)[:, None] >= torch.tensor([*firsts, n_time])).sum(1).expand(n_batch, -1)
    lengths = torch.tensor(data.draw(st.lists(st.integers(0, n_time), min_size=n_batch, max_size=n_batch)))
    y, state = ssd(*tensors, segments_BT=segments, lengths=lengths)
    wanted, wanted_state = ssd_ref(*tensors, segments_BT=segments, lengths=lengths)
    valid = torch.arange(n_time) < lengths[:, None]
    torch.testing.assert_close(y[valid], wanted[valid], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, wanted_state, rtol=1e-4, atol=1e-5)


def test_state_carries_over_a_cut() -> None:
    tensors = [x.float() for x in inputs(2, 50, 2, 3, 1)]
    every = slice(None)
    whole, last = ssd(*tensors)
    y1, middle = ssd(*cut(tensors, every, slice(0, 21)), tensors[-1])
    y2, end = ssd(*cut(tensors, every, slice(21, None)), middle)
    torch.testing.assert_close(torch.cat((y1, y2), 1), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(end, last, rtol=1e-4, atol=1e-5)


def test_views_and_half_precision() -> None:
    """x, B and C are slices of one tensor, as in the mixer; the steps stay in float32."""
    x, dt, A, B, C, D, state = (t.detach() for t in inputs(1, 40, 2, 4, 1, 8))
    wide = torch.cat((x.flatten(2), B.flatten(2), C.flatten(2)), -1).to(torch.bfloat16)

    def parts(wide: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, B, C = wide.split((8, 8, 8), -1)
        return x.unflatten(-1, (2, 4)), B.unflatten(-1, (1, 8)), C.unflatten(-1, (1, 8))

    def run(op, wide: Tensor, dt: Tensor, A: Tensor, D: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        x, B, C = parts(wide)
        return op(x, dt, A, B, C, D, state)

    tensors = leaves([wide, dt, A, D, state], torch.bfloat16, torch.float32)
    y, last = run(ssd, *tensors)
    assert (y.dtype, last.dtype) == (torch.bfloat16, torch.float32)
    compare(lambda *t: run(ssd, *t), lambda *t: run(ssd_ref, *t), tensors, 2e-2)


@pytest.mark.parametrize("scale", [30, 10000])
def test_huge_steps_stay_finite(scale: float) -> None:
    x, dt, *rest = leaves(inputs(1, 40, 2, 3, 1), torch.float32)
    tensors = leaves([x, dt * scale, *rest], torch.float32)
    compare(ssd, ssd_ref, tensors, 1e-4, segments_BT=documents(1, 40, 10))


def test_one_huge_step_leaves_the_digits_of_the_small_ones() -> None:
    x, dt, *rest = (t.detach() for t in inputs(1, 32, 1, 2, 1, 3))
    dt = dt * 0.01
    dt[:, 3] = 1e6
    compare(ssd, ssd_ref, leaves([x, dt, *rest], torch.float32), 2e-5)


def test_two_runs_give_the_same_bits_and_torch_compile_sees_one_graph() -> None:
    tensors = leaves(inputs(1, 20, 2, 3, 1), torch.float32)
    segments = documents(1, 20)

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        return ssd(*tensors, segments_BT=segments)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    results = [(*(y := op(*tensors)), *torch.autograd.grad(y[0].sum() + y[1].sum(), tensors)) for op in (run, compiled)]
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_the_operator_is_well_formed() -> None:
    tensors = leaves(inputs(1, 3, 1, 2, 1), torch.float32)
    torch.library.opcheck(torch.ops.nanochat.ssd, (*tensors, None))


def test_the_check_that_a_gpu_makes_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(triton_ssd, "STATE_PROGRAMS", 1)
    triton_ssd.self_check(torch.device("cpu"))
