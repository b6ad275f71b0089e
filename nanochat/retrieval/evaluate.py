"""Run a searcher over queries with judgements: how good, how fast, how much memory.

    evaluation = evaluate(kb, queries, qrels)        # anything with `search(query, k)`, or such a function
    print(evaluation.table())
    json.dumps(evaluation.record())
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np

from nanochat.errors import NanochatError, UsageError
from nanochat.intervals import Metric
from nanochat.retrieval.document import Hit
from nanochat.retrieval.metrics import DEFAULT_METRICS, Qrels, estimate, parse, per_query


class Searchable(Protocol):
    def search(self, queries: str, k: int = 5, /) -> list[Hit]: ...


Searcher: TypeAlias = Searchable | Callable[[str, int], Sequence[Hit]]
LATENCIES = (50, 90, 99)  # percentiles


@dataclass(frozen=True)
class Evaluation:
    """What was measured. `per_query` holds every metric's value for every query, for `metrics.difference`."""

    metrics: dict[str, Metric]
    per_query: dict[str, dict[str, float]]
    run: dict[str, list[str]] = field(repr=False)  # query -> document ids, best first
    n_queries: int
    n_empty: int  # queries that found nothing
    latency_ms: dict[str, float]  # p50, p90, p99, mean of one query at a time
    queries_per_s: float  # one at a time, one thread
    peak_memory_mb: float | None  # of this process while it searched; None where the system does not tell

    def record(self) -> dict[str, Any]:
        """All but the single queries, as JSON values."""
        return {
            "metrics": {name: asdict(value) for name, value in self.metrics.items()},
            "queries": self.n_queries,
            "empty": self.n_empty,
            "latency_ms": self.latency_ms,
            "queries_per_s": self.queries_per_s,
            "peak_memory_mb": self.peak_memory_mb,
        }

    def table(self) -> str:
        """Aligned text for people."""
        width = max(map(len, self.metrics), default=0)
        lines = [f"{'metric':<{width}}  value   95% interval       queries"]
        for name, e in self.metrics.items():
            lines.append(f"{name:<{width}}  {e.value:.4f}  {e.low:.4f} to {e.high:.4f}  {e.n:>7,}")
        latency = ", ".join(f"{name} {value:.2f}" for name, value in self.latency_ms.items())
        lines.append(f"\nlatency in ms: {latency}; {self.queries_per_s:,.0f} queries/s, one at a time")
        if self.peak_memory_mb is not None:
            lines.append(f"peak memory of the process: {self.peak_memory_mb:,.0f} MB")
        if self.n_empty:
            lines.append(f"{self.n_empty} of {self.n_queries} queries found nothing")
        return "\n".join(lines)


def evaluate(
    searcher: Searcher,
    queries: Mapping[str, str],
    qrels: Qrels,
    *,
    metrics: Sequence[str] = DEFAULT_METRICS,
    k: int | None = None,
    seed: int = 0,
) -> Evaluation:
    """Search each judged query for `k` hits (as many as the metrics need, 100 for those without @K) and measure.

    Passages of one document count as that document, at the place of the best. A first search, not timed, opens what
    is opened late. Raises UsageError for bad metrics, NanochatError when queries and judgements do not belong
    together."""
    judged = _judged(queries, qrels)
    k = k or _needed(metrics)
    search = searcher.search if hasattr(searcher, "search") else searcher
    search(queries[judged[0]], k)
    _forget_peak_memory()
    run, seconds = {}, []
    for query in judged:
        began = time.perf_counter()
        hits = search(queries[query], k)
        seconds.append(time.perf_counter() - began)
        run[query] = list(dict.fromkeys(hit.id for hit in hits))
    memory = peak_memory_mb()
    values = per_query({query: qrels[query] for query in judged}, run, metrics)
    return Evaluation(
        {name: estimate(list(v.values()), seed) for name, v in values.items()},
        values,
        run,
        len(judged),
        sum(not found for found in run.values()),
        latencies(seconds),
        len(seconds) / max(sum(seconds), 1e-9),
        memory,
    )


def _judged(queries: Mapping[str, str], qrels: Qrels) -> list[str]:
    """The judged queries; an unjudged one tells nothing."""
    missing = [query for query in qrels if query not in queries]
    if missing and len(missing) < len(qrels):
        raise NanochatError(f"{len(missing)} judged queries are not among the queries, such as {missing[0]!r}")
    if missing or not qrels:
        names = f": they are named {list(queries)[:2]}…, the judged ones {missing[:2]}…" if missing else ""
        raise NanochatError(f"none of the {len(queries)} queries has a relevance judgement{names}")
    return list(qrels)


def _needed(metrics: Sequence[str]) -> int:
    """Hits that the metrics look at."""
    depths = [parse(name)[1] for name in metrics]
    if not depths:
        raise UsageError("no metric was asked for")
    return max(100 if depth >= 2**31 else depth for depth in depths)


def latencies(seconds: Sequence[float]) -> dict[str, float]:
    """Percentiles and mean in milliseconds; a percentile is a time that was measured, never a mixture of two."""
    ordered = sorted(seconds)
    found = {f"p{p}": 1e3 * ordered[math.ceil(p / 100 * len(ordered)) - 1] for p in LATENCIES}
    return {**found, "mean": 1e3 * float(np.mean(ordered))}


def peak_memory_mb() -> float | None:
    """The most memory that this process held at once (resident), since `_forget_peak_memory` where that works."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    except (OSError, ValueError):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def _forget_peak_memory() -> None:
    """Linux only: let the peak begin now, so that building or loading before does not count."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
