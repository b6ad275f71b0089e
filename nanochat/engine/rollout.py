"""Rollouts: many conversations at once in which the model calls tools; for chat, evaluation and training alike.

A row that ends a call pauses: it leaves the batch, and its state waits. The calls of all paused rows go to each tool
together, and the results are read into the rows' states, rows of different lengths end to end in one pass, together
with the token that ended the call. So every token is read once, and samples of one prompt share its reading.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from nanochat.engine.generate import MAX_ROWS, NOT_FINITE, Batch, Prompt, n_fresh, read_in_groups
from nanochat.engine.prefix import Begun, PrefixCache, turn_boundaries
from nanochat.engine.sampling import Sampling, Stream, sample
from nanochat.engine.tools import Call, Request, Tool
from nanochat.errors import NanochatError, UsageError
from nanochat.model.lm import LM
from nanochat.model.mixer import State
from nanochat.tokenizer import Tokenizer

MAX_CALL_TOKENS = 64

__all__ = ["Call", "Guided", "Rollout", "Step", "rollouts", "steps"]


class Rollout(NamedTuple):
    """What one row became. `ids` holds all tokens behind the prompt, results of calls included; `sampled` is False on
    those that the model did not choose (results: never trained on), and `logprobs` (nats, under the model at
    temperature 1) is 0 there. The three have one length.

    finish_reason: `stop` (end token), `length` (max_tokens, or the context is full), `calls` (the row wanted more calls
    than max_calls) or `error` (`error` says what failed; the other rows went on).
    """

    prompt: list[int]
    ids: list[int]
    sampled: list[bool]
    logprobs: list[float]
    calls: tuple[Call, ...]
    finish_reason: str
    error: str = ""


class Step(NamedTuple):
    """Tokens that a row just got: one that was sampled, or the result of its latest call. `finished` with its last."""

    row: int
    ids: list[int]
    sampled: bool
    finished: Rollout | None = None


def rollouts(
    model: LM,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling | None = None,
    n: int = 1,
    tools: Sequence[Tool] = (),
    max_calls: int = 3,
    **options: Any,
) -> list[Rollout]:
    """`n` rollouts for each prompt (token ids that end with <|assistant_start|>): those of the first prompt, then those
    of the second… `max_calls`: of a row, all tools together. Options: the fields of `Limits`, `max_rows` and `eos` as
    in `Engine`.

    Rows do not depend on each other: a prompt that is empty or longer than the context, a tool that raises and hidden
    states that are no numbers end the row concerned with `error`. Raises UsageError for options out of range.
    """
    found: dict[int, Rollout] = {}
    for some in steps(model, tokenizer, prompts, sampling, n, tools, max_calls, **options):
        found |= {step.row: step.finished for step in some if step.finished}
    return [found[i] for i in range(len(prompts) * n)]


def steps(
    model: LM,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling | None = None,
    n: int = 1,
    tools: Sequence[Tool] = (),
    max_calls: int = 3,
    *,
    max_rows: int = MAX_ROWS,
    eos: Sequence[int] | None = None,
    until: Callable[[int, int], bool] | None = None,
    streams: Sequence[int] | None = None,
    prefix_cache: PrefixCache | None = None,
    **limits: Any,
) -> Iterator[list[Step]]:
    """As `rollouts`, step by step: what each row just got. `until` is asked about every token that was sampled (number
    of the row, token) and may end the row with it. `streams`: a number for each prompt, whose samples then have random
    numbers of their own; without, prompts share theirs, and samples of equal rank are lucky together. `prefix_cache`:
    go on from the beginnings of prompts that it holds, and store the states after messages: for conversations that come
    back."""
    chosen, allowed = sampling or Sampling(), Limits(max_calls, **limits)
    runner = _Runner(model, tokenizer, chosen, tools, allowed, eos, until, prefix_cache)
    return runner.run(prompts, n, max_rows, streams)


@dataclass(frozen=True)
class Limits:
    """What a row may do. Raises UsageError for values out of range."""

    max_calls: int = 3
    max_call_tokens: int = MAX_CALL_TOKENS  # of one call; a longer one is an error of the row
    max_result_tokens: int = 512  # of one result; a tool fits its result, or its texts are shortened
    at_limit: str = "end"  # a row that wants one call too many ends; "forbid": it cannot even begin one

    def __post_init__(self) -> None:
        for name, least in (("max_calls", 0), ("max_call_tokens", 1), ("max_result_tokens", 8)):
            if getattr(self, name) < least:
                raise UsageError(f"{name}={getattr(self, name)}: expected at least {least}")
        if self.at_limit not in ("end", "forbid"):
            raise UsageError(f"at_limit={self.at_limit!r}: must be 'end' or 'forbid'")


@dataclass
class _Row:
    """One rollout on its way."""

    number: int
    of_prompt: int
    prompt: list[int]
    budget: int  # tokens that it may sample
    random: Stream
    ids: list[int] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    tool: Tool | None = None  # the one whose call is open
    opened: int = 0  # where in ids its text begins
    n_sampled: int = 0
    calls_left: int = 0
    paused: bool = False
    finish_reason: str = ""
    error: str = ""

    @property
    def active(self) -> bool:
        return not (self.paused or self.finish_reason)

    @property
    def n_tokens(self) -> int:
        return len(self.prompt) + len(self.ids)

    def append(self, ids: Sequence[int], sampled: bool, logprob: float = 0.0) -> None:
        self.ids += ids
        self.sampled += [sampled] * len(ids)
        self.logprobs += [logprob] * len(ids)

    def end(self, reason: str, error: str = "") -> None:
        self.finish_reason, self.error = reason, error

    def step(self, ids: list[int], sampled: bool) -> Step:
        return Step(self.number, ids, sampled, self.rollout() if self.finish_reason else None)

    def rollout(self) -> Rollout:
        calls = tuple(self.calls)
        return Rollout(self.prompt, self.ids, self.sampled, self.logprobs, calls, self.finish_reason, self.error)


class _Runner:
    """The loop."""

    def __init__(
        self,
        model: LM,
        tokenizer: Tokenizer,
        sampling: Sampling,
        tools: Sequence[Tool],
        limits: Limits,
        eos: Sequence[int] | None,
        until: Callable[[int, int], bool] | None,
        prefixes: PrefixCache | None,
    ) -> None:
        if sampling.stop:
            raise UsageError("rollouts know no stop strings: leave `stop` empty, and end rows with `until`")
        self.model, self.tokenizer, self.sampling, self.limits = model, tokenizer, sampling, limits
        self.until, self.prefixes = until, prefixes
        if prefixes is not None:
            prefixes.bind(model)
        self.eos = frozenset((tokenizer.eot, tokenizer.bos) if eos is None else eos)
        self.context = model.config.sequence_len
        self.tools = {tokenizer.special(tool.start): tool for tool in tools}
        self.ends = {start: tokenizer.special(tool.end) for start, tool in self.tools.items()}
        if len(self.tools) < len(tools):
            raise UsageError("two tools begin with the same token: " + ", ".join(tool.name for tool in tools))
        self.batch: Batch[_Row] = Batch(model)
        self.paused: list[tuple[_Row, list[State]]] = []

    def run(
        self, prompts: Sequence[Sequence[int]], n: int, max_rows: int, streams: Sequence[int] | None = None
    ) -> Iterator[list[Step]]:
        """After every step, what rows got."""
        if n < 1 or max_rows < 1:
            raise UsageError(f"n={n}, max_rows={max_rows}: expected at least 1")
        of = [0] * len(prompts) if streams is None else [stream * n for stream in streams]
        rows = [[self.row(i * n + j, i, prompt, of[i] + j) for j in range(n)] for i, prompt in enumerate(prompts)]
        yield [row.step([], False) for group in rows for row in group if not row.active]
        waiting = deque(group for group in rows if group[0].active)
        batch = self.batch
        while waiting or batch.rows or self.paused:
            n_admitted = n_fresh(len(waiting), len(batch.rows) + len(self.paused), n, max_rows)
            if n_admitted:
                groups = [waiting.popleft() for _ in range(n_admitted)]
                read = [self.prompt(group[0].prompt) for group in groups]
                batch.admit([row for group in groups for row in group], read, n, self.prefixes)
            if self.paused and 4 * len(self.paused) >= len(batch.rows):  # calls are cheaper together, full batches too
                yield self.resume()
            if batch.rows:
                yield self.advance()

    def prompt(self, ids: Sequence[int]) -> Prompt:
        """Token ids, and where a prefix cache takes snapshots."""
        if self.prefixes is None:
            return Prompt(ids)
        return Prompt(ids, turn_boundaries(ids, self.tokenizer, self.prefixes.spacing))

    def row(self, number: int, of_prompt: int, prompt: Sequence[int], nth: int) -> _Row:
        # The last token sampled is not fed back, so it needs no place in the context.
        budget = min(self.sampling.max_tokens, self.context - len(prompt) + 1)
        row = _Row(number, of_prompt, list(prompt), budget, Stream(self.sampling.seed, nth))
        row.calls_left = self.limits.max_calls
        if not prompt:
            row.end("error", "the prompt is empty; it needs at least one token")
        elif len(prompt) > self.context:
            row.end("error", f"the prompt has {len(prompt)} tokens, the model's context only {self.context}")
        return row

    # ---- sampling

    def advance(self) -> list[Step]:
        """One token for each row of the batch; rows that end or pause leave it."""
        batch = self.batch
        broken = batch.broken()
        ids, logprobs = self.sample()
        found = []
        for i, row in enumerate(batch.rows):
            if i in broken:
                row.end("error", NOT_FINITE)
                found.append(row.step([], False))
                continue
            row.append([ids[i]], True, logprobs[i])
            row.n_sampled += 1
            self.judge(row, ids[i])
            if row.paused:
                self.paused.append((row, batch.take(i)))
            found.append(row.step([ids[i]], True))
        batch.step(ids)
        return found

    @torch.no_grad()
    def sample(self) -> tuple[list[int], list[float]]:
        batch = self.batch
        logits_BV = self.model.logits(batch.hidden_BD)
        if self.limits.at_limit == "forbid" and self.tools:
            full = [i for i, row in enumerate(batch.rows) if not row.calls_left]
            for start in self.tools:
                logits_BV[full, start] = -torch.inf
        return sample(logits_BV, self.sampling, [row.random for row in batch.rows])

    def judge(self, row: _Row, token: int) -> None:
        """Whether the row ends, begins a call, or pauses with this token."""
        if token in self.eos or (self.until is not None and self.until(row.number, token)):
            return row.end("stop")
        if row.tool is None:
            if token in self.tools:
                if not row.calls_left:
                    return row.end("calls")
                row.tool, row.opened = self.tools[token], len(row.ids)
        elif token == self.tokenizer.special(row.tool.end):
            row.paused = True
        elif len(row.ids) - row.opened > self.limits.max_call_tokens:
            return row.end("error", f"the call of {row.tool.name} has more than {self.limits.max_call_tokens} tokens")
        if row.n_sampled >= self.sampling.max_tokens or row.n_tokens > self.context:
            row.paused = False
            row.end("length")

    # ---- calls

    def resume(self) -> list[Step]:
        """The calls of all paused rows, and their results read into the rows' states."""
        paused, self.paused = self.paused, []
        results = self.call([row for row, _ in paused])
        found, rows, begun, unread = [], [], [], []
        for (row, states), ids in zip(paused, results):
            row.paused, row.tool, last = False, None, row.ids[-1]
            row.append(ids, False)
            if row.active and row.n_tokens > self.context:
                row.end("length")
            found.append(row.step(ids, False))
            if row.active:
                rows.append(row)
                begun.append(Begun(0, states))
                unread.append([last, *ids])
        if rows:
            with torch.no_grad():
                for group in read_in_groups(self.model, unread, 0, begun):
                    self.batch.join([rows[i] for i in group.rows], group.states, group.hidden_BD)
        return found

    def call(self, rows: Sequence[_Row]) -> list[list[int]]:
        """The tokens of each row's result, its call noted; a row whose call failed has ended."""
        found: list[list[int]] = [[] for _ in rows]
        for tool in self.tools.values():
            members = [i for i, row in enumerate(rows) if row.tool is tool]
            if not members:
                continue
            began = time.perf_counter()
            requests = [self.request(rows[i]) for i in members]
            answers = _answers(tool, requests, self.tokenizer)
            seconds = time.perf_counter() - began
            for i, request, answer in zip(members, requests, answers):
                row = rows[i]
                if isinstance(answer, str):
                    row.end("error", answer)
                    continue
                row.calls_left = 0 if answer.last else row.calls_left - 1
                found[i] = answer.ids
                row.calls.append(Call(len(row.ids), request.text, answer.value, len(answer.ids), tool.name, seconds))
        return found

    def request(self, row: _Row) -> Request:
        said = [i for i in row.ids[row.opened :] if not self.tokenizer.is_special(i)]
        room = 3 * (self.context - row.n_tokens) // 4  # the rest is for what comes after
        text = self.tokenizer.decode(said).strip()
        return Request(text, row.of_prompt, tuple(row.calls), min(self.limits.max_result_tokens, room))


