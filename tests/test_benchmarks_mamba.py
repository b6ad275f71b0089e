"""The benchmarks of Mamba measure what they say, at sizes that take no time."""

import sys
import types
from typing import Any

import pytest
import torch

from benchmarks import architectures, mamba, memory
from nanochat.model.attention import KVState


def test_peak_growth_sees_what_a_call_held() -> None:
    def hold() -> int:
        return torch.ones(30 << 18).numel()  # 30 MB

    found = memory.peak_growth(hold)
    if sys.platform == "linux" and found is not None:
        assert 25e6 < found < 60e6


def test_calls_are_timed_in_turns() -> None:
    order: list[str] = []
    found = mamba.time_all({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2)
    assert order == ["a", "b"] * 3
    assert all(0 <= seconds < 1 for seconds in found.values())


def test_errors_are_those_of_the_kernels() -> None:
    _, ratios = mamba.measure_errors(1, length=24)
    assert set(ratios) == {"s6_error", "s6_gradient_error", "ssd_error", "ssd_gradient_error"}
    for name, value in ratios.items():
        assert value is not None
        assert 0 < value < (1e-5 if "gradient" in name else 3e-7), name


@pytest.mark.parametrize("letter", ["T", "M", "M2"])
def test_a_block_learns_and_decodes_behind_a_context(letter: str) -> None:
    block = mamba.mixer(letter)
    mamba.training(block, 8)()
    assert all(p.grad is None for p in block.parameters())
    mamba.decoding(letter, 33, 2, 2)()


def test_ratios_of_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mamba, "time_all", lambda calls, n: dict(zip(calls, (8.0, 2.0, 4.0))))
    rows, ratios = mamba.measure_decode(1, cases=((2048, 1), (64, 2)))
    assert ratios == {"decode_m_2k": 4.0, "decode_m2_2k": 2.0, "decode_m_64_b2": 4.0, "decode_m2_64_b2": 2.0}
    assert len(rows) == 6


def test_peers_are_optional(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("mambapy", "mambapy.mamba", "transformers", "transformers.models.mamba.modeling_mamba"):
        monkeypatch.setitem(sys.modules, name, None)  # type: ignore[arg-type]
    assert mamba.mambapy_block() is None
    assert mamba.hf_mixers() == {}
    assert capsys.readouterr().out.count("not installed") == 2


def test_mambapys_scan_is_the_same_function_as_ours() -> None:
    pytest.importorskip("mambapy")
    scan = mamba.mambapy_scan()
    assert scan is not None
    inputs = mamba.s6_inputs(16)
    expected = mamba.gradients(lambda *x: mamba.selective_scan(*x)[0], inputs)
    for found, wanted in zip(mamba.gradients(scan, inputs), expected):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("pattern", ["mamba", "mamba2", "hybrid", "1in8"])
def test_patterns_hold_equally_many_parameters(pattern: str) -> None:
    wanted = architectures.sized(architectures.config_at_equal_size("transformer", 8, 128, 64))
    config = architectures.config_at_equal_size(pattern, 8, 128, 64)
    assert abs(architectures.sized(config) / wanted - 1) < 0.01
    assert config.mlp_t == 4.0


def small(*patterns: str) -> dict[str, Any]:
    return {name: architectures.config_at_equal_size(name, 2, 64, 64) for name in patterns}


def test_speed_and_memory_of_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(architectures, "CLAIMED", 16)
    models, cpu = small("transformer", "mamba"), torch.device("cpu")
    measured: dict[str, Any] = {}
    for part in (architectures.training, architectures.prefill, architectures.decode):
        rows, found = part(models, [8, 16], cpu)
        assert [row["pattern"] for row in rows] == ["transformer", "mamba"] * 2
        assert all(row["tok/s"] > 0 for row in rows)
        measured |= found
    state = measured["state"]
    assert state["mamba"][8] == state["mamba"][16]
    assert state["transformer"][16] > 1.9 * state["transformer"][8]
    ratios = architectures.claims(measured, list(models))
    assert {"training_mamba", "inference_mamba", "state_mamba"} <= set(ratios)
    assert ratios["state_mamba"] == state["mamba"][16] / state["transformer"][16]


def test_states_behind_a_context() -> None:
    model = architectures.built(small("1in2")["1in2"], torch.device("cpu"))
    _, states = architectures.behind(model, 40, 3)
    assert [state.lengths for state in states if isinstance(state, KVState)] == [[40]]
    architectures.one_token(model, states)()
    assert [state.lengths for state in states if isinstance(state, KVState)] == [[41]]


def test_bits_per_byte_between_evaluations() -> None:
    log = [{"time": 1.0, "val_bpb": 4.0}, {"time": 3.0, "val_bpb": 2.0}]
    assert [architectures.bpb_at(log, t) for t in (0.5, 1.0, 2.0, 3.0, 9.0)] == [4.0, 4.0, 3.0, 2.0, 2.0]


def test_what_architectures_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--steps=2", "--rows=2", "--sequence_len=32", "--vocab_size=400", "--passkey", "64", "--eval_tokens=512"]
    args = architectures.arguments().parse_args([*flags, "--data=world:seed=0,known=10,wordings=4"])
    rows, ratios = architectures.quality(small("transformer", "mamba2"), args)
    assert set(ratios) == {"bpb_mamba2"}
    names = {row["what"] for row in rows}
    assert {"val_bpb", "val_bpb_equal_time", "nats_at_64_127", "passkey_64", "nats_beyond_minus_within"} <= names


def test_commands_have_help(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (mamba, architectures):
        assert isinstance(module, types.ModuleType)
        monkeypatch.setattr(sys, "argv", [module.__name__, "--help"])
        with pytest.raises(SystemExit) as stopped:
            module.main()
        assert stopped.value.code == 0
    assert "--passkey" in capsys.readouterr().out
