"""HTTP over sockets, with a clock: who never ends the head of a request, never reads an answer, or goes on sending a
body that was refused, is cut off.

uvicorn waits for all three for ever. (Bodies that come too slowly are refused by `security.Guard`.)
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol

LINGER_SECONDS = 2.0  # for the answer to arrive while a refused body is still being sent: closing at once destroys it


class StreamingConnection(h11.Connection):
    """h11's, which looks at every piece of a streamed answer anew; that takes four times as long as this. Between the
    head of a response in chunks and its end, pieces are framed at once. What a client sends is h11's business alone."""

    _chunked = False

    def send(self, event: h11.Event) -> bytes | None:  # type: ignore[override]
        if self._chunked and type(event) is h11.Data and self.our_state is h11.SEND_BODY:
            data = event.data
            return b"%x\r\n%b\r\n" % (len(data), data) if data else b""  # an empty chunk would be the end
        sent = super().send(event)
        if type(event) is h11.Response:
            self._chunked = sent is not None and b"\r\ntransfer-encoding: chunked\r\n" in sent.lower()
        return sent


def make_protocol(seconds: float) -> type[H11Protocol]:
    """A protocol that gives a client so many seconds to send the head of a request, and to read what waits for it; 0:
    as many as it likes."""

    class TimedProtocol(H11Protocol):
        head_timer: asyncio.TimerHandle | None = None
        read_timer: asyncio.TimerHandle | None = None

        def __init__(self, config: Config, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            assert config.h11_max_incomplete_event_size is not None  # `make_server` sets it
            self.conn = StreamingConnection(h11.SERVER, config.h11_max_incomplete_event_size)

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self.head_timer = self._start()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._time_head()

        def on_response_complete(self) -> None:
            if self.conn.their_state is h11.SEND_BODY:
                self.loop.call_later(LINGER_SECONDS, self.transport.abort)
            super().on_response_complete()
            self._time_head()

        def pause_writing(self) -> None:
            super().pause_writing()
            self.read_timer = self.read_timer or self._start()

        def resume_writing(self) -> None:
            super().resume_writing()
            self._stop("read_timer")

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop("head_timer")
            self._stop("read_timer")
            super().connection_lost(exc)

        def _time_head(self) -> None:
            """The clock runs from the first byte of a head to its last; between requests uvicorn's own does."""
            waits = self.conn.their_state is h11.IDLE and bool(self.conn.trailing_data[0])
            if not waits:
                self._stop("head_timer")
            elif self.head_timer is None:
                self.head_timer = self._start()

        def _start(self) -> asyncio.TimerHandle | None:
            return self.loop.call_later(seconds, self.transport.abort) if seconds else None

        def _stop(self, name: str) -> None:
            timer: Any = getattr(self, name)
            if timer is not None:
                timer.cancel()
                setattr(self, name, None)

    return TimedProtocol
