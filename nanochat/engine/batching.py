"""Continuous batching: many requests, one model, one thread that owns it.

    with Scheduler(model, tokenizer, prefix_cache=PrefixCache()) as scheduler:
        for event in scheduler.submit(Request(prompt, Sampling(max_tokens=100))):
            print(event.text, end="", flush=True)

Requests join and leave at every step. A step ends what was cancelled or is too late, takes waiting requests for which
there is room, reads at most `prefill_chunk` tokens of prompts, and gives every row that has been read one more token: a
long prompt never holds up the answers of others for longer than a chunk. What a request gets is what `Engine` alone
would give it, whatever runs beside it (Orca, OSDI 2022; chunked prefill: Sarathi-Serve, arXiv 2403.02310).
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from nanochat.engine import cache
from nanochat.engine.generate import Batch, Completion, Engine, Row, prefill
from nanochat.engine.prefix import Begun, PrefixCache, message_boundaries
from nanochat.engine.sampling import Sampling, sample
from nanochat.engine.text import Decoder
from nanochat.engine.ticket import Event, Overloaded, Request, Ticket, Timings, Usage
from nanochat.errors import NanochatError, UsageError
from nanochat.model.lm import LM
from nanochat.model.mixer import State
from nanochat.runtime import log
from nanochat.tokenizer import Tokenizer

__all__ = ["Event", "Overloaded", "Request", "Scheduler", "Session", "Stats", "Ticket", "Timings", "Usage"]


@dataclass(frozen=True)
class Stats:
    """Where the scheduler stands now, and what it has done since it was made."""

    active: int  # rows that decode or whose prompt is being read
    queued: int  # requests that wait
    state_bytes: int  # of the active rows
    prefix_bytes: int  # of kept beginnings
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


@dataclass(eq=False)
class _Job:
    """A request that is being served: its prompt is read, then its rows decode."""

    ticket: Ticket
    engine: Engine  # makes and advances its rows
    rows: list[Row]
    begun: Begun | None  # what has been read; None: everything, and the states are the batch's
    stops: deque[int]  # boundaries that lie ahead

    @property
    def ids(self) -> Sequence[int]:
        return self.ticket.request.ids

    @property
    def left(self) -> int:
        """Tokens to read."""
        return len(self.ids) - self.begun.n if self.begun is not None else 0

    @property
    def running(self) -> list[Row]:
        return [row for row in self.rows if row.active]

    @property
    def longest(self) -> int:
        """Tokens that a row may come to."""
        return len(self.ids) + self.rows[0].budget


class Scheduler:
    """Serves requests from any number of threads and event loops with one model.

    max_rows: completions that decode together. max_queue: requests that may wait; one more raises `Overloaded`.
    memory_bytes: what the states of all rows may take, should every row become as long as it may (None: no bound but
    max_rows). prefill_chunk: tokens of prompts read in a step. prefix_cache: keeps beginnings of prompts and finished
    answers. eos: as in `Engine`. Raises UsageError for values out of range.
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
    ) -> None:
        for name, value in (("max_rows", max_rows), ("max_queue", max_queue), ("prefill_chunk", prefill_chunk)):
            if value < 1:
                raise UsageError(f"{name} {value}: expected at least 1")
        self.model, self.tokenizer, self.eos = model, tokenizer, eos
        self.max_rows, self.max_queue, self.prefill_chunk = max_rows, max_queue, prefill_chunk
        self.memory_bytes, self.prefixes = memory_bytes, prefix_cache
        if prefix_cache is not None:
            prefix_cache.bind(model)
        self.row_bytes, self.token_bytes = measure_states(model)
        self._changed = threading.Condition()  # guards everything up to the next comment
        self._queue: OrderedDict[str, deque[Ticket]] = OrderedDict()  # by key, whose turn it is first
        self._counts = dict.fromkeys((field.name for field in fields(Stats)), 0)
        self._seconds = 1.0  # that a request takes, smoothed
        self._closing = False  # takes no more requests
        self._stopped = False  # takes no more steps
        self._thread: threading.Thread | None = None
        # from here on only the owning thread's
        self._jobs: list[_Job] = []
        self._batch: Batch[Row] = Batch(model)
        self._owners: dict[int, _Job] = {}  # of rows that run, by their numbers
        self._next_row = 0

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
        self._engine(request).check([request.ids])
        need = self._bytes(request.n, self._longest(request))
        if self.memory_bytes is not None and need > self.memory_bytes:
            raise UsageError(
                f"the request may need {need / 1e6:.1f} MB for its states, of {self.memory_bytes / 1e6:.1f} MB: "
                "ask for fewer tokens or completions"
            )
        ticket = Ticket(request, self._notify)
        with self._changed:
            n_queued = self._n_queued()
            if self._closing or n_queued >= self.max_queue:
                self._counts["rejected"] += 1
                wait = max(1.0, self._seconds * (n_queued + 1) / self.max_rows)
                why = "is shutting down" if self._closing else f"has {n_queued} requests waiting already"
                raise Overloaded(f"the server {why}; try again in {wait:.0f} s", wait)
            self._queue.setdefault(request.key, deque()).append(ticket)
            self._counts["requests"] += 1
            self._changed.notify_all()
        return ticket

    def stream(
        self,
        prompt: Sequence[int],
        sampling: Sampling | None = None,
        *,
        boundaries: Sequence[int] | None = None,
        decoder: Callable[[], Decoder] | None = None,
    ) -> Generator[str, None, Completion]:
        """One completion, piece by piece, as `Engine.stream`; closing the generator cancels it. See `Session`."""
        return Session(self).stream(prompt, sampling, boundaries=boundaries, decoder=decoder)

    def stats(self) -> Stats:
        """Counters, for metrics."""
        with self._changed:
            now = {**self._counts, "queued": self._n_queued()}
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

    def __enter__(self) -> Scheduler:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _n_queued(self) -> int:
        return sum(map(len, self._queue.values()))

    def _engine(self, request: Request) -> Engine:
        eos = self.eos if request.eos is None else request.eos
        return Engine(self.model, self.tokenizer, eos=eos, skip_special=True, decoder=request.decoder)

    def _longest(self, request: Request) -> int:
        """Tokens that a row of this request may come to."""
        return min(len(request.ids) + request.sampling.max_tokens, self.model.config.sequence_len)

    def _bytes(self, n_rows: int, longest: int) -> int:
        """Of the states of so many rows, padded to the longest."""
        return n_rows * (self.row_bytes + longest * self.token_bytes)

    # ---- the owning thread

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._stopped or self._queue or self._jobs)
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
        self._end_stopped()
        self._decode()
        self._admit()
        self._read()
        self._sample()
        if not self._jobs:
            self._batch = Batch(self.model)  # an idle server holds no states
        with self._changed:
            self._counts["steps"] += 1
            self._counts["active"] = len(self._owners)
            self._counts["state_bytes"] = self._state_bytes()
            self._changed.notify_all()
            return bool(self._queue or self._jobs)

    def _state_bytes(self) -> int:
        reading = sum(cache.nbytes(job.begun.states) for job in self._jobs if job.begun is not None)
        return reading + cache.nbytes(self._batch.states if self._batch.rows else [])

    def _end_stopped(self) -> None:
        """End what was cancelled or is past its deadline, wherever it is."""
        now = time.perf_counter()
        with self._changed:
            waiting = [(t, t.stopped(now)) for queue in self._queue.values() for t in queue]
            waiting = [(ticket, reason) for ticket, reason in waiting if reason]
            for ticket, _ in waiting:
                self._leave_queue(ticket)
        for ticket, reason in waiting:
            self._end(ticket, reason)
        for job in list(self._jobs):
            reason = job.ticket.stopped(now)
            if reason:
                self._keep_answers(job.running)
                self._end_job(job, reason)

    def _leave_queue(self, ticket: Ticket) -> None:
        queue = self._queue[ticket.request.key]
        queue.remove(ticket)
        if not queue:
            del self._queue[ticket.request.key]

    def _end_job(self, job: _Job, reason: str, error: BaseException | None = None) -> None:
        """End all that runs of one request."""
        for row in job.running:
            row.finish_reason = reason
            del self._owners[row.number]
        self._jobs.remove(job)
        self._end(job.ticket, reason, error)

    def _end_all(self, reason: str, error: BaseException | None = None) -> None:
        with self._changed:
            waiting = [ticket for queue in self._queue.values() for ticket in queue]
            self._queue.clear()
        for ticket in waiting:
            self._end(ticket, reason, error)
        for job in list(self._jobs):
            self._end_job(job, reason, error)

    def _end(self, ticket: Ticket, reason: str, error: BaseException | None = None) -> None:
        """Nothing of this request runs any more."""
        ticket.end(reason, error)
        if ticket.error is not None:
            log.error("a request failed", exc_info=ticket.error)
            reason = "error"
        with self._changed:
            self._counts["finished"] += 1
            kind = {"cancelled": "cancelled", "deadline": "expired", "error": "failed"}.get(reason)
            if kind is not None:
                self._counts[kind] += 1
            elif ticket.timings.total is not None:
                self._seconds += 0.1 * (ticket.timings.total - self._seconds)
            self._changed.notify_all()

    # ---- admission and reading

    def _admit(self) -> None:
        """Take requests from the queue, the keys in turn, while there is room for the next."""
        while True:
            with self._changed:
                if not self._queue:
                    return
                key, queue = next(iter(self._queue.items()))
                ticket = queue[0]
                if not self._fits(ticket.request):
                    return
                self._leave_queue(ticket)
                if key in self._queue:
                    self._queue.move_to_end(key)
            try:
                self._begin(ticket)
            except Exception as error:
                self._end(ticket, "error", error)

    def _fits(self, request: Request) -> bool:
        n_rows = len(self._owners) + request.n
        longest = max([self._longest(request), *(job.longest for job in self._jobs)])
        fits = self.memory_bytes is None or self._bytes(n_rows, longest) <= self.memory_bytes
        return n_rows <= self.max_rows and fits

    def _begin(self, ticket: Ticket) -> None:
        """From the queue to the jobs, with as much of the prompt as is known."""
        request, engine = ticket.request, self._engine(ticket.request)
        numbers = range(self._next_row, self._next_row + request.n)
        rows = [engine.row(number, j, request.ids, request.sampling) for j, number in enumerate(numbers)]
        ids, boundaries = request.ids, request.boundaries
        if self.prefixes is None:
            begun, boundaries = Begun(0, self.model.init_states(1, len(ids))), ()
        else:
            begun = self.prefixes.get(ids[:-1], len(ids))  # the last token is always read
            if boundaries is None:
                boundaries = message_boundaries(ids, self.tokenizer, self.prefixes.spacing, begun.n)
        stops = deque(sorted({at for at in boundaries if begun.n < at < len(ids)}))
        job = _Job(ticket, engine, rows, begun, stops)
        self._jobs.append(job)
        self._owners |= dict.fromkeys(numbers, job)
        self._next_row += request.n
        ticket.read_at, ticket.cached_tokens = time.perf_counter(), begun.n
        with self._changed:
            self._counts["prompt_tokens"] += len(ids)
            self._counts["cached_tokens"] += begun.n

    def _read(self) -> None:
        """A chunk of prompts. The oldest gets half of it at least, then the shortest come first."""
        reading = [job for job in self._jobs if job.begun is not None]
        if not reading:
            return
        oldest, *others = reading
        left, ready = self.prefill_chunk, []
        turns = [(oldest, (left + 1) // 2), *((job, left) for job in sorted(others, key=lambda job: job.left))]
        for job, most in [*turns, (oldest, left)]:
            n = min(most, left, job.left)
            if n == 0 or job in ready or job not in self._jobs:
                continue
            left -= n
            try:
                if self._read_some(job, n):
                    ready.append(job)
            except Exception as error:
                self._end_job(job, "error", error)
        self._finish_reading(ready)

    def _read_some(self, job: _Job, n: int) -> bool:
        """Read n tokens, and store the states at boundaries. True where the end of the prompt is among them: what
        follows the last boundary is left to be read together with others."""
        assert job.begun is not None
        at, states = job.begun
        end = at + n
        while at < end and (job.stops or end < len(job.ids)):
            to = min(end, job.stops[0]) if job.stops else end
            self.model(torch.tensor([list(job.ids[at:to])], device=self.model.device), states)
            at = to
            job.begun = Begun(at, states)
            if job.stops and at == job.stops[0]:
                job.stops.popleft()
                self._keep(job.ids[:at], states)
        return end == len(job.ids)

    def _finish_reading(self, jobs: list[_Job]) -> None:
        """The ends of these prompts, in one pass where their lengths allow it; their rows join the batch."""
        if not jobs:
            return
        try:
            begun = [job.begun for job in jobs if job.begun is not None]
            states, hidden_BD = prefill(self.model, [job.ids for job in jobs], begun=begun)
        except Exception as error:
            if len(jobs) == 1:
                return self._end_job(jobs[0], "error", error)
            for job in jobs:  # their states may be used up: each on its own, from the start
                job.begun = Begun(0, self.model.init_states(1, len(job.ids)))
                self._finish_reading([job])
            return
        for i, job in enumerate(jobs):
            self._keep(job.ids, cache.row(states, i))
            job.begun = None
        copies = [i for i, job in enumerate(jobs) for _ in job.rows]
        if len(copies) > len(jobs):
            cache.select(states, copies)
            hidden_BD = hidden_BD[copies]
        self._batch.join([row for job in jobs for row in job.rows], states, hidden_BD)

    # ---- decoding

    def _decode(self) -> None:
        """Feed each row its latest token; rows that have ended leave."""
        if not self._batch.rows:
            return
        try:
            self._batch.step([row.ids[-1] for row in self._batch.rows])
        except Exception as error:
            self._fail_batch(error)

    def _fail_batch(self, error: Exception) -> None:
        """A step of all rows failed: their states may have advanced in some layers only."""
        self._batch = Batch(self.model)
        for job in [job for job in self._jobs if job.begun is None]:
            self._end_job(job, "error", error)

    def _sample(self) -> None:
        """The next token of each row. Rows with the same filters are drawn together."""
        rows = self._batch.rows
        if not rows:
            return
        try:
            chosen = self._choose([self._owners[row.number].ticket.request for row in rows])
        except Exception as error:
            return self._fail_batch(error)
        for row, (token, logprob, top) in zip(rows, chosen):
            self._advance(row, token, logprob, top)
        finished = [row for row in rows if row.finish_reason]
        self._keep_answers(finished)
        for row in finished:
            del self._owners[row.number]
        for job in [job for job in self._jobs if not job.running]:
            self._end_job(job, job.rows[0].finish_reason)

    def _choose(self, requests: Sequence[Request]) -> list[tuple[int, float, list[tuple[int, float]]]]:
        """For each row its next token, the log-probability, and the most likely tokens where they are asked for."""
        logits_BV = self.model.logits(self._batch.hidden_BD)
        top = [_most_likely(logits_BV[i], request.top_logprobs) for i, request in enumerate(requests)]
        alike: dict[tuple[float, ...], list[int]] = {}
        for i, request in enumerate(requests):
            s = request.sampling
            alike.setdefault((s.temperature, s.top_k, s.top_p, s.min_p), []).append(i)
        chosen: dict[int, tuple[int, float]] = {}
        for members in alike.values():
            some_BV = logits_BV if len(alike) == 1 else logits_BV[members]
            streams = [self._batch.rows[i].random for i in members]
            chosen |= zip(members, zip(*sample(some_BV, requests[members[0]].sampling, streams)))
        return [(*chosen[i], top[i]) for i in range(len(requests))]

    def _advance(self, row: Row, token: int, logprob: float, top: list[tuple[int, float]]) -> None:
        """Give a row its token, and the consumer the event."""
        job = self._owners[row.number]
        text = ""
        try:
            text = job.engine.advance(row, token, logprob)
        except Exception as error:  # a decoder's: this row ends, the others go on
            job.ticket.error, row.finish_reason = error, "error"
        with self._changed:
            self._counts["completion_tokens"] += 1
        index = row.number - job.rows[0].number
        job.ticket.emit(Event(index, text, [token], [logprob], row.finish_reason, [top] if top else []))

    # ---- the prefix cache

    def _keep(self, ids: Sequence[int], states: list[State]) -> None:
        if self.prefixes is not None:
            self.prefixes.put(ids, states)

    def _keep_answers(self, rows: Sequence[Row]) -> None:
        """The states after prompt and answer: the next turn of the conversation begins with them."""
        at = {row.number: i for i, row in enumerate(self._batch.rows)}
        for row in rows:
            if row.number in at:
                ids = [*self._owners[row.number].ids, *row.ids[:-1]]
                self._keep(ids, cache.row(self._batch.states, at[row.number]))


class Session:
    """One caller's use of a scheduler, where an `Engine` is expected: with a key and a deadline, and what it has used.

    `deadline`: seconds for each completion. `tickets`: all that it asked for. `cancel` ends what runs, from any thread;
    the stream then raises no error but returns what there is.
    """

    def __init__(self, scheduler: Scheduler, key: str = "", deadline: float | None = None) -> None:
        self.scheduler, self.key, self.deadline = scheduler, key, deadline
        self.tickets: list[Ticket] = []

    def cancel(self) -> None:
        for ticket in self.tickets:
            ticket.cancel()

    def stream(
        self,
        prompt: Sequence[int],
        sampling: Sampling | None = None,
        *,
        boundaries: Sequence[int] | None = None,
        decoder: Callable[[], Decoder] | None = None,
    ) -> Generator[str, None, Completion]:
        """One completion, piece by piece, as `Engine.stream`; closing the generator cancels it. Raises UsageError and
        Overloaded as `Scheduler.submit`, NanochatError when the generation failed."""
        request = Request(
            prompt, sampling or Sampling(), 1, self.key, self.deadline, boundaries=boundaries, decoder=decoder
        )
        ticket = self.scheduler.submit(request)
        self.tickets.append(ticket)
        done = Completion([], "", [], "")
        try:
            for event in ticket:
                done.ids.extend(event.ids)
                done.logprobs.extend(event.logprobs)
                done = done._replace(text=done.text + event.text, finish_reason=event.finish_reason)
                if event.text:
                    yield event.text
        finally:
            ticket.cancel()
        if done.finish_reason == "error":
            raise NanochatError("the generation failed; the log says why") from ticket.error
        return done


def _most_likely(logits_V: Tensor, k: int) -> list[tuple[int, float]]:
    """The k most likely tokens with their log-probabilities in nats."""
    if not k:
        return []
    values, ids = torch.log_softmax(logits_V, dim=-1).topk(min(k, logits_V.numel()))
    return list(zip(ids.tolist(), values.tolist()))


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