class Guided:
    """One rollout whose tokens are sampled elsewhere, beside other requests (`batching.Request.guide`): what it may
    not say, where it pauses or ends, and its calls. Arguments as those of `steps`."""

    def __init__(
        self,
        model: LM,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        sampling: Sampling,
        tools: Sequence[Tool],
        max_calls: int = 3,
        *,
        eos: Sequence[int] | None = None,
        until: Callable[[int, int], bool] | None = None,
        **limits: Any,
    ) -> None:
        self._runner = _Runner(model, tokenizer, sampling, tools, Limits(max_calls, **limits), eos, until, None)
        self._row = self._runner.row(0, 0, prompt, 0)

    @property
    def max_results(self) -> int:
        """Tokens that all calls may bring."""
        return self._runner.limits.max_calls * self._runner.limits.max_result_tokens

    @property
    def forbidden(self) -> Sequence[int]:
        """Tokens that may not come next."""
        runner = self._runner
        full = runner.limits.at_limit == "forbid" and not self._row.calls_left
        return list(runner.tools) if full else ()

    @property
    def paused(self) -> bool:
        """Whether it waits for `call`."""
        return self._row.paused

    @property
    def rollout(self) -> Rollout:
        """What it became so far."""
        return self._row.rollout()

    def take(self, token: int, logprob: float) -> str:
        """A token was sampled. Returns the finish reason, or nothing while it goes on or pauses."""
        self._row.append([token], True, logprob)
        self._row.n_sampled += 1
        self._runner.judge(self._row, token)
        return self._row.finish_reason

    def call(self) -> list[int]:
        """The result for which it paused, to be read next. The call may fail and the context be full: the rollout then
        has a finish reason."""
        row = self._row
        (ids,) = self._runner.call([row])
        row.paused, row.tool = False, None
        row.append(ids, False)
        if row.active and row.n_tokens > self._runner.context:
            row.end("length")
        return ids


class _Answer(NamedTuple):
    """A result as tokens."""

    ids: list[int]
    value: Any
    last: bool


def _answers(tool: Tool, requests: Sequence[Request], tokenizer: Tokenizer) -> list[_Answer | str]:
    """The results; the error's text for a request that, given alone, fails."""
    try:
        results = list(tool.run(requests))
        if len(results) != len(requests):
            raise NanochatError(f"{len(results)} results for {len(requests)} calls")
        ids = [tokenizer.render_parts(r.parts, q.max_tokens).ids for r, q in zip(results, requests)]
    except Exception as error:  # a tool may raise anything, and the other rows go on
        if len(requests) > 1:
            return [answer for request in requests for answer in _answers(tool, [request], tokenizer)]
        reason = str(error) if isinstance(error, NanochatError) else repr(error)
        return [f"{tool.name} failed on {requests[0].text!r:.100}: {reason}"]
    return [_Answer(each, result.value, result.last) for each, result in zip(ids, results)]
