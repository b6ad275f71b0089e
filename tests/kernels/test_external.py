"""Other packages' kernels: the calls that they would get (from stand-ins that compute what their documentation says),
and the race that decides between them and ours."""

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import compare, documents, leaves
from test_conv import inputs as conv_inputs
from test_scan import inputs as scan_inputs
from test_ssd import inputs as ssd_inputs
from torch import Tensor

from nanochat.errors import NanochatError, UsageError
from nanochat.kernels import external
from nanochat.kernels.conv import causal_conv, causal_conv_ref
from nanochat.kernels.scan import selective_scan, selective_scan_ref
from nanochat.kernels.ssd import ssd, ssd_ref


def provide(monkeypatch: pytest.MonkeyPatch, module: str, **functions: object) -> None:
    names = module.split(".")
    for i in range(1, len(names) + 1):
        name = ".".join(names[:i])
        monkeypatch.setitem(sys.modules, name, sys.modules.get(name) or ModuleType(name))
    for name, function in functions.items():
        setattr(sys.modules[module], name, function)


def selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state):
    """mamba_ssm's, with time last."""
    assert delta.dtype == u.dtype
    assert return_last_state
    delta = delta + (0 if delta_bias is None else delta_bias[:, None])
    delta = F.softplus(delta) if delta_softplus else delta
    u, delta, B, C = (x.transpose(1, 2) for x in (u, delta, B, C))
    y, last = selective_scan_ref(u, delta, A, B, C, D)
    y = y.transpose(1, 2)
    return (y if z is None else y * F.silu(z)), last


def causal_conv1d_fn(x, weight, bias, seq_idx, activation):
    y, _ = causal_conv_ref(x.transpose(1, 2), weight, bias, None, seq_idx, None, activation == "silu")
    return y.transpose(1, 2)


def mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, D, initial_states, seq_idx, return_final_states):
    assert return_final_states
    assert seq_idx is None or seq_idx.dtype == torch.int32
    return ssd_ref(x, dt, A, B, C, D, initial_states, seq_idx)


def chunk_simple_gla(q, k, v, g, scale, initial_state, output_final_state):
    """h_t = exp(g_t) h_{t-1} + k_t v_t^T, y_t = scale q_t h_t; the state is (B, H, K, V)."""
    assert output_final_state
    h, ys = initial_state, []
    for t in range(q.shape[1]):
        h = g[:, t, :, None, None].exp() * h + k[:, t, :, :, None] * v[:, t, :, None, :]
        ys.append(scale * (q[:, t, :, :, None] * h).sum(-2))
    return torch.stack(ys, 1), h


def test_scan_by_mamba_ssm(monkeypatch: pytest.MonkeyPatch) -> None:
    provide(monkeypatch, "mamba_ssm.ops.selective_scan_interface", selective_scan_fn=selective_scan_fn)
    monkeypatch.setenv("NANOCHAT_KERNEL_SELECTIVE_SCAN", "mamba_ssm")
    u, delta, A, B, C, D, state = scan_inputs(2, 7, 4, 3)
    gate = torch.randn(2, 7, 4, dtype=torch.float64)
    tensors = leaves([u, delta, A, B, C, D, D, gate], torch.float32)

    def output(op, *x: Tensor) -> Tensor:
        return op(*x[:6], None, None, None, *x[6:])[0]

    compare(lambda *x: output(selective_scan, *x), lambda *x: output(selective_scan_ref, *x), tensors, 1e-5)
    _, last = selective_scan(*tensors[:6])
    torch.testing.assert_close(last, selective_scan_ref(*tensors[:6])[1])
    with pytest.raises(NanochatError, match="no gradient: set NANOCHAT_KERNEL_SELECTIVE_SCAN=triton"):
        last.sum().backward()
    with pytest.raises(UsageError, match="no initial state"):
        selective_scan(u, delta, A, B, C, D, state)


