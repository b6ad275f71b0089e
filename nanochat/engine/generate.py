"""Prompts to completions: prefill, decode, and the Engine that keeps a batch of rows going.

Rows of different lengths share every forward pass without padding; a row that ends leaves the batch and makes room for
the next prompt. The engine holds one state a layer and never asks what kind it is.

Letters: B rows, N tokens of several rows laid end to end, D model width, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from nanochat.engine import cache
from nanochat.engine.prefix import Begun, PrefixCache, document_boundaries
from nanochat.engine.sampling import Sampling, Stream, sample
from nanochat.engine.slots import Slots
from nanochat.engine.text import Decoder, TextStream
from nanochat.errors import UsageError
from nanochat.model.lm import LM
from nanochat.model.mixer import State
from nanochat.tokenizer import StreamDecoder, Tokenizer

MAX_ROWS = 64  # rows that decode together
PREFILL_TOKENS = 2048  # tokens in one forward pass of the prefill
NOT_FINITE = "the model's hidden states are not finite: its weights may be damaged"
MAX_PADDING = 1.25  # a mixer works on the padded form of a prefill group: keep it at most so much larger


class Completion(NamedTuple):
    """What one row produced. `ids` holds every sampled token, the end token included; `text` ends before the end token
    or stop string; `logprobs` (nats, under the model at temperature 1) go with `ids`; `finish_reason` is `stop` (end
    token or stop string) or `length` (max_tokens, or the context is full)."""

    ids: list[int]
    text: str
    logprobs: list[float]
    finish_reason: str


class Prompt(NamedTuple):
    """Token ids, and the offsets at which a PrefixCache takes snapshots."""

    ids: Sequence[int]
    boundaries: Sequence[int] = ()


@dataclass
class Row:
    """One completion on its way."""

    number: int  # where its completion goes in the result
    budget: int  # tokens it may still sample
    random: Stream
    stream: TextStream
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    finish_reason: str = ""
    paused: bool = False  # waits for a call, see `batching`

    @property
    def active(self) -> bool:
        return not (self.finish_reason or self.paused)

    def completion(self) -> Completion:
        return Completion(self.ids, "".join(self.text), self.logprobs, self.finish_reason)


class Decoding(Protocol):
    """What a batch needs to know of a row."""

    budget: int
    random: Stream

    @property
    def active(self) -> bool:
        """Whether the row takes part in the next step."""


AnyRow = TypeVar("AnyRow", bound=Decoding)


def prefill(
    model: LM, prompts: Sequence[Sequence[int]], room: int = 0, begun: Sequence[Begun] | None = None
) -> tuple[list[State], Tensor]:
    """Read the prompts. Returns states with these prompts as rows, in order, with room for `room` more tokens, and the
    hidden states (B, D) of each prompt's last token. `begun`: the beginnings of the prompts that have been read already
    (their states are used up); only what follows is read.

    See `read_in_groups`.
    """
    groups = list(read_in_groups(model, prompts, room, begun))
    order = [i for group in groups for i in group.rows]
    hidden_BD = torch.cat([group.hidden_BD for group in groups])
    states = cache.join([group.states for group in groups], model.init_states(1), room)
    rows = sorted(range(len(order)), key=order.__getitem__)
    if rows != list(range(len(rows))):
        cache.select(states, rows)
    return states, hidden_BD[rows]


class Read(NamedTuple):
    """Rows that have been read together: which prompts, their states, and the hidden state of each one's last token."""

    rows: list[int]
    states: list[State]
    hidden_BD: Tensor


def read_in_groups(
    model: LM, prompts: Sequence[Sequence[int]], room: int = 0, begun: Sequence[Begun] | None = None
) -> Iterator[Read]:
    """As `prefill`, group by group: rows of similar length go through the model together, end to end, at most
    PREFILL_TOKENS in a pass; a longer prompt takes several passes."""
    if begun is not None:
        prompts = [prompt[start.n :] for prompt, start in zip(prompts, begun)]
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    for group in _groups([len(prompts[i]) for i in order]):
        rows = order[group.start : group.stop]
        members = [prompts[i] for i in rows]
        if begun is None:
            states = model.init_states(len(members), max(map(len, members)) + room)
        else:
            more = max(map(len, members)) + room
            states = cache.join([begun[i].states for i in rows], model.init_states(1), more)
        yield Read(rows, states, _read(model, members, states))


def _groups(lengths: Sequence[int]) -> list[range]:
    """Cut rows, sorted by length from long to short, into groups that share a forward pass."""
    groups, start, tokens = [], 0, 0
    for i, n in enumerate(lengths):
        padded = lengths[start] * (i + 1 - start)
        if i > start and (tokens + n > PREFILL_TOKENS or padded > MAX_PADDING * (tokens + n)):
            groups.append(range(start, i))
            start, tokens = i, 0
        tokens += n
    groups.append(range(start, len(lengths)))
    return groups


