"""Streams: clients that leave before they begin, pieces that wait, frames and chunks that are made at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.engine.batching import Event, Request, Ticket
from nanochat.serving.protocol import StreamingConnection
from nanochat.serving.streams import EventStream, Frames, events, frame


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


def test_pieces_that_wait_come_as_one_and_the_end_by_itself():
    async def found() -> list[tuple[int, str, list[int], str]]:
        ticket = Ticket(Request([1], n=2), wake=lambda: None)
        for i in range(4):
            ticket.emit(Event(i % 2, str(i), [i], [0.0], "", []))
        ticket.end("length")
        return [(e.index, e.text, e.ids, e.finish_reason) async for _, e in events([ticket])]

    assert asyncio.run(found()) == [(0, "02", [0, 2], ""), (1, "13", [1, 3], ""), (0, "", [], "length"),
                                    (1, "", [], "length")]  # fmt: skip


@given(st.text())
def test_frames_that_share_all_but_a_string(text):
    def record(said: str) -> dict:
        return {"model": 'a\0"\\u0000', "choices": [{"delta": {"content": said}, "logprobs": None}]}

    assert Frames(record)(text.encode("utf-8", "replace").decode()) == frame(
        record(text.encode("utf-8", "replace").decode())
    )


@pytest.mark.parametrize("headers", [[], [("content-length", "5")]])
@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
def test_chunks_are_those_of_h11(headers, version):
    """For two answers in a row on one connection, in chunks or not."""

    def talk(connection: h11.Connection) -> bytes:
        sent = b""
        for _ in range(2 if version == b"1.1" else 1):
            connection.receive_data(b"GET / HTTP/" + version + b"\r\nHost: a\r\n\r\n")
            while connection.next_event() is not h11.PAUSED and connection.their_state is h11.SEND_BODY:
                pass
            sent += connection.send(h11.Response(status_code=200, headers=headers))
            for data in (b"ab", b"", b"cde"):
                sent += connection.send(h11.Data(data=data)) or b""
            sent += connection.send(h11.EndOfMessage())
            if version == b"1.1":
                connection.start_next_cycle()
        return sent

    assert talk(StreamingConnection(h11.SERVER)) == talk(h11.Connection(h11.SERVER))


def test_nothing_is_sent_after_the_end():
    connection = StreamingConnection(h11.SERVER)
    connection.receive_data(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    connection.next_event()
    connection.send(h11.Response(status_code=200, headers=[]))
    connection.send(h11.EndOfMessage())
    with pytest.raises(h11.LocalProtocolError):
        connection.send(h11.Data(data=b"more"))
