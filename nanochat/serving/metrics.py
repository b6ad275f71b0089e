"""What the server counts, for Prometheus. Labels come from routes, never from what clients send."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from starlette.types import ASGIApp, Message, Receive, Scope, Send

METHODS = frozenset({"GET", "HEAD", "POST", "DELETE", "OPTIONS"})
SECONDS = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
Stats = Callable[[], Mapping[str, Mapping[str, float]]]  # by model


class Metrics:
    """The figures of one server."""

    def __init__(self, stats: Stats) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "nanochat_http_requests", "HTTP requests", ("method", "route", "status"), registry=self.registry
        )
        self.seconds = Histogram(
            "nanochat_http_seconds", "from a request to the end of its answer", ("route",),
            buckets=SECONDS, registry=self.registry,
        )  # fmt: skip
        self.prompt_tokens = Counter("nanochat_prompt_tokens", "tokens of prompts", ("model",), registry=self.registry)
        self.cached_tokens = Counter(
            "nanochat_cached_tokens", "tokens of prompts that were read before", ("model",), registry=self.registry
        )
        self.completion_tokens = Counter(
            "nanochat_completion_tokens", "tokens of answers", ("model",), registry=self.registry
        )
        self.first_token = Histogram(
            "nanochat_first_token_seconds", "from a request to its first token", ("model",),
            buckets=SECONDS, registry=self.registry,
        )  # fmt: skip
        self.uploads = Counter("nanochat_uploads", "documents uploaded", ("status",), registry=self.registry)
        self.registry.register(_Scheduled(stats))

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self.registry)


class _Scheduled:
    """The schedulers' own figures, read when they are asked for."""

    def __init__(self, stats: Stats) -> None:
        self._stats = stats

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        families: dict[str, GaugeMetricFamily] = {}
        for model, figures in self._stats().items():
            for name, value in figures.items():
                full = f"nanochat_scheduler_{name}"
                family = families.setdefault(full, GaugeMetricFamily(full, f"scheduler: {name}", labels=["model"]))
                family.add_metric([model], float(value))
        return families.values()


class Measured:
    """Middleware: counts and times every request."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status, began = 499, time.perf_counter()  # the client left before its answer

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, watched)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            method = scope["method"] if scope["method"] in METHODS else "other"
            self.metrics.requests.labels(method, route, str(status)).inc()
            self.metrics.seconds.labels(route).observe(time.perf_counter() - began)
