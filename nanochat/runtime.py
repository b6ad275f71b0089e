"""Where a run executes: device, dtype, ranks, threads, seeds, logging, and what the machine is.

`setup` is called once by a command, before a model is built. It answers in one log line which device and dtype it took
and why. Nothing here knows about models, data or files other than `out_root`.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import os
import platform
import random
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from nanochat.errors import NanochatError, UsageError

log = logging.getLogger("nanochat")

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}

LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")

T = TypeVar("T", torch.Tensor, float, int)


@dataclass(frozen=True)
class Runtime:
    """What `setup` decided. `dtype` is the compute dtype; master weights stay fp32 in training."""

    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    reason: str = ""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def needs_scaler(self) -> bool:
        """fp16 has too little range for gradients: the loss is scaled (Micikevicius et al. 2018)."""
        return self.dtype == torch.float16


def setup(
    device: str = "auto", dtype: str = "auto", seed: int = 0, threads: int = 0, inference: bool = False
) -> Runtime:
    """Choose device and dtype, join the other ranks, set threads and seeds, configure the log.

    device: auto (cuda > mps > cpu), cpu, mps, cuda or cuda:N. dtype: auto or a key of `DTYPES`. threads: CPU threads
    of this process, 0 = all cores shared among the local ranks. inference: dtype auto is fp32 on a CPU, since decoding
    is limited by the bytes of the weights, which `engine.quantize` chooses. Raises UsageError for a device or dtype
    that is unknown or not present, NanochatError when the ranks cannot meet.
    """
    rank, local_rank, world_size = _ranks()
    start_log(rank)
    chosen, device_reason = _choose_device(device, local_rank, world_size)
    chosen_dtype, dtype_reason = _choose_dtype(dtype, chosen, inference)
    reason = f"device {chosen} ({device_reason}), dtype {str(chosen_dtype)[6:]} ({dtype_reason})"
    _set_threads(threads)
    _set_matmul_precision(chosen)
    if chosen.type == "cpu":
        _keep_freed_memory()
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if world_size > 1 and not dist.is_initialized():
        _join(chosen)
        reason += f", {world_size} ranks"
    set_seed(seed)
    log.info("%s, %d threads", reason, torch.get_num_threads())
    return Runtime(chosen, chosen_dtype, rank, local_rank, world_size, reason)


def finish() -> None:
    """Leave the process group, if there is one. Call at the end of a command: all leave together, since a rank that
    ends while another still works was once seen to abort. After an error nobody waits."""
    if dist.is_available() and dist.is_initialized():
        if sys.exc_info()[0] is None:
            dist.barrier()
        dist.destroy_process_group()


# ---- device and dtype


def _ranks() -> tuple[int, int, int]:
    """(rank, local rank, world size) from the environment that torchrun sets."""
    try:
        return tuple(int(os.environ.get(name, default)) for name, default in _RANK_VARIABLES)  # type: ignore[return-value]
    except ValueError as error:
        raise UsageError(f"RANK, LOCAL_RANK and WORLD_SIZE must be integers ({error}); start with torchrun") from None


_RANK_VARIABLES = (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"))


def _choose_device(name: str, local_rank: int, world_size: int) -> tuple[torch.device, str]:
    if name == "auto":
        if torch.cuda.is_available():
            device, reason = torch.device("cuda", local_rank), "auto: found " + torch.cuda.get_device_name(local_rank)
        elif torch.backends.mps.is_available() and world_size == 1:
            device, reason = torch.device("mps"), "auto: found an Apple GPU"
        else:
            device, reason = torch.device("cpu"), "auto: no GPU that this torch can use"
        return device, reason
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda", "mps"):
        raise UsageError(f"--device {name}: expected auto, cpu, mps, cuda or cuda:N")
    if device.type == "cuda":
        n = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = local_rank if device.index is None else device.index
        if index >= n:
            raise UsageError(f"--device {name}: this torch sees {n} CUDA devices; use --device auto or cpu")
        device = torch.device("cuda", index)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError("--device mps: this torch has no Apple GPU; use --device auto or cpu")
    return device, "as asked"


def _choose_dtype(name: str, device: torch.device, inference: bool = False) -> tuple[torch.dtype, str]:
    if name != "auto":
        if name not in DTYPES:
            raise UsageError(f"--dtype {name}: expected auto, {', '.join(DTYPES)}")
        if device.type == "cpu" and DTYPES[name] == torch.bfloat16 and not cpu_has_bf16():
            log.warning("bfloat16 as asked, but this CPU has no bf16 instructions: up to 100x slower than fp32")
        if device.type == "cpu" and DTYPES[name] == torch.float16:
            log.warning("float16 as asked, but torch has no fast fp16 matmul on CPU: expect it to be very slow")
        return DTYPES[name], "as asked"
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) >= (8, 0):
            return torch.bfloat16, "the GPU has native bf16"
        return torch.float16, "the GPU has no native bf16; gradients are scaled"
    if device.type == "mps":
        return torch.float32, "the safe choice on Apple GPUs"
    if inference:
        return torch.float32, "the rule for inference on a CPU; --quantize makes it faster"
    if cpu_has_bf16():
        return torch.bfloat16, "the CPU has bf16 matmul instructions"
    return torch.float32, "the CPU has no bf16 matmul instructions"


@functools.cache
def cpu_has_bf16() -> bool:
    """Whether bf16 matmul is native: AVX512_BF16 or AMX on x86, BF16 on Arm. Elsewhere it is emulated, 100x slower.

    Read from /proc/cpuinfo: torch's own tests are private and differ by version, and mkldnn says yes to emulation.
    """
    words = set(_cpuinfo("flags").split()) | set(_cpuinfo("Features").split())
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})


def _set_matmul_precision(device: torch.device) -> None:
    """TF32 on CUDA. On CPUs with AVX512_BF16 but no AMX, `medium` routes fp32 products to oneDNN, measured at twice
    MKL's speed on AMD and as accurate (4e-7); with AMX it would round to bf16, elsewhere it changes nothing."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    else:
        flags = set(_cpuinfo("flags").split())
        precision = "medium" if "avx512_bf16" in flags and "amx_bf16" not in flags else "highest"
        torch.set_float32_matmul_precision(precision)


