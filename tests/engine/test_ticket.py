"""Tickets: when a consumer on an event loop is woken."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from nanochat.engine import ticket as ticket_module
from nanochat.engine.ticket import Event, Request, Ticket, deliver


class Clock:
    """Time that the test makes."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(ticket_module, "time", made)
    return made


def pieces(clock: Clock, pace: float, at: Sequence[float], flush: Sequence[float] = (), n: int = 1) -> list[str]:
    """What a consumer takes of letters that come at these times; the last one ends its completion."""
    outbox: list = []
    ticket = Ticket(Request([1], n=n), lambda: None, outbox, pace)
    found: list[str] = []

    async def consume() -> None:
        while some := await ticket.take():
            found.append("".join(event.text for event in some))

    async def settle() -> None:
        deliver(outbox)
        for _ in range(5):
            await asyncio.sleep(0)

    async def play() -> None:
        consumer = asyncio.create_task(consume())
        await settle()
        for i, when in enumerate(at):
            clock.now = 100.0 + when
            ended = "stop" if i >= len(at) - n else ""
            index = i - (len(at) - n) if ended else 0
            ticket.emit(Event(index, "abcdefgh"[i], [i], [0.0], ended, []))
            if when in flush:
                ticket.flush()
            await settle()
        await asyncio.wait_for(consumer, 5)

    asyncio.run(play())
    return found


def test_every_token_by_itself(clock):
    assert pieces(clock, 0.0, [0, 0.001, 0.002, 0.003]) == ["a", "b", "c", "d"]


def test_the_first_and_the_last_piece_do_not_wait(clock):
    assert pieces(clock, 1.0, [0, 0.1, 0.5, 0.6]) == ["a", "bcd"]


def test_pieces_keep_their_distance(clock):
    assert pieces(clock, 1.0, [0, 0.5, 1.0, 1.5, 1.9, 2.1, 2.2, 9]) == ["a", "bc", "def", "gh"]


def test_all_completions_must_have_ended(clock):
    assert pieces(clock, 1.0, [0, 0.1, 0.2, 0.3], n=2) == ["a", "bcd"]


def test_what_waits_goes_out_before_a_pause(clock):
    assert pieces(clock, 1.0, [0, 0.1, 0.2, 0.3], flush=[0.1]) == ["a", "b", "cd"]
