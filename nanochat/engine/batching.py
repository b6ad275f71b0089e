"""Continuous batching: many requests, one model, one thread that owns it.

    with Scheduler(model, tokenizer, prefix_cache=PrefixCache()) as scheduler:
        for event in scheduler.submit(Request(prompt, Sampling(max_tokens=100))):
            print(event.text, end="", flush=True)

Requests join and leave at every step. A step ends what was cancelled or is too late, gives every row that decodes its
latest token to read, takes waiting requests for which there is room, and reads at most `prefill_chunk` tokens of
prompts: a long prompt never holds up the answers of others for longer than a chunk. What a request gets is what
`Engine` alone would give it, whatever runs beside it. (Iterations: Orca, OSDI 2022; chunks: Sarathi-Serve, arXiv
2403.02310.)
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass, fields

import torch

from nanochat.engine import cache
from nanochat.engine.jobs import Jobs
from nanochat.engine.prefix import PrefixCache
from nanochat.engine.ticket import Event, Guide, Overloaded, Request, Ticket, Timings, Usage, Waiting, deliver
from nanochat.errors import UsageError
from nanochat.model.lm import LM
from nanochat.runtime import log
from nanochat.tokenizer import Tokenizer

__all__ = ["Event", "Guide", "Overloaded", "Request", "Scheduler", "Stats", "Ticket", "Timings", "Usage"]


IDLE_SECONDS = 0.01  # between two looks at what ends while all wait for their calls


@dataclass(frozen=True)
class Stats:
    """Where the scheduler stands now, and what it has done since it was made."""

    active: int  # rows that decode or whose prompt is being read
    queued: int  # requests that wait
    state_bytes: int  # that the active rows may come to
    prefix_bytes: int  # of the prefix cache
    requests: int  # taken in, the rejected ones not counted
    rejected: int
    finished: int  # requests that have ended, for whatever reason
    cancelled: int
    expired: int  # past their deadline
    failed: int
    prompt_tokens: int  # of prompts whose reading has begun
    cached_tokens: int  # those of them that needed no reading
    completion_tokens: int
    steps: int


class Queue:
    """Requests that wait. The keys take turns; those of one key come in their order. The caller holds a lock."""

    def __init__(self) -> None:
        self._by_key: OrderedDict[str, deque[Ticket]] = OrderedDict()  # whose turn it is first

    def __len__(self) -> int:
        return sum(map(len, self._by_key.values()))

    def __iter__(self) -> Iterator[Ticket]:
        return (ticket for tickets in self._by_key.values() for ticket in tickets)

    def push(self, ticket: Ticket) -> None:
        self._by_key.setdefault(ticket.request.key, deque()).append(ticket)

    def first(self) -> Ticket | None:
        """Whose turn it is."""
        return next(iter(self), None)

    def pop(self) -> Ticket:
        """Take it; its key goes to the end."""
        key, tickets = next(iter(self._by_key.items()))
        ticket = tickets.popleft()
        if tickets:
            self._by_key.move_to_end(key)
        else:
            del self._by_key[key]
        return ticket

    def remove(self, ticket: Ticket) -> None:
        tickets = self._by_key[ticket.request.key]
        tickets.remove(ticket)
        if not tickets:
            del self._by_key[ticket.request.key]


class Scheduler:
    """Serves requests from any number of threads and event loops with one model.

    max_rows: completions that decode together. max_queue: requests that may wait; one more raises `Overloaded`.
    memory_bytes: what the states of all rows may take, should every row become as long as it may (None: no bound but
    max_rows; room kept ready for more rows and tokens may double it). prefill_chunk: tokens of prompts read in a step.
    prefix_cache: keeps beginnings of prompts, and prompts with their answers. eos: as in `Engine`. pace: least seconds
    between two pieces of an answer for a consumer on an event loop, but for the first and the last; every piece costs
    the loop as much time as a token costs the model. Raises UsageError for values out of range, and a cache of another
    model.
    """

    def __init__(
        self,
        model: LM,
        tokenizer: Tokenizer,
        *,
        max_rows: int = 32,
        max_queue: int = 64,
        memory_bytes: int | None = None,
        prefill_chunk: int = 256,
        prefix_cache: PrefixCache | None = None,
        eos: Collection[int] | None = None,
        pace: float = 0.0,
    ) -> None:
        for name, value in (("max_rows", max_rows), ("max_queue", max_queue), ("prefill_chunk", prefill_chunk)):
            if value < 1:
                raise UsageError(f"{name} {value}: expected at least 1")
        self.max_rows, self.max_queue, self.memory_bytes = max_rows, max_queue, memory_bytes
        self.context = model.config.sequence_len
        self.prefixes, self.pace = prefix_cache, pace
        self.row_bytes, self.token_bytes = measure_states(model)
        self._changed = threading.Condition()  # guards what follows
        self._queue = Queue()
        self._counts = dict.fromkeys((field.name for field in fields(Stats)), 0)
        self._seconds = 1.0  # that a request takes, smoothed
        self._closing = False  # takes no more requests
        self._stopped = False  # takes no more steps
        self._thread: threading.Thread | None = None
        # from here on the owning thread's
        self._outbox: list[Waiting] = []
        self._jobs = Jobs(model, tokenizer, prefill_chunk, prefix_cache, eos, self._ended, self._notify)

    # ---- any thread

    def start(self) -> Scheduler:
        """Start the thread that owns the model."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
            self._thread.start()
        return self

    def submit(self, request: Request) -> Ticket:
        """Line up. Raises UsageError for a prompt that is empty or longer than the context, for more completions than
        `max_rows`, and for a request that never fits into the memory; Overloaded when too many wait already."""
        if not 1 <= request.n <= self.max_rows:
            raise UsageError(f"n={request.n}: expected 1 to {self.max_rows} completions")
        if request.guide is not None and request.n > 1:
            raise UsageError(f"n={request.n}: a guide steers one completion")
        self._jobs.engine(request).check([request.ids])
        need = self._bytes(request.n, request.longest(self.context))
        if self.memory_bytes is not None and need > self.memory_bytes:
            raise UsageError(
                f"the request may need {need / 1e6:.1f} MB for its states, of {self.memory_bytes / 1e6:.1f} MB: "
                "ask for fewer tokens or completions"
            )
        ticket = Ticket(request, self._notify, self._outbox, self.pace)
        with self._changed:
            n_queued = len(self._queue)
            if self._closing or n_queued >= self.max_queue:
                self._counts["rejected"] += 1
                wait = max(1.0, self._seconds * (n_queued + 1) / self.max_rows)
                why = "is shutting down" if self._closing else f"has {n_queued} requests waiting already"
                raise Overloaded(f"the server {why}; try again in {wait:.0f} s", wait)
            self._queue.push(ticket)
            self._counts["requests"] += 1
            self._changed.notify_all()
        return ticket

    def stats(self) -> Stats:
        """Counters, for metrics."""
        with self._changed:
            now = {**self._counts, "queued": len(self._queue)}
        now["prefix_bytes"] = self.prefixes.nbytes if self.prefixes is not None else 0
        return Stats(**now)

    def drain(self, timeout: float | None = None) -> bool:
        """Take no more requests, and wait until those taken have ended; whether they have, within `timeout` seconds."""
        with self._changed:
            self._closing = True
            return self._changed.wait_for(lambda: self._counts["finished"] == self._counts["requests"], timeout)

    def close(self) -> None:
        """Cancel what still runs and end the thread."""
        with self._changed:
            self._closing = self._stopped = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._end_all("cancelled")
        self._jobs.close()

    def __enter__(self) -> Scheduler:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _bytes(self, n_rows: int, longest: int) -> int:
        """Of the states of so many rows, padded to the longest."""
        return n_rows * (self.row_bytes + longest * self.token_bytes)

    # ---- the owning thread

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._stopped or len(self._queue) or len(self._jobs))
                    if self._jobs.idle and self._next() is None and not self._stopped:
                        self._changed.wait(IDLE_SECONDS)
                    if self._stopped:
                        return
                self.step()
        except BaseException as error:  # a bug: at least nobody waits for ever
            with self._changed:
                self._closing = True
            self._end_all("error", error)
            raise

    @torch.no_grad()
    def step(self) -> bool:
        """One token for every row whose prompt is read, and a chunk of prompts. Whether anything is left to do. Without
        `start`, whoever calls this is the owning thread."""
        jobs = self._jobs
        self._end_waiting(time.perf_counter())
        jobs.end_stopped(time.perf_counter())
        jobs.resume()
        jobs.decode()
        self._admit()
        jobs.read()
        jobs.sample()
        deliver(self._outbox)
        with self._changed:
            self._counts |= {
                "steps": self._counts["steps"] + 1,
                "active": jobs.n_rows,
                "state_bytes": self._bytes(jobs.n_rows, jobs.longest),
                "prompt_tokens": jobs.prompt_tokens,
                "cached_tokens": jobs.cached_tokens,
                "completion_tokens": jobs.completion_tokens,
            }
            return bool(len(self._queue) or len(jobs))

    def _end_waiting(self, now: float) -> None:
        """End what was cancelled or is past its deadline before its turn came."""
        with self._changed:
            stopped = [(ticket, ticket.stopped(now)) for ticket in self._queue if ticket.stopped(now)]
            for ticket, _ in stopped:
                self._queue.remove(ticket)
        for ticket, reason in stopped:
            ticket.end(reason)
            self._ended(ticket, reason)

    def _admit(self) -> None:
        """Take requests from the queue while there is room for the next. None overtakes another: a large one would wait
        for ever."""
        while True:
            with self._changed:
                ticket = self._next()
                if ticket is None:
                    return
                self._queue.pop()
            self._jobs.begin(ticket)

    def _next(self) -> Ticket | None:
        """Whose turn it is, where there is room. The caller holds the lock."""
        ticket = self._queue.first()
        return ticket if ticket is not None and self._fits(ticket.request) else None

    def _fits(self, request: Request) -> bool:
        n_rows = self._jobs.n_rows + request.n
        need = self._bytes(n_rows, max(self._jobs.longest, request.longest(self.context)))
        return n_rows <= self.max_rows and (self.memory_bytes is None or need <= self.memory_bytes)

    def _ended(self, ticket: Ticket, reason: str) -> None:
        """Nothing of this request runs any more."""
        if reason == "error":
            log.error("a request failed", exc_info=ticket.error)
        kind = {"cancelled": "cancelled", "deadline": "expired", "error": "failed"}.get(reason)
        total = ticket.timings.total
        with self._changed:
            self._counts["finished"] += 1
            if kind is not None:
                self._counts[kind] += 1
            elif total is not None:
                self._seconds += 0.1 * (total - self._seconds)
            self._changed.notify_all()

    def _end_all(self, reason: str, error: BaseException | None = None) -> None:
        with self._changed:
            waiting = [self._queue.pop() for _ in range(len(self._queue))]
        for ticket in waiting:
            ticket.end(reason, error)
            self._ended(ticket, reason)
        self._jobs.end_all(reason, error)
        deliver(self._outbox)


@torch.no_grad()
def measure_states(model: LM) -> tuple[int, int]:
    """Bytes of one row's states: without a token, and what every token adds."""
    sizes = []
    for n in (1, 17):
        states = model.init_states(1)
        model(torch.zeros(1, n, dtype=torch.int64, device=model.device), states)
        sizes.append(cache.nbytes(states))
    token = (sizes[1] - sizes[0]) // 16
    return sizes[0] - token, token
