"""What a completion holds, in OpenAI's shapes: choices, log-probabilities, usage, and our timings."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from nanochat.engine.batching import Event, Request, Ticket
from nanochat.engine.generate import Completion
from nanochat.serving.errors import ApiError
from nanochat.serving.metrics import Metrics
from nanochat.serving.models import Served
from nanochat.tokenizer import Tokenizer

LEAST_LOGPROB = -9999.0  # JSON has no infinity
REASONS = {"stop": "stop", "length": "length", "deadline": "length"}


@dataclass
class Choice:
    """One completion as its events come."""

    index: int
    text: list[str] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[list[tuple[int, float]]] = field(default_factory=list)
    finish_reason: str = ""

    def add(self, event: Event) -> None:
        """Raises ApiError (500, 503) when it ended without an answer."""
        self.text.append(event.text)
        self.ids += event.ids
        self.logprobs += event.logprobs
        self.top += event.top_logprobs
        if not event.finish_reason:
            return
        if event.finish_reason == "error":
            raise ApiError(500, "the model failed on this request", code="generation_failed")
        if event.finish_reason == "cancelled":
            raise ApiError(503, "the server is shutting down", code="shutting_down", retry_after=5)
        if event.finish_reason == "deadline" and not self.ids:
            raise ApiError(503, "the server did not come to this request in time", code="timeout", retry_after=5)
        self.finish_reason = REASONS[event.finish_reason]

    def completion(self) -> Completion:
        return Completion(self.ids, "".join(self.text), self.logprobs, self.finish_reason)


def submit(served: Served, requests: Sequence[Request]) -> list[Ticket]:
    """All of them, or none. Raises UsageError and Overloaded as `Scheduler.submit`."""
    tickets: list[Ticket] = []
    try:
        for request in requests:
            tickets.append(served.scheduler.submit(request))
    except BaseException:
        for ticket in tickets:
            ticket.cancel()
        raise
    return tickets


def head(prefix: str, kind: str, served: Served) -> dict[str, Any]:
    """How every answer begins."""
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": served.name}


def usage(tickets: Sequence[Ticket]) -> dict[str, Any]:
    prompt = sum(ticket.usage.prompt for ticket in tickets)
    completion = sum(ticket.usage.completion for ticket in tickets)
    cached = sum(ticket.usage.cached for ticket in tickets)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def timings(tickets: Sequence[Ticket]) -> dict[str, float | None]:
    """Seconds from the arrival of the request, and the speed after the first token."""
    if not tickets:
        return {"queued": 0.0, "first_token": None, "total": 0.0, "tokens_per_second": None}
    of = [ticket.timings for ticket in tickets]
    queued = max(t.queued or 0.0 for t in of)
    first = min((t.first_token for t in of if t.first_token is not None), default=None)
    total = max(t.total or 0.0 for t in of)
    n = sum(ticket.usage.completion for ticket in tickets)
    speed = (n - 1) / (total - first) if first is not None and total > first else None
    return {"queued": queued, "first_token": first, "total": total, "tokens_per_second": speed}


def count(metrics: Metrics, served: Served, tickets: Sequence[Ticket]) -> None:
    """Into the metrics, whether the answer came to its end or not."""
    for ticket in tickets:
        metrics.prompt_tokens.labels(served.name).inc(ticket.usage.prompt)
        metrics.cached_tokens.labels(served.name).inc(ticket.usage.cached)
        metrics.completion_tokens.labels(served.name).inc(ticket.usage.completion)
        if ticket.timings.first_token is not None:
            metrics.first_token.labels(served.name).observe(ticket.timings.first_token)


# ---- log-probabilities


def chat_logprobs(
    tokenizer: Tokenizer, ids: Sequence[int], logprobs: Sequence[float], top: Sequence[Sequence[tuple[int, float]]]
) -> dict[str, Any]:
    """Of chat completions; the end of the answer is no part of it."""
    content = []
    for i, (token, logprob) in enumerate(zip(ids, logprobs)):
        if token in (tokenizer.eot, tokenizer.bos):
            continue
        others = [_token(tokenizer, other, value) for other, value in top[i]] if i < len(top) else []
        content.append({**_token(tokenizer, token, logprob), "top_logprobs": others})
    return {"content": content, "refusal": None}


def text_logprobs(
    tokenizer: Tokenizer,
    ids: Sequence[int],
    logprobs: Sequence[float],
    top: Sequence[Sequence[tuple[int, float]]],
    offset: int = 0,
) -> dict[str, Any]:
    """Of text completions. `offset`: characters of the tokens before."""
    made: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for i, (token, logprob) in enumerate(zip(ids, logprobs)):
        if token in (tokenizer.eot, tokenizer.bos):
            continue
        text = tokenizer.decode([token])
        made["tokens"].append(text)
        made["token_logprobs"].append(max(logprob, LEAST_LOGPROB))
        best = top[i] if i < len(top) else []
        made["top_logprobs"].append({tokenizer.decode([t]): max(v, LEAST_LOGPROB) for t, v in best})
        made["text_offset"].append(offset)
        offset += len(text)
    return made


def _token(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    data = tokenizer.decode_bytes([token])
    return {"token": data.decode("utf-8", "replace"), "logprob": max(logprob, LEAST_LOGPROB), "bytes": list(data)}
