"""Which implementation runs: what the user says, what the machine can do, and what a kernel's own check found."""

import logging
from types import SimpleNamespace

import pytest
import torch

from nanochat.errors import UsageError
from nanochat.kernels import dispatch

TABLE = {"plain": lambda: "plain", "triton": lambda: "triton"}
GPU = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16)


@pytest.fixture(autouse=True)
def _gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a recent GPU and Triton, a fresh process, and an operation `op` whose check always passes."""
    monkeypatch.setattr(dispatch, "decisions", {})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU")
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(dispatch.TRITON, "op", "triton_op")
    checks(monkeypatch, lambda device: None)


def checks(monkeypatch: pytest.MonkeyPatch, self_check) -> None:
    dispatch.triton_problem.cache_clear()
    dispatch.check_problem.cache_clear()
    module = SimpleNamespace(self_check=self_check)
    monkeypatch.setattr(dispatch.importlib, "import_module", lambda name: module)


def chosen(like=GPU, unfit: str = "") -> str:
    return dispatch.choose("op", TABLE, "plain", like, unfit)()


def test_on_a_cpu_the_default() -> None:
    assert chosen(torch.zeros(1)) == chosen(None) == "plain"


def test_on_a_gpu_the_checked_kernel_and_one_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="nanochat"):
        assert [chosen(), chosen()] == ["triton", "triton"]
    assert caplog.messages == ["kernel op: triton (checked on this GPU)"]


def test_the_check_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.device] = []
    checks(monkeypatch, calls.append)
    chosen(), chosen()
    assert calls == [GPU.device]


def test_the_check_has_gradients_also_where_the_first_use_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def self_check(device: torch.device) -> None:
        torch.ones(1, requires_grad=True).exp().backward()

    checks(monkeypatch, self_check)
    with torch.inference_mode():
        assert chosen() == "triton"


def test_a_kernel_that_fails_its_check_is_never_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(device: torch.device) -> None:
        raise AssertionError("result 0 is off by 0.3\nand more")

    checks(monkeypatch, fails)
    assert [chosen(), chosen()] == ["plain", "plain"]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "slow" in record.message
    assert "off by 0.3" in record.message
    assert "and more" not in record.message
    monkeypatch.setenv("NANOCHAT_KERNEL_OP", "triton")  # the user insists
    assert chosen() == "triton"


def test_an_old_gpu_and_a_missing_triton_are_warnings_with_a_remedy(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert chosen() == "plain"
    assert "compute capability 7.5, the kernels need 8.0" in caplog.text
    dispatch.triton_problem.cache_clear()
    dispatch.decisions.clear()
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None)
    assert chosen() == "plain"
    assert "pip install triton" in caplog.text


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_call_that_the_kernel_cannot_take(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    like = SimpleNamespace(device=GPU.device, dtype=dtype)
    unfit = "" if dtype == torch.float64 else "too wide"
    assert chosen(like, unfit) == "plain"
    assert ("float64" if dtype == torch.float64 else "too wide") in caplog.text


def test_the_variable_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_KERNEL_OP", "plain")
    assert chosen() == "plain"
    monkeypatch.setenv("NANOCHAT_KERNEL_OP", "best")
    with pytest.raises(UsageError, match=r"NANOCHAT_KERNEL_OP=best.*plain, triton"):
        chosen()


def test_triton_on_a_cpu_needs_its_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_KERNEL_OP", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert chosen(torch.zeros(1)) == "triton"
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(UsageError, match=r"NANOCHAT_KERNEL_OP=triton: .*TRITON_INTERPRET=1"):
        chosen(torch.zeros(1))
    with pytest.raises(UsageError, match="too wide"):
        chosen(unfit="too wide")