def _read(model: LM, prompts: Sequence[Sequence[int]], states: list[State]) -> Tensor:
    """One group of prompts through the model; the hidden state (B, D) of each one's last token."""
    if len(prompts) == 1:
        ids_1N = torch.tensor([list(prompts[0])], device=model.device)
        for chunk_1N in ids_1N.split(PREFILL_TOKENS, dim=1):
            hidden_1ND = model(chunk_1N, states)
        return hidden_1ND[:, -1]
    lengths = [len(prompt) for prompt in prompts]
    flat = torch.tensor([[i for prompt in prompts for i in prompt]], device=model.device)
    last_B = torch.tensor(lengths, device=model.device).cumsum(0) - 1
    return model(flat, states, lengths=lengths)[0, last_B]


def decode(model: LM, ids: Sequence[int], states: list[State]) -> Tensor:
    """One token for each row: the hidden states (B, D) after it."""
    return model(torch.tensor(ids, device=model.device)[:, None], states)[:, 0]


class Batch(Generic[AnyRow]):
    """Rows that decode together. `hidden_BD` is what the model made of each row's latest token."""

    def __init__(self, model: LM) -> None:
        self.model = model
        self.rows: list[AnyRow] = []
        self.states: list[State] = []
        self._slots: Slots | None = None  # made when rows join others or leave them
        self.hidden_BD = torch.empty(0)

    @torch.no_grad()
    def admit(self, rows: Sequence[AnyRow], prompts: Sequence[Prompt], n: int, prefixes: PrefixCache | None) -> None:
        """Prefill each prompt once, from the longest beginning that `prefixes` holds, and let `n` rows go on from
        it."""
        room = max(row.budget for row in rows) if n == 1 else 0
        begun = None
        if prefixes is not None:
            begun = [prefixes.begin(prompt.ids, prompt.boundaries, room, PREFILL_TOKENS) for prompt in prompts]
        states, hidden_BD = prefill(self.model, [prompt.ids for prompt in prompts], room, begun)
        if n > 1:
            states, hidden_BD = cache.fork(states, n), hidden_BD.repeat_interleave(n, dim=0)
            cache.reserve(states, max(row.budget for row in rows))
        self.join(rows, states, hidden_BD)

    @torch.no_grad()
    def join(self, rows: Sequence[AnyRow], states: list[State], hidden_BD: Tensor) -> None:
        """Rows that were read elsewhere go on here."""
        if self.rows:
            if self._slots is None:
                self._slots = Slots(self.states, self.model.init_states(1), len(rows))
            self._slots.join(states)
            states, hidden_BD = self._slots.states, torch.cat((self.hidden_BD, hidden_BD))
        self.rows, self.states, self.hidden_BD = [*self.rows, *rows], states, hidden_BD

    def take(self, i: int) -> list[State]:
        """A copy of the states of row i, as one row."""
        return [state.snapshot() for state in cache.row(self.states, i)]

    def broken(self) -> set[int]:
        """Rows whose hidden states are no numbers; they are set to zero, so that the others can be sampled."""
        bad_B = ~torch.isfinite(self.hidden_BD).all(dim=-1)
        if not bool(bad_B.any()):
            return set()
        self.hidden_BD = self.hidden_BD.masked_fill(bad_B[:, None], 0.0)
        return set(bad_B.nonzero()[:, 0].tolist())

    @torch.no_grad()
    def sample(self, sampling: Sampling) -> tuple[list[int], list[float]]:
        """The next token of each row and its log-probability."""
        return sample(self.model.logits(self.hidden_BD), sampling, [row.random for row in self.rows])

    @torch.no_grad()
    def step(self, ids: Sequence[int]) -> None:
        """Feed each row its token; rows that are not active any more leave first."""
        alive = [i for i, row in enumerate(self.rows) if row.active]
        if len(alive) < len(self.rows):
            alive = self._keep(alive)
        if self._slots is not None:
            self._slots.reserve(1)
            self.states = self._slots.states
        if alive:
            self.hidden_BD = decode(self.model, [ids[i] for i in alive], self.states)

    def _keep(self, rows: list[int]) -> list[int]:
        """Only these rows stay. Returns them in the order that they take now."""
        if not rows:
            self._slots, self.states = None, []
        else:
            if self._slots is None:
                self._slots = Slots(self.states, self.model.init_states(1))
            rows = self._slots.keep(rows)
        self.rows = [self.rows[i] for i in rows]
        return rows


