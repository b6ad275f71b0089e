"""Gated RMSNorm, blocked and in Triton's interpreter, against the formulas in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import compare, leaves
from torch import Tensor

from nanochat.kernels import norm
from nanochat.kernels.norm import gated_rms_norm, gated_rms_norm_ref

OP, EPS = "gated_rms_norm", 1e-6


def inputs(*shape: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(shape[-1])
    return leaves([torch.randn(shape, generator=g), torch.randn(shape, generator=g) * 3], torch.float64)


@pytest.mark.parametrize("shape", [(1, 1, 8), (2, 13, 24), (0, 4, 8)])
@pytest.mark.parametrize("n_group", [1, 2])
def test_matches_the_oracle(
    shape: tuple[int, ...], n_group: int, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(norm, "BLOCK", 24 * 7)
    tensors = leaves(inputs(*shape), torch.float32)
    compare(lambda y, z: gated_rms_norm(y, z, n_group, EPS), lambda y, z: gated_rms_norm_ref(y, z, n_group, EPS),
            tensors, 1e-5)  # fmt: skip


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 40))
def test_any_shape(n_row: int, n_group: int, width: int) -> None:
    y, z = inputs(n_row, n_group * width)
    torch.testing.assert_close(gated_rms_norm(y, z, n_group, EPS), gated_rms_norm_ref(y, z, n_group, EPS))


def test_gradcheck() -> None:
    assert torch.autograd.gradcheck(lambda y, z: gated_rms_norm(y, z, 2, EPS), inputs(3, 6))


def test_the_oracle_is_torchs_own_norm() -> None:
    y, z = inputs(4, 12)
    gated = (y * F.silu(z)).view(4, 3, 4)
    torch.testing.assert_close(gated_rms_norm_ref(y, z, 3, EPS), F.rms_norm(gated, (4,), eps=EPS).flatten(1))


def test_half_precision_and_a_view(kernel: str) -> None:
    """z is a slice of a wider projection, as in the mixer."""
    y, z = leaves(inputs(2, 9, 16), torch.bfloat16)
    wide = F.pad(z.detach(), (5, 3)).requires_grad_()
    out = gated_rms_norm(y, wide[..., 5:21], 1, EPS)
    assert out.dtype == torch.bfloat16
    compare(lambda y, z: gated_rms_norm(y, z, 1, EPS), lambda y, z: gated_rms_norm_ref(y, z, 1, EPS), [y, z], 2e-2)
    torch.testing.assert_close(out, gated_rms_norm(y, z, 1, EPS))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # the interpreter's: 1 / inf is what is wanted
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e8])
def test_nothing_and_everything_stay_finite(size: float, kernel: str) -> None:
    tensors = [x.detach().mul(size).requires_grad_() for x in leaves(inputs(2, 8), torch.float32)]
    out = gated_rms_norm(*tensors, 1, EPS)
    assert all(x.isfinite().all() for x in (out, *torch.autograd.grad(out.sum(), tensors)))


def test_one_graph_and_a_well_formed_operator(kernel: str) -> None:
    tensors = leaves(inputs(2, 8), torch.float32)

    def run(y: Tensor, z: Tensor) -> Tensor:
        return gated_rms_norm(y, z, 2, EPS)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    results = [(out := op(*tensors), *torch.autograd.grad(out.square().sum(), tensors)) for op in (run, compiled)]
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)
    if kernel == "triton":
        torch.library.opcheck(torch.ops.nanochat.gated_rms_norm, (*tensors, 2, EPS))


def test_the_check_that_a_gpu_makes_passes() -> None:
    pytest.importorskip("triton")
    from nanochat.kernels import triton_norm

    triton_norm.self_check(torch.device("cpu"))