def _set_threads(threads: int) -> None:
    if threads < 0:
        raise UsageError(f"--threads {threads}: expected 0 (all cores) or a positive number")
    n_local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if threads == 0 and n_local > 1:  # torchrun sets OMP_NUM_THREADS=1, which would leave cores idle
        threads = max(1, n_cores() // n_local)
    if threads:
        torch.set_num_threads(threads)


@functools.cache
def _keep_freed_memory() -> bool:
    """Tell glibc to keep what is freed, up to 1 GB, for the next allocation; whether it was told.

    By default a freed tensor of some megabytes goes back to the system, and the next one costs a page fault for every
    4 KB of it: 7,200 faults and a tenth of the time in a training step of the quickstart's model. Tensors from 128 MB
    on still go back.
    """
    if not sys.platform.startswith("linux") or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    trim_threshold, mmap_threshold = -1, -3  # the parameters' numbers in malloc.h
    kept = mallopt(mmap_threshold, 128 << 20) or mallopt(mmap_threshold, 32 << 20)  # the most that older ones take
    return bool(kept and mallopt(trim_threshold, 1 << 30))


def n_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---- ranks


def _join(device: torch.device) -> None:
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(
            backend,
            timeout=timedelta(minutes=30),
            device_id=device if backend == "nccl" else None,
        )
    except (RuntimeError, ValueError) as error:
        raise NanochatError(
            f"the ranks could not meet ({backend}): {error}; start with torchrun --standalone --nproc_per_node=N -m ..."
        ) from error


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def all_reduce_sum(value: T) -> T:
    """The sum over ranks: a tensor is summed in place and returned, a number comes back as a number (float64)."""
    if not dist.is_initialized():
        return value
    if isinstance(value, torch.Tensor):
        dist.all_reduce(value)
        return value
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    total = torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float64, device=device)
    dist.all_reduce(total)
    return type(value)(total.item())


