"""Runtime: device and dtype choices and their reasons, seeds, ranks, log."""

import logging
import os
import platform
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from nanochat import runtime
from nanochat.errors import UsageError


@pytest.fixture(autouse=True)
def restore_globals():
    state, precision, threads = runtime.rng_state(), torch.get_float32_matmul_precision(), torch.get_num_threads()
    level, handlers = runtime.log.level, list(runtime.log.handlers)
    yield
    runtime.set_rng_state(state)
    torch.set_float32_matmul_precision(precision)
    torch.set_num_threads(threads)
    runtime.log.setLevel(level)
    runtime.log.handlers[:] = handlers


def test_cpu_dtype_follows_the_instructions_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for has, dtype, why in ((True, torch.bfloat16, "has bf16"), (False, torch.float32, "has no bf16")):
        monkeypatch.setattr(runtime, "cpu_has_bf16", lambda has=has: has)
        chosen = runtime.setup("cpu")
        assert (chosen.device.type, chosen.dtype) == ("cpu", dtype)
        assert why in chosen.reason
        assert not chosen.needs_scaler


@pytest.mark.parametrize(
    ("flags", "native"),
    [("fpu avx2 avx512f", False), ("avx512f avx512_bf16", True), ("amx_bf16 amx_tile", True), ("fp asimd bf16", True)],
)
def test_bf16_is_read_from_the_flags(monkeypatch: pytest.MonkeyPatch, flags: str, native: bool) -> None:
    monkeypatch.setattr(runtime, "_cpuinfo", lambda key: flags)
    runtime.cpu_has_bf16.cache_clear()
    try:
        assert runtime.cpu_has_bf16() is native
    finally:
        runtime.cpu_has_bf16.cache_clear()


@pytest.mark.parametrize(
    ("capability", "dtype", "scaler"), [((9, 0), torch.bfloat16, False), ((7, 5), torch.float16, True)]
)
def test_gpu_dtype_follows_its_capability(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype, scaler: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    chosen, _ = runtime._choose_dtype("auto", torch.device("cuda", 0))
    assert chosen == dtype
    assert runtime.Runtime(torch.device("cuda", 0), chosen).needs_scaler is scaler


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"device": "gpu"}, "--device gpu: expected auto, cpu, mps, cuda"),
        ({"device": "cuda:99"}, "--device cuda:99: this torch sees .* devices"),
        ({"device": "cpu", "dtype": "fp8"}, "--dtype fp8: expected auto, float32"),
        ({"device": "cpu", "threads": -1}, "--threads -1"),
    ],
)
def test_wrong_calls(call: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        runtime.setup(**call)


def test_a_slow_choice_is_obeyed_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(runtime, "cpu_has_bf16", lambda: False)
    assert runtime.setup("cpu", "bf16").dtype == torch.bfloat16
    assert "no bf16 instructions" in caplog.text


def test_seeds_and_states() -> None:
    def draw() -> tuple:
        return random.random(), random.gauss(0, 1), float(np.random.randn()), torch.randn(3).tolist()

    runtime.set_seed(3)
    first, state, second = draw(), runtime.rng_state(), draw()
    runtime.set_rng_state(state)
    assert draw() == second
    runtime.set_seed(3)
    assert draw() == first


def test_threads_and_one_log_line(capsys: pytest.CaptureFixture[str]) -> None:
    runtime.setup("cpu", threads=1)
    runtime.setup("cpu", threads=1)
    assert torch.get_num_threads() == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2  # one a call: handlers do not pile up
    assert lines[0].startswith("device cpu (as asked), dtype ")
    runtime.log.warning("careful")
    runtime.print0("the", "result")
    out, err = capsys.readouterr()
    assert (out, err) == ("the result\n", "warning: careful\n")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator of glibc")
def test_freed_tensors_cost_no_page_faults_again() -> None:
    code = """if True:
        import resource, torch
        from nanochat import runtime
        runtime.setup("cpu", threads=1)
        for _ in range(40):  # glibc's aligned allocation takes some to come to the same places again
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            torch.ones(12 << 20)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100  # 12,288 pages each


def test_other_ranks_are_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime.start_log(1)
    assert not runtime.log.isEnabledFor(logging.WARNING)
    monkeypatch.setenv("NANOCHAT_LOG", "chatty")
    with pytest.raises(UsageError, match="NANOCHAT_LOG=CHATTY"):
        runtime.start_log(0)


def test_without_ranks() -> None:
    t = torch.ones(2)
    assert runtime.all_reduce_sum(t) is t
    assert (runtime.all_reduce_sum(3), runtime.rank(), runtime.world_size()) == (3, 0, 1)
    runtime.barrier()
    runtime.finish()


def test_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = runtime.machine()
    assert facts["torch"] == torch.__version__
    assert facts["cores"] >= 1
    before = runtime.peak_memory_bytes()
    assert 50e6 < before < 1e12
    assert np.ones(30_000_000).all()
    assert runtime.peak_memory_bytes() >= before
    monkeypatch.delenv("NANOCHAT_OUT", raising=False)
    assert runtime.out_root() == Path("out")
    monkeypatch.setenv("NANOCHAT_OUT", "/x")
    assert runtime.out_root() == Path("/x")


RANK = """
import torch
from nanochat import runtime
rt = runtime.setup("cpu", seed=7)
values = [runtime.all_reduce_sum(torch.tensor([rt.rank + 1.0])).item(), runtime.all_reduce_sum(rt.rank + 1),
          runtime.all_reduce_sum(0.5), runtime.world_size(), torch.rand(1).item()]
runtime.barrier()
print(rt.rank, values)
runtime.finish()
"""


def test_two_ranks_meet_and_sum() -> None:
    """As torchrun starts them; both have the same seed, each its share of the cores."""
    shared = {**os.environ, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    shared["MASTER_PORT"] = str(29500 + os.getpid() % 2000)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK],
            env={**shared, "RANK": str(i), "LOCAL_RANK": str(i)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    values = [out.split(" ", 1)[1] for out, _ in outputs]
    assert values[0] == values[1]
    assert values[0].startswith("[3.0, 3, 1.0, 2, ")
    assert "2 ranks" in outputs[0][1]
    assert "device" not in outputs[1][1]
