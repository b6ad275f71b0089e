"""What every benchmark prints: a table, and one JSON line last. Each module here measures one claim of the README.

    python -m benchmarks.decode [--peer PATH]      PATH: a checkout of karpathy/nanochat to measure in the same run
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

SHARED = Path(__file__).parents[2] / "shared" / "data"  # public collections beside the checkout


def report(benchmark: str, rows: list[dict[str, Any]], ratios: Mapping[str, float | None]) -> None:
    """Print the rows and ratios as tables, then all as one line of JSON."""
    from nanochat.runtime import machine

    print(table(rows))
    if ratios:
        print("\n" + table([{"ratio": name, "value": value} for name, value in ratios.items()]))
    record = {"benchmark": benchmark, "machine": {**machine(), "load": load()}, "rows": rows, "ratios": ratios}
    print("\n" + json.dumps(record, default=str), flush=True)


def table(rows: list[dict[str, Any]]) -> str:
    """Aligned columns; a row may lack some."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *([show(row.get(name, "")) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    numeric = [all(isinstance(row.get(name, 0), int | float) for row in rows) for name in names]
    return "\n".join(
        "  ".join(cell.rjust(w) if right else cell.ljust(w) for cell, w, right in zip(line, widths, numeric)).rstrip()
        for line in cells
    )


def show(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def time_best(fn: Callable[[], object], repeats: int = 5) -> float:
    """Seconds of the fastest of `repeats` calls, after one to warm up."""
    fn()
    gc.collect()
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        fn()
        best = min(best, time.perf_counter() - began)
    return best


def load() -> float:
    """Runnable processes in the last minute. Above 1 on a quiet benchmark, others were using the machine."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else 0.0


def run_peer(driver: str, peer: str | Path, arguments: list[str], timeout: float = 900.0) -> list[dict[str, Any]]:
    """Run `benchmarks/peers/<driver>.py PEER ARGUMENTS...` in a process of its own, whose `nanochat` is the peer's.

    Returns the JSON objects that it printed, one a line. Raises RuntimeError with the end of its output when it fails.
    """
    script = Path(__file__).parent / "peers" / f"{driver}.py"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, str(script), str(peer), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment,
        cwd="/",  # not here, where our own nanochat would be found first
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{script} failed with {done.returncode}:\n{done.stderr[-2000:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
