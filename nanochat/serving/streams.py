"""Answers on their way to clients: server-sent events, and waiting that ends when the client leaves."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from nanochat.engine.batching import Event, Ticket

PING_SECONDS = 15.0  # proxies take a silent connection for dead
DONE = b"data: [DONE]\n\n"
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode
R = TypeVar("R")


def frame(record: dict[str, Any]) -> bytes:
    """One event."""
    return b"data: " + _encode(record).encode() + b"\n\n"


class Frames:
    """Frames that differ in one string; all the rest is encoded once. `record` makes one of them from its string."""

    def __init__(self, record: Callable[[str], dict[str, Any]]) -> None:
        self._before, _, self._after = frame(record("\0")).rpartition(_encode("\0").encode())

    def __call__(self, text: str) -> bytes:
        return self._before + _encode(text).encode() + self._after


class EventStream(Response):
    """Sends frames as they are made, and a comment now and then. When the client leaves, however early, the frames are
    closed and the tickets that they come from cancelled."""

    media_type = "text/event-stream"

    def __init__(self, frames: AsyncGenerator[bytes, None], tickets: Sequence[Ticket] = ()) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.frames, self.tickets = frames, tickets

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await self._send_all(receive, send)
        finally:  # frames that were never begun cancel nothing
            for ticket in self.tickets:
                ticket.cancel()

    async def _send_all(self, receive: Receive, send: Send) -> None:
        writing = asyncio.ensure_future(self._write(send))
        leaving = asyncio.ensure_future(_left(receive))
        try:
            while not writing.done() and not leaving.done():
                done, _ = await asyncio.wait({writing, leaving}, timeout=PING_SECONDS, return_when="FIRST_COMPLETED")
                if not done:
                    await _send(send, b": ping\n\n")
        finally:
            await _end(writing, leaving)
            await self.frames.aclose()

    async def _write(self, send: Send) -> None:
        async for data in self.frames:
            await _send(send, data)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def unless_left(request: Request, work: Coroutine[Any, Any, R]) -> R | None:
    """The result of `work`; None when the client leaves before it is there, and `work` is cancelled."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_left(request.receive))
    try:
        await asyncio.wait({working, leaving}, return_when="FIRST_COMPLETED")
        return working.result() if working.done() else None
    finally:
        await _end(working, leaving)


async def events(tickets: Sequence[Ticket]) -> AsyncGenerator[tuple[int, Event], None]:
    """The events of several tickets as they come, each with its ticket's number; what came in the meantime is one
    event. Closing it cancels them all."""
    tasks: list[asyncio.Task[None]] = []
    try:
        if len(tickets) == 1:
            while some := await tickets[0].take():
                for event in merged(some):
                    yield 0, event
            return
        queue: asyncio.Queue[tuple[int, Event] | None] = asyncio.Queue()

        async def pump(number: int, ticket: Ticket) -> None:
            while some := await ticket.take():
                for event in merged(some):
                    queue.put_nowait((number, event))
            queue.put_nowait(None)

        tasks += [asyncio.ensure_future(pump(number, ticket)) for number, ticket in enumerate(tickets)]
        running = len(tasks)
        while running:
            item = await queue.get()
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for ticket in tickets:
            ticket.cancel()
        for task in tasks:
            task.cancel()


def merged(events: Sequence[Event]) -> list[Event]:
    """What completions got, one event for each, and then what ended them: a client that is slower than the model gets
    fewer and longer pieces."""
    if len(events) == 1:
        return list(events)
    of: dict[int, list[Event]] = {}
    for event in events:
        if not event.finish_reason:
            of.setdefault(event.index, []).append(event)
    joined = [
        Event(
            index,
            "".join(event.text for event in some),
            [i for event in some for i in event.ids],
            [p for event in some for p in event.logprobs],
            "",
            [likely for event in some for likely in event.top_logprobs],
        )
        for index, some in of.items()
    ]
    return [*joined, *(event for event in events if event.finish_reason)]


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send(send: Send, data: bytes) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": True})


async def _end(*tasks: asyncio.Future[Any]) -> None:
    """Cancel what still runs, and wait for it. The error of the first task is raised."""
    for task in tasks:
        task.cancel()
    for task in tasks[1:]:
        with contextlib.suppress(asyncio.CancelledError):
            await task
    with contextlib.suppress(asyncio.CancelledError):
        await tasks[0]