def n_fresh(n_waiting: int, n_rows: int, n: int, max_rows: int) -> int:
    """How many prompts of `n` rows each to admit now. Not one by one: several are read in one pass."""
    if n_rows == 0:
        return min(n_waiting, max(1, max_rows // n))
    n_free = (max_rows - n_rows) // n
    return min(n_waiting, n_free) if n_free >= min(n_waiting, max(1, max_rows // (4 * n))) else 0


class Engine:
    """Generates text with one model. It changes neither the model nor the global random state.

    `eos`: tokens that end a row, by default the end of the answer and the beginning of the next document. `max_rows`:
    how many rows decode together. `skip_special`: special tokens leave no trace in the text; without it they appear by
    name, as in `Tokenizer.decode`. `decoder`: makes what turns a row's tokens into text, instead of these two ways.
    """

    def __init__(
        self,
        model: LM,
        tokenizer: Tokenizer,
        eos: Collection[int] | None = None,
        max_rows: int = MAX_ROWS,
        skip_special: bool = False,
        decoder: Callable[[], Decoder] | None = None,
    ) -> None:
        self.model, self.tokenizer, self.skip_special, self.decoder = model, tokenizer, skip_special, decoder
        self.eos = frozenset((tokenizer.eot, tokenizer.bos) if eos is None else eos)
        self.max_rows = max_rows

    def generate_batch(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling | None = None,
        n: int = 1,
        prefix_cache: PrefixCache | None = None,
        boundaries: Sequence[Sequence[int]] | None = None,
    ) -> list[Completion]:
        """`n` completions for each prompt (token ids): those of the first prompt, then those of the second…

        `prefix_cache`: go on from the beginnings of prompts that it holds, and store the states at each prompt's
        `boundaries` (offsets; default: after documents, see `prefix.document_boundaries`). Prompts with nothing in
        common are read faster without. Raises UsageError for an empty prompt or one longer than the model's context, or
        a cache of another model.
        """
        results: dict[int, Completion] = {}
        for steps in self._run(prompts, sampling or Sampling(), n, prefix_cache, boundaries):
            for row, _ in steps:
                if row.finish_reason:
                    results[row.number] = row.completion()
        return [results[i] for i in range(len(prompts) * n)]

    def stream(
        self,
        prompt: Sequence[int],
        sampling: Sampling | None = None,
        prefix_cache: PrefixCache | None = None,
        boundaries: Sequence[int] | None = None,
    ) -> Generator[str, None, Completion]:
        """The completion of one prompt, piece by piece. Pieces are whole characters and never belong to a stop string;
        the generator returns the Completion. Raises UsageError, and uses a cache, as `generate_batch` does."""
        rows: list[tuple[Row, str]] = []
        offsets = None if boundaries is None else [boundaries]
        for rows in self._run([prompt], sampling or Sampling(), 1, prefix_cache, offsets):
            if rows[0][1]:
                yield rows[0][1]
        return rows[0][0].completion()

    def check(self, prompts: Sequence[Sequence[int]]) -> None:
        """Raises UsageError unless every prompt has between one token and as many as the context holds."""
        context = self.model.config.sequence_len
        for i, prompt in enumerate(prompts):
            name = "the prompt" if len(prompts) == 1 else f"prompt {i}"
            if not prompt:
                raise UsageError(f"{name} is empty; it needs at least one token")
            if len(prompt) > context:
                raise UsageError(f"{name} has {len(prompt)} tokens, the model's context only {context}; shorten it")

    def _run(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        n: int,
        prefixes: PrefixCache | None = None,
        boundaries: Sequence[Sequence[int]] | None = None,
    ) -> Iterator[list[tuple[Row, str]]]:
        """After every step: the rows that took part, each with the text it released."""
        if n < 1:
            raise UsageError(f"n={n}: expected at least one completion a prompt")
        self.check(prompts)
        if prefixes is not None:
            prefixes.bind(self.model)
            if boundaries is None:
                boundaries = [document_boundaries(prompt, self.tokenizer, prefixes.spacing) for prompt in prompts]
            elif len(boundaries) != len(prompts):
                raise UsageError(f"{len(boundaries)} lists of boundaries for {len(prompts)} prompts; give one for each")
        waiting = deque(range(len(prompts)))
        batch: Batch[Row] = Batch(self.model)
        while waiting or batch.rows:
            n_admitted = n_fresh(len(waiting), len(batch.rows), n, self.max_rows)
            if n_admitted:
                fresh = [waiting.popleft() for _ in range(n_admitted)]
                rows = [self.row(i * n + j, j, prompts[i], sampling) for i in fresh for j in range(n)]
                batch.admit(rows, [Prompt(prompts[i], boundaries[i] if boundaries else ()) for i in fresh], n, prefixes)
            ids, logprobs = batch.sample(sampling)
            yield [(row, self.advance(row, i, logprob)) for row, i, logprob in zip(batch.rows, ids, logprobs)]
            batch.step(ids)

    def row(self, number: int, nth: int, prompt: Sequence[int], sampling: Sampling) -> Row:
        """The nth completion of a prompt, before its first token."""
        # The last token sampled is not fed back, so it needs no place in the context.
        budget = min(sampling.max_tokens, self.model.config.sequence_len - len(prompt) + 1)
        decoder = self.decoder() if self.decoder else StreamDecoder(self.tokenizer, self.skip_special)
        return Row(number, budget, Stream(sampling.seed, nth), TextStream(decoder, sampling.stop))

    def advance(self, row: Row, token: int, logprob: float) -> str:
        """Give the row its token; the text that this releases. Sets `finish_reason` when the row ends."""
        row.ids.append(token)
        row.logprobs.append(logprob)
        if token in self.eos:
            row.finish_reason, piece = "stop", row.stream.finish()
        else:
            piece = row.stream.push(token)
            if not row.stream.stopped and len(row.ids) >= row.budget:
                row.finish_reason = "length"
                piece += row.stream.finish()
            if row.stream.stopped:
                row.finish_reason = "stop"
        row.text.append(piece)
        return piece
