"""The form in which every evaluation writes its figures: `{"metrics": {name: {value, n, low, high}}}`, and a table."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nanochat.errors import NanochatError
from nanochat.intervals import Metric


def write_metrics(path: str | Path, metrics: Mapping[str, Metric], **more: Any) -> Path:
    """Write `{"metrics": …, **more}` as JSON in one rename. Raises NanochatError when it cannot be written."""
    path = Path(path)
    record = {"metrics": {name: asdict(metric) for name, metric in metrics.items()}, **more}
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise NanochatError(f"could not write {path}: {error.strerror or error}") from error
    return path


def table(metrics: Mapping[str, Metric]) -> str:
    """The metrics as aligned text: name, value, interval, n."""
    rows = [("metric", "value", "95% interval", "n")]
    for name, m in metrics.items():
        interval = "" if m.low == m.high else f"{m.low:.4g} to {m.high:.4g}"
        rows.append((name, f"{m.value:.4g}", interval, f"{m.n:,}"))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:<{widths[2]}}  {d:>{widths[3]}}" for a, b, c, d in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
