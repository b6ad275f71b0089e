"""The GPU benchmark's cases on a CPU, at a size that takes no time: shapes, gradients, ratios, absent peers."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import kernels

ROOT = Path(__file__).parents[1]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> kernels.Machine:
    for name, value in {"E": 128, "N": 4, "N2": 8, "V": 50, "D": 8}.items():
        monkeypatch.setattr(kernels, name, value)
    return kernels.Machine(torch.device("cpu"), torch.float32, 1e9, 1e9, 1e9)


@pytest.mark.parametrize("part", kernels.PARTS)
def test_our_own_case_runs_forward_and_backward(part: str, machine: kernels.Machine) -> None:
    rows = {}
    for case in kernels.PARTS[part](machine, 8):
        row = kernels.measure(case, machine)
        rows[f"{case.op}/{case.name}"] = row
        if case.name in ("ours", "sdpa"):
            assert row["forward_ms"] > 0
            assert not case.inputs or row["backward_ms"] > 0
            assert "problem" not in row
    ratios = kernels.compare(rows, 8)
    for key, row in rows.items():
        op, name = key.split("/")
        if name not in ("ours", "sdpa"):
            assert (ratios[f"{op}_forward_vs_{name}"] is None) == ("problem" in row)
    if part == "scan":
        assert ratios["scan_forward_target"] == pytest.approx(0.9 * 8 / 32768 / ratios["scan_forward_ms"])


def test_our_own_failure_ends_the_benchmark_and_a_peers_does_not(machine: kernels.Machine) -> None:
    def broken() -> torch.Tensor:
        raise ValueError("first line\nsecond")

    assert kernels.measure(kernels.Case("conv", "peer", broken), machine)["problem"] == "ValueError: first line"
    with pytest.raises(ValueError, match="first line"):
        kernels.measure(kernels.Case("conv", "ours", broken), machine)


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would run")
def test_without_a_gpu_the_run_says_so() -> None:
    for command in ([sys.executable, "-m", "benchmarks.kernels"], ["bash", "runs/kernels_gpu.sh", "unused"]):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 1
        assert "no GPU" in done.stderr
    assert not (ROOT / "unused").exists()
