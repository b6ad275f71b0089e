"""Clients of the serving benchmark: many streams that ask one after the other, and what they see.

They run beside the server that they measure, and so do as little as they can: what came is read when all is over.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

HEALTH_PAUSE = 0.05  # seconds between two looks at /health


@dataclass
class Seen:
    """What a client saw of one request: when it sent it, when text came, and how many tokens that was in all."""

    began: float = field(default_factory=time.perf_counter)
    at: list[float] = field(default_factory=list)
    n: int = 0
    failed: str = ""
    expected: int = 0  # tokens
    parts: list[tuple[float, bytes]] = field(default_factory=list)  # what came over HTTP, and when

    def read(self) -> None:
        """Understand `parts`. The lines of HTTP's chunks are not looked at: a frame is a line."""
        rest = b""
        for at, data in self.parts:
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                if line.startswith(b"HTTP/1.1 ") and b" 200 " not in line:
                    self.failed = line.decode().strip()
                if line.startswith(b"data: {"):
                    frame = json.loads(line[6:])
                    if any(choice["delta"].get("content") for choice in frame.get("choices", ())):
                        self.at.append(at)
                    self.n = (frame.get("usage") or {}).get("completion_tokens", self.n)
                    self.failed = self.failed or str(frame.get("error", ""))
        if self.n != self.expected:
            self.failed = self.failed or f"{self.n} of {self.expected} tokens came"
        self.parts.clear()

    @property
    def ttft(self) -> float:
        return self.at[0] - self.began if self.at else 0.0

    @property
    def gaps(self) -> list[float]:
        return [b - a for a, b in zip(self.at, self.at[1:])]

    @property
    def tpot(self) -> float:
        return (self.at[-1] - self.at[0]) / (self.n - 1) if self.n > 1 else 0.0


Ask = Callable[[str], Awaitable[Seen]]


async def load(ask: Ask, texts: Sequence[str], n_streams: int, n_requests: int) -> tuple[list[Seen], float]:
    """All requests, by so many streams; and the seconds that they took."""
    waiting = iter([texts[i % len(texts)] for i in range(n_requests)])

    async def stream() -> list[Seen]:
        return [await ask(text) for text in waiting]

    began = time.perf_counter()
    found = await asyncio.gather(*(stream() for _ in range(n_streams)))
    return [seen for some in found for seen in some], time.perf_counter() - began


# ---- HTTP


async def post(port: int, text: str, tokens: int) -> Seen:
    """One streamed answer, still to be read."""
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": tokens, "temperature": 0, "stream": True}
    body["stream_options"] = {"include_usage": True}
    seen = Seen(expected=tokens)
    try:
        await exchange(port, "POST", "/v1/chat/completions", json.dumps(body).encode(), seen.parts)
    except OSError as error:
        seen.failed = str(error) or type(error).__name__
    return seen


async def exchange(port: int, method: str, path: str, body: bytes, parts: list[tuple[float, bytes]]) -> None:
    """Send a request, and note what comes until the server closes the connection. Raises OSError."""
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    loop = asyncio.get_running_loop()
    transport, protocol = await loop.create_connection(lambda: Noting(parts, loop.create_future()), "127.0.0.1", port)
    try:
        transport.write(head.encode() + body)
        await protocol.closed
    finally:
        transport.close()


class Noting(asyncio.Protocol):
    """Bytes and when they came. A client that does more slows down the server beside it."""

    def __init__(self, parts: list[tuple[float, bytes]], closed: asyncio.Future[None]) -> None:
        self.parts, self.closed = parts, closed

    def data_received(self, data: bytes) -> None:
        self.parts.append((time.perf_counter(), data))

    def connection_lost(self, error: Exception | None) -> None:
        if not self.closed.done():
            self.closed.set_exception(error) if error else self.closed.set_result(None)


async def get(port: int, path: str) -> None:
    await exchange(port, "GET", path, b"", [])


async def look(port: int, seconds: list[float]) -> None:
    """How long /health takes, again and again."""
    while True:
        began = time.perf_counter()
        await get(port, "/health")
        seconds.append(time.perf_counter() - began)
        await asyncio.sleep(HEALTH_PAUSE)
