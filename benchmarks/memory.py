"""The peak memory of one call: what the process (or the GPU) held at most, less what it held before."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_growth(fn: Callable[[], object], device: str = "cpu") -> float | None:
    """Bytes. On the CPU from the kernel's high-water mark, which is set back first; None where that cannot be (not on
    Linux). Call `fn` once before, so that what is built once is not counted."""
    gc.collect()
    if device.partition(":")[0] == "cuda":
        import torch  # what is measured on the CPU may know nothing of it

        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fn()
        torch.cuda.synchronize()
        return float(torch.cuda.max_memory_allocated() - before)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that the allocator kept would hide growth
    try:
        before = _status("VmRSS")
        CLEAR.write_text("5")
        fn()
        return float(max(0, _status("VmHWM") - before))
    except OSError:
        return None


def _status(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024