# ---- log


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to whatever sys.stderr is at the time, so that redirections and captures made later are honoured."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


class _Plain(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        message = super().format(record)
        return message if record.levelno <= logging.INFO else f"{record.levelname.lower()}: {message}"


def start_log(rank: int | None = None) -> None:
    """Rank 0 logs from INFO on (or $NANOCHAT_LOG), the others from ERROR on; to stderr, once. `setup` calls this; a
    command that has no use for a device calls it alone. rank None: the one that torchrun gave."""
    rank = _ranks()[0] if rank is None else rank
    if not any(isinstance(handler, _Stderr) for handler in log.handlers):
        handler = _Stderr()
        handler.setFormatter(_Plain())
        log.addHandler(handler)
    level = os.environ.get("NANOCHAT_LOG", "INFO").upper()
    if level not in LOG_LEVELS:
        raise UsageError(f"NANOCHAT_LOG={level}: expected one of {', '.join(LOG_LEVELS)}")
    log.setLevel(level if rank == 0 else logging.ERROR)


@contextlib.contextmanager
def warnings_only() -> Iterator[None]:
    """The log holds warnings and errors only, unless $NANOCHAT_LOG says what it holds: for conversations, where its
    lines would stand between the words."""
    before = log.level
    if "NANOCHAT_LOG" not in os.environ:
        log.setLevel(max(before, logging.WARNING))
    try:
        yield
    finally:
        log.setLevel(before)


def print0(*values: object, sep: str = " ", end: str = "\n") -> None:
    """`print` on rank 0 only: for a command's result, not for its log."""
    if rank() == 0:
        print(*values, sep=sep, end=end, flush=True)


# ---- randomness


def set_seed(seed: int) -> None:
    """Seed python, numpy and torch (every device) alike on every rank; ranks differ by the data they take."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rng_state() -> dict[str, Any]:
    """The state of every global generator, as numbers, lists and tensors that a checkpoint can hold."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": {"version": version, "words": list(words), "gauss": gauss},
        "numpy": {"name": name, "keys": keys, "position": position, "has_gauss": has_gauss, "cached": cached},
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Undo to the moment of `rng_state`. A saved CUDA state is ignored where there is no CUDA."""
    python, numpy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"]), python["gauss"]))
    keys = np.asarray(numpy["keys"], dtype=np.uint32)
    np.random.set_state((numpy["name"], keys, numpy["position"], numpy["has_gauss"], numpy["cached"]))
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


# ---- the machine


def peak_memory_bytes(device: torch.device | str = "cpu") -> int:
    """Peak so far: allocated on the GPU for a CUDA device, otherwise the resident set of this process."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def out_root() -> Path:
    """Where runs live: $NANOCHAT_OUT, or `out` in the current directory."""
    return Path(os.environ.get("NANOCHAT_OUT") or "out")


def run_path(out_dir: str | Path | None, run: str) -> Path:
    """The directory of a run. Raises UsageError for a name that would lead elsewhere than right below `out_dir`."""
    if run in ("", ".", "..") or Path(run).name != run:
        raise UsageError(f"--run {run!r}: expected a name without slashes; --out_dir says where runs lie")
    return Path(out_dir or out_root()) / run


def machine() -> dict[str, Any]:
    """What a benchmark must state about where it ran."""
    facts: dict[str, Any] = {
        "cpu": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "cores": n_cores(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_bf16": cpu_has_bf16(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        facts |= {"gpu": properties.name, "gpu_memory": properties.total_memory, "cuda": torch.version.cuda}
    return facts


@functools.cache
def _cpuinfo(key: str) -> str:
    """The first value of a key in /proc/cpuinfo, "" where there is no such file or key."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                name, _, value = line.partition(":")
                if name.strip() == key:
                    return value.strip()
    except OSError:
        pass
    return ""
