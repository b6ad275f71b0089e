"""What goes into the scheduler and what comes out: requests, events, and the ticket that hands them over."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from nanochat.engine.sampling import Sampling
from nanochat.engine.text import Decoder
from nanochat.errors import NanochatError


class Overloaded(NanochatError):
    """The queue is full, or the scheduler is shutting down. Try again after `retry_after` seconds."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Guide(Protocol):
    """Steers one completion, token by token: calls tools, ends it. `rag.multihop_chat.Searching` is one."""

    @property
    def max_results(self) -> int:
        """Tokens that all calls may bring."""

    @property
    def forbidden(self) -> Sequence[int]:
        """Tokens that may not come next."""

    @property
    def paused(self) -> bool:
        """Whether it waits for a call. Asked after `take`."""

    def take(self, token: int, logprob: float) -> str:
        """A token was sampled, and the decoder has it. Returns why the completion ends, or nothing. May raise."""

    def call(self) -> tuple[list[int], str]:
        """The call for which it paused: tokens to be read next, and why the completion ends, or nothing. Runs on
        another thread, and may raise."""


@dataclass(frozen=True)
class Request:
    """What to generate. `ids`: the prompt."""

    ids: Sequence[int]
    sampling: Sampling = field(default_factory=Sampling)
    n: int = 1  # completions of this prompt
    key: str = ""  # whose request it is: the keys take turns
    deadline: float | None = None  # seconds from now after which it ends, whatever it has
    boundaries: Sequence[int] | None = None  # where to take snapshots; None: after messages and documents
    decoder: Callable[[], Decoder] | None = None  # what turns tokens into text; None: special tokens leave no trace
    eos: Collection[int] | None = None  # tokens that end it; None: the scheduler's
    top_logprobs: int = 0  # how many of the most likely tokens to report at each place
    guide: Guide | None = None  # of the one completion (n = 1)

    def longest(self, context: int) -> int:
        """Tokens that a completion may come to; the last one sampled is not read."""
        results = self.guide.max_results if self.guide is not None else 0
        return min(len(self.ids) + self.sampling.max_tokens + results - 1, context)


@dataclass(frozen=True, slots=True)
class Event:
    """What one completion just got; a token at a time, and at last why it ended."""

    index: int  # which of the n completions
    text: str  # may be empty: half a character, or the possible beginning of a stop string
    ids: list[int]
    logprobs: list[float]  # nats, of `ids`, under the model at temperature 1
    finish_reason: str  # "" while running; stop, length, cancelled, deadline, error
    top_logprobs: list[list[tuple[int, float]]]  # for each of `ids`: the most likely tokens, when they were asked for


class Usage(NamedTuple):
    """Tokens. `prompt` includes what calls brought; `cached` are those of it that needed no reading."""

    prompt: int
    cached: int
    completion: int


class Timings(NamedTuple):
    """Seconds since the request came. None: has not happened."""

    queued: float | None  # until its prompt began to be read
    first_token: float | None
    total: float | None  # until all its completions had ended


