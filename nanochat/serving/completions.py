"""POST /v1/completions: texts continued, streamed or whole."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse

from nanochat.engine import batching
from nanochat.engine.batching import Ticket
from nanochat.serving import answers
from nanochat.serving.answers import Choice
from nanochat.serving.chat import LEFT, check_n
from nanochat.serving.errors import from_exception
from nanochat.serving.models import Served, Service, client_of, service_of
from nanochat.serving.schema import CompletionRequest
from nanochat.serving.streams import DONE, EventStream, events, frame, unless_left
from nanochat.serving.strict import StrictRoute

router = APIRouter(route_class=StrictRoute)


@router.post("/v1/completions", response_model=None)
async def create(
    request: Request, body: CompletionRequest, service: Annotated[Service, Depends(service_of)]
) -> Response:
    """Continuations of one text or several."""
    served = service.model(body.model)
    check_n((body.n or 1) * len(body.prompts()), service)
    tickets = await service.run(prepare, served, body, client_of(request), service.settings.max_seconds)
    if body.stream:
        return EventStream(stream(service, served, body, tickets), tickets)
    record = await unless_left(request, whole(service, served, body, tickets))
    return Response(status_code=LEFT) if record is None else JSONResponse(record)


def prepare(served: Served, body: CompletionRequest, client: str, seconds: float) -> list[Ticket]:
    """A ticket for each text. Raises UsageError for one that is too long, Overloaded."""
    sampling, tokenizer = body.sampling(), served.chat.tokenizer
    return answers.submit(
        served,
        [
            batching.Request(
                tokenizer.encode(text, bos=True), sampling, body.n or 1, client, seconds,
                top_logprobs=body.logprobs or 0,
            )
            for text in body.prompts()
        ],
    )  # fmt: skip


async def whole(
    service: Service, served: Served, body: CompletionRequest, tickets: Sequence[Ticket]
) -> dict[str, Any]:
    """All continuations in one piece."""
    n = body.n or 1
    choices = [Choice(i) for i in range(n * len(tickets))]
    try:
        async with aclosing(events(tickets)) as arriving:
            async for number, event in arriving:
                choices[number * n + event.index].add(event)
    finally:
        answers.count(service.metrics, served, tickets)
    record = answers.head("cmpl", "text_completion", served)
    found = [
        {
            "index": choice.index,
            "text": "".join(choice.text),
            "logprobs": _logprobs(served, body, choice),
            "finish_reason": choice.finish_reason,
        }
        for choice in choices
    ]
    return record | {"choices": found, "usage": answers.usage(tickets), "timings": answers.timings(tickets)}


async def stream(
    service: Service, served: Served, body: CompletionRequest, tickets: Sequence[Ticket]
) -> AsyncGenerator[bytes, None]:
    """The continuations piece by piece."""
    record, n = answers.head("cmpl", "text_completion", served), body.n or 1
    choices = [Choice(i) for i in range(n * len(tickets))]
    try:
        async with aclosing(events(tickets)) as arriving:
            async for number, event in arriving:
                choice = choices[number * n + event.index]
                start = len(choice.ids)
                choice.add(event)
                logprobs = _logprobs(served, body, choice, start)
                if event.text or choice.finish_reason or logprobs is not None:
                    reason = choice.finish_reason or None
                    piece = {"index": choice.index, "text": event.text, "logprobs": logprobs, "finish_reason": reason}
                    yield frame({**record, "choices": [piece]})
        if body.stream_options is not None and body.stream_options.include_usage:
            more = {"usage": answers.usage(tickets), "timings": answers.timings(tickets)}
            yield frame({**record, "choices": [], **more})
    except Exception as error:  # the answer has begun: it cannot have another status any more
        yield frame(from_exception(error).body)
    finally:
        answers.count(service.metrics, served, tickets)
    yield DONE


def _logprobs(served: Served, body: CompletionRequest, choice: Choice, start: int = 0) -> dict[str, Any] | None:
    if body.logprobs is None:
        return None
    tokenizer = served.chat.tokenizer
    said = tokenizer.decode([i for i in choice.ids[:start] if not tokenizer.is_special(i)])
    return answers.text_logprobs(
        tokenizer, choice.ids[start:], choice.logprobs[start:], choice.top[start:], len(said)
    )
