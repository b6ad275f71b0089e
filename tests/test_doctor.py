"""The command `doctor`: it runs what a run would run, names the kernels, and gives a command for what is missing."""

import pytest
import torch

from nanochat import doctor
from nanochat.kernels import dispatch

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.fixture(autouse=True)
def _complete(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that lacks nothing."""
    monkeypatch.setattr(doctor, "find_spec", lambda name: object())
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/" + name)
    monkeypatch.setattr(torch.version, "cuda", "12.8")


def test_every_operation_that_ran_is_named_with_its_alternatives(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dispatch, "decisions", {})
    monkeypatch.setenv("NANOCHAT_KERNEL_SSD", "ref")
    doctor.main(["--device=cpu", "--dtype=float32"])
    out = capsys.readouterr().out
    lines = {line.split()[0]: line for line in out.splitlines() if "others:" in line}
    assert set(lines) == set(doctor.KERNELS)
    assert "ref       by NANOCHAT_KERNEL_SSD; others: chunked, fla, mamba_ssm, triton" in lines["ssd"]
    assert "shifted   others: causal_conv1d, ref, triton" in lines["causal_conv"]
    assert out.splitlines()[-1].endswith("all is well")


def test_nothing_missing_no_advice() -> None:
    assert list(doctor.advice(CUDA)) == list(doctor.advice(CPU)) == []


def test_a_gpu_that_torch_cannot_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert [line.split(": ")[-1] for line in doctor.advice(CPU)] == ["pip install --force-reinstall torch"]
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)  # no such GPU
    assert list(doctor.advice(CPU)) == []


@pytest.mark.parametrize(("platform", "package"), [("linux", "triton"), ("win32", "triton-windows")])
def test_a_gpu_without_triton(platform: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.sys, "platform", platform)
    monkeypatch.setattr(doctor, "find_spec", lambda name: None if name == "triton" else object())
    assert [line.split(": ")[-1] for line in doctor.advice(CUDA)] == [f"pip install {package}"]


def test_a_cpu_without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_spec", lambda name: None if name == "numba" else object())
    assert [line.split(": ")[-1] for line in doctor.advice(CPU)] == ["pip install 'nanochat[cpu]'"]
    assert list(doctor.advice(CUDA)) == []


def test_a_gpu_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert [line.split(": ")[-1] for line in doctor.advice(CUDA)] == ["sudo apt-get install gcc"]
    monkeypatch.setenv("CC", "/opt/bin/cc")
    assert list(doctor.advice(CUDA)) == []


def test_optional_parts_in_one_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_spec", lambda name: None if name in ("tantivy", "wandb") else object())
    assert [line.split(": ")[-1] for line in doctor.advice(CPU)] == ["pip install 'nanochat[rag,wandb]'"]