@pytest.mark.parametrize("packed", [False, True])
def test_convolution_by_causal_conv1d(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    provide(monkeypatch, "causal_conv1d", causal_conv1d_fn=causal_conv1d_fn)
    monkeypatch.setenv("NANOCHAT_KERNEL_CAUSAL_CONV", "causal_conv1d")
    x, weight, bias, state = conv_inputs(2, 9, 8)
    tensors, segments = leaves([x, weight, bias], torch.float32), documents(2, 9, 3) if packed else None
    compare(causal_conv, causal_conv_ref, tensors, 1e-5, segments_BT=segments, lengths=torch.tensor([9, 2]))
    with pytest.raises(UsageError, match="no state"):
        causal_conv(x, weight, bias, state)
    with pytest.raises(UsageError, match="multiple of eight"):
        causal_conv(x[..., :3], weight[:3])


@pytest.mark.parametrize("package", ["mamba_ssm", "fla"])
def test_ssd(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    provide(monkeypatch, "mamba_ssm.ops.triton.ssd_combined", mamba_chunk_scan_combined=mamba_chunk_scan_combined)
    provide(monkeypatch, "fla.ops.simple_gla", chunk_simple_gla=chunk_simple_gla)
    monkeypatch.setenv("NANOCHAT_KERNEL_SSD", package)
    tensors, segments = leaves(ssd_inputs(2, 7, 4, 3, 2, 5), torch.float32), documents(2, 7, 3)
    compare(ssd, ssd_ref, tensors, 1e-5)
    if package == "fla":
        with pytest.raises(UsageError, match="documents"):
            ssd(*tensors, segments_BT=segments)
    else:
        compare(ssd, ssd_ref, tensors, 1e-5, segments_BT=segments)


def test_a_package_that_is_missing_comes_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "causal_conv1d", None)
    monkeypatch.setenv("NANOCHAT_KERNEL_CAUSAL_CONV", "causal_conv1d")
    with pytest.raises(UsageError, match="pip install --no-build-isolation causal-conv1d"):
        causal_conv(*conv_inputs(1, 2, 8)[:2])


# ---- the race


def ours(x: Tensor) -> tuple[Tensor, Tensor]:
    return x, x


def rival(x: Tensor) -> tuple[Tensor, Tensor]:
    return x + 0, x


def broken(x: Tensor) -> tuple[Tensor, Tensor]:
    return x + 1, x


def crashes(x: Tensor) -> tuple[Tensor, Tensor]:
    raise RuntimeError("no kernel image\nmore")


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> dict[object, float]:
    """What each implementation takes; the measured outputs are real."""
    table: dict[object, float] = {ours: 1.0, broken: 0.1, crashes: 0.1}
    monkeypatch.setattr(external, "_measure", lambda call, inputs: (call(*inputs)[0], table[call]))
    monkeypatch.setattr(external, "_winners", {})
    monkeypatch.setattr(external.importlib.util, "find_spec", lambda name: None if name == "absent" else object())
    return table


def winner(monkeypatch: pytest.MonkeyPatch, call, name: str = "rival", unfit: str = "") -> object:
    monkeypatch.setitem(external.RIVALS, "op", {name: lambda *inputs: unfit})
    return external.race("op", {name: call}, ours, (torch.ones(2),))


@pytest.mark.parametrize(("takes", "wins"), [(0.5, True), (0.95, False), (2.0, False)])
def test_only_a_clear_winner_is_taken(takes: float, wins: bool, seconds, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds[rival] = takes
    assert winner(monkeypatch, rival) is (rival if wins else ours)


def test_measured_once_and_told(seconds, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    seconds[rival] = 0.5
    with caplog.at_level("INFO", logger="nanochat"):
        assert winner(monkeypatch, rival) is rival
        seconds[rival] = 2.0  # is not asked again
        assert winner(monkeypatch, rival) is rival
    assert caplog.messages == ["kernel op for [2]: rival (ours 1000.00 ms; rival 500.00 ms)"]


@pytest.mark.parametrize(("call", "told"), [(broken, "but off by 1"), (crashes, "failed: no kernel image")])
def test_a_rival_that_is_wrong_or_crashes_is_not_taken(
    call, told: str, seconds, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="nanochat"):
        assert winner(monkeypatch, call) is ours
    assert told in caplog.text
    assert "more" not in caplog.text


def test_absent_or_unfit_rivals_do_not_run(seconds, monkeypatch: pytest.MonkeyPatch) -> None:
    assert winner(monkeypatch, crashes, name="absent") is ours
    external._winners.clear()
    assert winner(monkeypatch, crashes, unfit="knows no documents") is ours


def test_measuring_includes_the_backward_pass_and_leaves_the_inputs_alone() -> None:
    calls: list[bool] = []

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx, dy: Tensor) -> Tensor:
            calls.append(True)
            return dy

    x = torch.ones(3, requires_grad=True)
    y, took = external._measure(lambda x: (Probe.apply(x), x), (x,))
    assert len(calls) == 1 + external.RUNS
    assert x.grad is None
    assert took >= 0
    torch.testing.assert_close(y, torch.ones(3))
