"""Requests that are being served: prompts of which a part has been read, and rows that decode. One thread's work.

A step of the scheduler is `end_stopped`, `resume`, `decode`, `read`, `sample`, in this order; between `decode` and
`read` new requests `begin`. Whatever goes wrong with one request ends that request: a decoder of text that raises, a
prompt that cannot be read. Only where the pass of all rows fails do all rows end, for their states are lost.

A completion with a guide may pause for a call (a search, say): its row leaves the batch, its states and its place in
the memory's budget stay, and when the result is there it is read like a prompt.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import Tensor

from nanochat.engine import cache
from nanochat.engine.calls import Calls
from nanochat.engine.generate import NOT_FINITE, Batch, Engine, Row, prefill
from nanochat.engine.prefix import Begun, PrefixCache, message_boundaries
from nanochat.engine.sampling import sample
from nanochat.engine.ticket import Event, Request, Ticket
from nanochat.errors import NanochatError
from nanochat.model.lm import LM
from nanochat.model.mixer import State
from nanochat.runtime import log
from nanochat.tokenizer import Tokenizer

Likely = list[tuple[int, float]]  # tokens with their log-probabilities in nats


@dataclass(eq=False)
class Job:
    """A request that is being served."""

    ticket: Ticket
    engine: Engine  # makes and advances its rows
    rows: list[Row]
    ids: list[int]  # the prompt; later all tokens up to the latest call, and its result
    begun: Begun | None  # what has been read of these; None: everything, and the rows decode
    stops: deque[int]  # boundaries that lie ahead
    n_sampled: int = 0  # tokens of its row that are among `ids`
    call: Future[None] | None = None  # for which it waits

    @property
    def request(self) -> Request:
        return self.ticket.request

    @property
    def left(self) -> int:
        """Tokens to read."""
        return len(self.ids) - self.begun.n if self.begun is not None else 0

    @property
    def unfinished(self) -> list[Row]:
        return [row for row in self.rows if not row.finish_reason]


class Jobs:
    """prefill_chunk, prefixes and eos: see `Scheduler`. `ended` is called with each request that has ended, and why;
    `wake`, from any thread, when a call has come back."""

    def __init__(
        self,
        model: LM,
        tokenizer: Tokenizer,
        prefill_chunk: int,
        prefixes: PrefixCache | None,
        eos: Collection[int] | None,
        ended: Callable[[Ticket, str], None],
        wake: Callable[[], None],
    ) -> None:
        self.model, self.tokenizer, self.eos, self.ended = model, tokenizer, eos, ended
        self.prefill_chunk, self.prefixes = prefill_chunk, prefixes
        if prefixes is not None:
            prefixes.bind(model)
        self.prompt_tokens = self.cached_tokens = self.completion_tokens = 0  # so far
        self._jobs: list[Job] = []
        self._batch: Batch[Row] = Batch(model)
        self._job_of: dict[int, Job] = {}  # by the number of a row that is active
        self._n_rows = 0  # so far
        self._calls: Calls[Job] = Calls(wake)

    def __len__(self) -> int:
        return len(self._jobs)

    @property
    def n_rows(self) -> int:
        """Rows that decode or will."""
        return len(self._job_of)

    @property
    def longest(self) -> int:
        """Tokens that a row may come to."""
        context = self.model.config.sequence_len
        return max((job.request.longest(context) for job in self._jobs), default=0)

    @property
    def idle(self) -> bool:
        """Whether nothing can go on before a call comes back."""
        return not self._calls.come and all(job.call is not None for job in self._jobs)

    def engine(self, request: Request) -> Engine:
        """As if it served this request alone; makes and advances its rows."""
        eos = self.eos if request.eos is None else request.eos
        return Engine(self.model, self.tokenizer, eos=eos, skip_special=True, decoder=request.decoder)

    # ---- begin and end

    def begin(self, ticket: Ticket) -> None:
        """Take a request, with as much of its prompt as is known already."""
        try:
            self._begin(ticket)
        except Exception as error:
            self._end(ticket, "error", error)

    def _begin(self, ticket: Ticket) -> None:
        request, engine = ticket.request, self.engine(ticket.request)
        ids, boundaries = request.ids, request.boundaries
        numbers = range(self._n_rows, self._n_rows + request.n)
        rows = [engine.row(number, j, ids, request.sampling) for j, number in enumerate(numbers)]
        if self.prefixes is None:
            begun, boundaries = Begun(0, self.model.init_states(1, len(ids))), ()
        else:
            begun = self.prefixes.get(ids[:-1], len(ids))  # the last token is always read
            if boundaries is None:
                boundaries = message_boundaries(ids, self.tokenizer, self.prefixes.spacing, begun.n)
        stops = deque(sorted({at for at in boundaries if begun.n < at < len(ids)}))
        job = Job(ticket, engine, rows, list(ids), begun, stops)
        self._jobs.append(job)
        self._job_of |= dict.fromkeys(numbers, job)
        self._n_rows += request.n
        ticket.read_at, ticket.cached_tokens = time.perf_counter(), begun.n
        self.prompt_tokens += len(ids)
        self.cached_tokens += begun.n

    def end_stopped(self, now: float) -> None:
        """End what was cancelled or is past its deadline."""
        for job in list(self._jobs):
            reason = job.ticket.stopped(now)
            if reason:
                self._keep_answers(job.unfinished)
                self._end_job(job, reason)

    def end_all(self, reason: str, error: BaseException | None = None) -> None:
        for job in list(self._jobs):
            self._end_job(job, reason, error)

    def close(self) -> None:
        """Wait for calls that run."""
        self._calls.close()

    def _end_job(self, job: Job, reason: str, error: BaseException | None = None) -> None:
        if job.call is not None:
            job.call.cancel()  # where it has not begun; one that runs holds the job, but not its states
        job.begun = None
        for row in job.unfinished:
            row.finish_reason = reason
            del self._job_of[row.number]
        self._jobs.remove(job)
        if not self._jobs:
            self._batch = Batch(self.model)  # idle, hold no states
        self._end(job.ticket, reason, error)

    def _end(self, ticket: Ticket, reason: str, error: BaseException | None = None) -> None:
        ticket.end(reason, error)
        self.ended(ticket, reason if ticket.error is None else "error")

    # ---- reading

    def read(self) -> None:
        """A chunk of prompts. The oldest gets half of it at least, then the shortest come first."""
        reading = [job for job in self._jobs if job.begun is not None and job.call is None]
        if not reading:
            return
        oldest, *others = reading
        room, ready = self.prefill_chunk, []
        turns = [(job, room) for job in sorted(others, key=lambda job: job.left)]
        for job, most in [(oldest, (room + 1) // 2), *turns, (oldest, room)]:
            n = min(most, room, job.left)
            if n == 0 or job in ready:
                continue
            room -= n
            try:
                if self._read_on(job, n):
                    ready.append(job)
            except Exception as error:
                self._end_job(job, "error", error)
        self._read_ends(ready)

    def _read_on(self, job: Job, n: int) -> bool:
        """Read n tokens, and store the states at boundaries. True where the end of the prompt is among them: what
        follows the last boundary is then left, to be read together with others."""
        assert job.begun is not None
        at, states = job.begun
        ids, end = job.ids, at + n
        while at < end and (job.stops or end < len(ids)):
            to = min(end, job.stops[0]) if job.stops else end
            self.model(torch.tensor([list(ids[at:to])], device=self.model.device), states)
            at = to
            job.begun = Begun(at, states)
            if job.stops and at == job.stops[0]:
                self._keep(ids[: job.stops.popleft()], states)
        return end == len(ids)

    def _read_ends(self, jobs: list[Job]) -> None:
        """The ends of these prompts, in one pass where their lengths allow it; their rows join the batch."""
        begun = [job.begun for job in jobs if job.begun is not None]
        if not begun:
            return
        try:
            states, hidden_BD = prefill(self.model, [job.ids for job in jobs], begun=begun)
        except Exception as error:
            if len(jobs) == 1:
                return self._end_job(jobs[0], "error", error)
            for job in jobs:  # states may be used up: each on its own, from the start
                job.begun = Begun(0, self.model.init_states(1, len(job.ids)))
                self._read_ends([job])
            return
        for i, job in enumerate(jobs):
            if not job.n_sampled:
                self._keep(job.ids, cache.row(states, i))
            job.begun = None
            for row in job.rows:
                row.paused = False
        copies = [i for i, job in enumerate(jobs) for _ in job.rows]
        if len(copies) > len(jobs):
            cache.select(states, copies)
            hidden_BD = hidden_BD[copies]
        self._batch.join([row for job in jobs for row in job.rows], states, hidden_BD)

    # ---- calls

    def _pause(self, job: Job, row: Row, at: int) -> None:
        """The row, `at` in the batch, leaves it until its call comes back."""
        assert job.request.guide is not None
        job.ids += row.ids[job.n_sampled :]
        job.n_sampled = len(row.ids)
        job.begun = Begun(len(job.ids) - 1, self._batch.take(at))  # its last token has not been read
        job.call = self._calls.start(job, job.request.guide)
        job.ticket.flush()

    def resume(self) -> None:
        """What calls have brought is to be read now."""
        for called in self._calls.done():
            job, reason = called.who, called.finish_reason
            if job not in self._jobs:
                continue
            job.call = None
            job.ids += called.ids
            job.ticket.result_tokens += len(called.ids)
            self.prompt_tokens += len(called.ids)
            if called.error is None and reason:  # no room for more
                job.ticket.emit(Event(0, job.rows[0].stream.finish(), [], [], reason, []))
            if reason:
                self._end_job(job, reason, called.error)

    # ---- decoding

    def decode(self) -> None:
        """Feed each row its latest token; rows that have ended leave."""
        if not self._batch.rows:
            return
        try:
            self._batch.step([row.ids[-1] if row.active else 0 for row in self._batch.rows])
        except Exception as error:
            self._fail(error)

    def sample(self) -> None:
        """The next token of each row."""
        rows = self._batch.rows
        if not rows:
            return
        try:
            broken = self._batch.broken()
            chosen = self._choose([self._job_of[row.number].request for row in rows])
        except Exception as error:
            return self._fail(error)
        for i, (row, choice) in enumerate(zip(rows, chosen)):
            if i in broken:
                self._break(row, NanochatError(NOT_FINITE))
            else:
                self._advance(row, *choice)
            if row.paused:
                self._pause(self._job_of[row.number], row, i)
        finished = [row for row in rows if row.finish_reason]
        self._keep_answers([row for row in finished if row.finish_reason != "error"])
        for row in finished:
            del self._job_of[row.number]
        for job in [job for job in self._jobs if not job.unfinished]:
            self._end_job(job, job.rows[0].finish_reason)

    def _choose(self, requests: Sequence[Request]) -> list[tuple[int, float, Likely]]:
        """For each row its token, the log-probability, and the most likely tokens where they are asked for. Rows with
        the same filters are drawn together."""
        logits_BV = self.model.logits(self._batch.hidden_BD)
        for i, request in enumerate(requests):
            if request.guide is not None and request.guide.forbidden:
                logits_BV[i, list(request.guide.forbidden)] = -torch.inf
        likely = [most_likely(logits_BV[i], request.top_logprobs) for i, request in enumerate(requests)]
        alike: dict[tuple[float, ...], list[int]] = {}
        for i, request in enumerate(requests):
            s = request.sampling
            alike.setdefault((s.temperature, s.top_k, s.top_p, s.min_p), []).append(i)
        chosen: dict[int, tuple[int, float]] = {}
        for members in alike.values():
            some_BV = logits_BV if len(alike) == 1 else logits_BV[members]
            streams = [self._batch.rows[i].random for i in members]
            chosen |= zip(members, zip(*sample(some_BV, requests[members[0]].sampling, streams)))
        return [(*chosen[i], likely[i]) for i in range(len(requests))]

    def _advance(self, row: Row, token: int, logprob: float, likely: Likely) -> None:
        """Give a row its token, and the consumer the event."""
        job = self._job_of[row.number]
        try:
            text = job.engine.advance(row, token, logprob)
            if (guide := job.request.guide) is not None:
                reason = guide.take(token, logprob)
                if reason and not row.finish_reason:
                    text += row.stream.finish()
                row.finish_reason = reason or row.finish_reason
                row.paused = guide.paused and not row.finish_reason
        except Exception as error:  # a decoder's, or a guide's
            return self._break(row, error)
        self.completion_tokens += 1
        index = row.number - job.rows[0].number
        job.ticket.emit(Event(index, text, [token], [logprob], row.finish_reason, [likely] if likely else []))

    def _break(self, row: Row, error: Exception) -> None:
        """End one row; the others go on."""
        job = self._job_of[row.number]
        job.ticket.error, row.finish_reason = error, "error"
        job.ticket.emit(Event(row.number - job.rows[0].number, "", [], [], "error", []))

    def _fail(self, error: Exception) -> None:
        """The pass of all rows failed: their states may have advanced in some layers only."""
        self._batch = Batch(self.model)
        for job in [job for job in self._jobs if job.begun is None]:
            self._end_job(job, "error", error)

    # ---- the prefix cache

    def _keep(self, ids: Sequence[int], states: list[State]) -> None:
        if self.prefixes is None:
            return
        try:
            self.prefixes.put(ids, states)
        except Exception as error:  # no memory, say; the requests go on without
            log.warning("states of %d tokens could not be kept: %s", len(ids), error)

    def _keep_answers(self, rows: Sequence[Row]) -> None:
        """The states after prompt and answer: the next turn of the conversation begins with them."""
        at = {row.number: i for i, row in enumerate(self._batch.rows)}
        for row in rows:
            job = self._job_of[row.number]
            if row.number in at and job.request.guide is None:  # its last token has not been read
                ids = [*job.ids, *row.ids[:-1]]
                self._keep(ids, cache.row(self._batch.states, at[row.number]))


def most_likely(logits_V: Tensor, k: int) -> Likely:
    """The k most likely tokens, best first."""
    if not k:
        return []
    values, ids = torch.log_softmax(logits_V, dim=-1).topk(min(k, logits_V.numel()))
    return list(zip(ids.tolist(), values.tolist()))