class Ticket:
    """One request on its way. One consumer iterates over its events, from a thread (`for`) or from asyncio
    (`async for`); anyone may cancel it. The iteration ends when all completions have ended.

    wake: called when it is cancelled. outbox: where `emit` leaves the consumers that wait on an event loop, for
    `deliver`; None: they are woken at once. pace: seconds between two times that such a consumer is woken; what comes
    in between waits for the next, but for the first token and the end.
    """

    def __init__(
        self,
        request: Request,
        wake: Callable[[], None],
        outbox: list[Waiting] | None = None,
        pace: float = 0.0,
    ) -> None:
        self.request = request
        self.error: BaseException | None = None  # behind the finish reason `error`
        self.cached_tokens = self.completion_tokens = self.result_tokens = 0
        self.arrived = time.perf_counter()
        self.read_at: float | None = None
        self.first_at: float | None = None
        self.ended_at: float | None = None
        self._wake, self._outbox, self._pace = wake, outbox, pace
        self._due = 0.0  # when the next piece may go out
        self._running = set(range(request.n))
        self._cancelled = False
        self._events: deque[Event] = deque()
        self._taken: deque[Event] = deque()  # by `take`, for the consumer that wants them one by one
        self._changed = threading.Condition()
        self._waiter: Waiting | None = None

    # ---- the consumer's side

    @property
    def usage(self) -> Usage:
        return Usage(len(self.request.ids) + self.result_tokens, self.cached_tokens, self.completion_tokens)

    @property
    def timings(self) -> Timings:
        began = self.arrived
        since = [None if at is None else at - began for at in (self.read_at, self.first_at, self.ended_at)]
        return Timings(*since)

    @property
    def done(self) -> bool:
        """Whether all completions have ended; their events may still wait to be taken."""
        return not self._running

    def cancel(self) -> None:
        """End it before the model's next step. What still runs ends with `cancelled`."""
        self._cancelled = True
        self._wake()

    def __iter__(self) -> Iterator[Event]:
        while True:
            with self._changed:
                while not self._events:
                    if not self._running:
                        return
                    self._changed.wait()
                event = self._events.popleft()
            yield event

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        if not self._taken:
            self._taken.extend(await self.take())
        if not self._taken:
            raise StopAsyncIteration
        return self._taken.popleft()

    async def take(self) -> list[Event]:
        """For asyncio: all events that wait, or the next one; none when all completions have ended."""
        while True:
            with self._changed:
                if not self._running or (self._events and time.perf_counter() >= self._due):
                    events = list(self._events)
                    self._events.clear()
                    self._due = time.perf_counter() + self._pace
                    return events
                loop = asyncio.get_running_loop()
                future = loop.create_future()
                self._waiter = Waiting(self, loop, future)
            await future

    # ---- the scheduler's side

    def stopped(self, now: float) -> str:
        """Why it must end now: `cancelled`, `deadline`, or nothing."""
        if self._cancelled:
            return "cancelled"
        deadline = self.request.deadline
        return "deadline" if deadline is not None and now - self.arrived >= deadline else ""

    def emit(self, event: Event) -> None:
        """Hand an event to the consumer."""
        self.completion_tokens += len(event.ids)
        if event.ids and self.first_at is None:
            self.first_at = time.perf_counter()
        with self._changed:
            if event.finish_reason:
                self._running.discard(event.index)
                if not self._running:
                    self.ended_at = time.perf_counter()
            self._events.append(event)
            self._changed.notify_all()
            if self._waiter is None or (self._running and time.perf_counter() < self._due):
                return
            waiter, self._waiter = self._waiter, None
        if self._outbox is not None:
            self._outbox.append(waiter)
        else:
            deliver([waiter])

    def flush(self) -> None:
        """What waits goes out now: nothing may come for a while."""
        with self._changed:
            self._due = 0.0
            if self._waiter is None or not self._events:
                return
            waiter, self._waiter = self._waiter, None
        deliver([waiter])

    def end(self, reason: str, error: BaseException | None = None) -> None:
        """End every completion that still runs."""
        self.error = self.error or error
        for index in sorted(self._running):
            self.emit(Event(index, "", [], [], reason, []))


class Waiting(NamedTuple):
    """A consumer on an event loop, without an event."""

    ticket: Ticket
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[None]


def deliver(outbox: list[Waiting]) -> None:
    """Wake these consumers and empty the list. Each loop is woken once: a thread for each event would go back and forth
    with the one that runs the model."""
    futures: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
    for _, loop, future in outbox:
        futures.setdefault(loop, []).append(future)
    for loop, some in futures.items():
        try:
            loop.call_soon_threadsafe(_resolve, some)
        except RuntimeError:  # the loop is closed: nobody listens any more
            for waiting in outbox:
                if waiting.loop is loop:
                    waiting.ticket.cancel()
    outbox.clear()


def _resolve(futures: list[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)
