"""Streams to clients that leave before they begin."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from nanochat.engine.batching import Request, Ticket
from nanochat.serving.streams import EventStream, events


async def frames(tickets: list[Ticket]) -> AsyncGenerator[bytes, None]:
    yield b"data: hello\n\n"
    async for _ in events(tickets):
        yield b"data: more\n\n"


@pytest.mark.parametrize("sent", [0, 1])  # the client leaves before the head, or at the first frame
def test_a_client_that_leaves_at_once_frees_its_row(sent):
    async def send(message: dict) -> None:
        nonlocal sent
        if not sent:
            raise ConnectionResetError
        sent -= 1

    async def receive() -> dict:
        await asyncio.sleep(60)
        return {"type": "http.disconnect"}

    ticket = Ticket(Request([1]), wake=lambda: None)
    stream = EventStream(frames([ticket]), [ticket])
    with pytest.raises(ConnectionResetError):
        asyncio.run(stream({"type": "http"}, receive, send))
    assert ticket.stopped(0.0) == "cancelled"
