"""A text of any length, read piece by piece, put away, and gone on with.

    reading = Reading(engine)
    reading.read(first_half).read(second_half)
    reading.generate("Who was it?")          # what was read stays as it was
    reading.save("book.state")
    Reading.load(engine, "book.state")       # days later, in milliseconds

A Mamba model remembers any text in a state of one size; attention adds its keys and values, token by token.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path

import torch

from nanochat.engine import cache
from nanochat.engine.generate import PREFILL_TOKENS, Batch, Completion, Engine, Row, prefill
from nanochat.engine.prefix import Begun
from nanochat.engine.sampling import Sampling
from nanochat.engine.state_file import load_states, save_states
from nanochat.errors import UsageError
from nanochat.model.mixer import State
from nanochat.runtime import log

Text = str | Sequence[int]  # ids are taken as they are


class Reading:
    """What a model has read of one text: its states and how many tokens they stand for.

    Pieces are encoded each by itself, so cut a text where words end. Nothing limits the number of tokens; a model with
    attention was trained on positions up to its context only, and a warning says when they are used up.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.n_tokens = 0
        self.states: list[State] = engine.model.init_states(1)
        self.hidden_BD = torch.empty(0, engine.model.config.d_model, device=engine.model.device)
        self.warned = False

    @property
    def nbytes(self) -> int:
        """Bytes of the states."""
        return cache.nbytes(self.states)

    def ids(self, text: Text) -> list[int]:
        """The tokens of the next piece: with <|bos|> in front of the first one."""
        if isinstance(text, str):
            return self.engine.tokenizer.encode(text, bos=not self.n_tokens)
        return list(text)

    @torch.no_grad()
    def read(self, text: Text) -> Reading:
        """Read on, in passes of a few thousand tokens; returns itself."""
        ids = self.ids(text)
        for start in range(0, len(ids), PREFILL_TOKENS):
            part = ids[start : start + PREFILL_TOKENS]
            self.states, self.hidden_BD = prefill(self.engine.model, [part], begun=[Begun(0, self.states)])
            self.n_tokens += len(part)
        self.warn()
        return self

    def warn(self) -> None:
        config = self.engine.model.config
        if self.n_tokens > config.sequence_len and "T" in config.blocks and not self.warned:
            log.warning(
                "%d tokens read: attention layers were trained on the first %d positions only. A window (--window), "
                "--no-rope or a model without attention goes further", self.n_tokens, config.sequence_len,
            )  # fmt: skip
            self.warned = True

    def fork(self) -> Reading:
        """A copy that goes its own way."""
        other = Reading(self.engine)
        other.states = [state.snapshot() for state in self.states]
        other.n_tokens, other.hidden_BD, other.warned = self.n_tokens, self.hidden_BD.clone(), self.warned
        return other

    def generate(self, text: Text = "", sampling: Sampling | None = None, n: int = 1) -> list[Completion]:
        """`n` completions of what was read and then `text`; this reading stays where it is.

        Raises UsageError when there is nothing to go on from.
        """
        batch = self._begin(text, sampling or Sampling(), n)
        rows = list(batch.rows)
        while any(row.active for row in batch.rows):
            self._step(batch, sampling or Sampling())
        return [row.completion() for row in rows]

    def stream(self, text: Text = "", sampling: Sampling | None = None) -> Generator[str, None, Completion]:
        """One completion, piece by piece; the generator returns it whole."""
        batch = self._begin(text, sampling or Sampling(), 1)
        row = batch.rows[0]
        while row.active:
            if piece := self._step(batch, sampling or Sampling())[0]:
                yield piece
        return row.completion()

    def save(self, path: str | Path) -> Path:
        """Write it to a file. Raises NanochatError when that fails."""
        about = {"n_tokens": self.n_tokens}
        tokenizer = self.engine.tokenizer.hash
        return save_states(path, self.states, self.engine.model, tokenizer, about, hidden=self.hidden_BD)

    @classmethod
    def load(cls, engine: Engine, path: str | Path) -> Reading:
        """What `save` wrote, for the same model and tokenizer (else UsageError; NanochatError for a damaged file)."""
        reading = cls(engine)
        reading.states, about, more = load_states(path, engine.model, engine.tokenizer.hash)
        reading.n_tokens, reading.hidden_BD = int(about["n_tokens"]), more["hidden"]
        return reading

    # ---- generation

    def _begin(self, text: Text, sampling: Sampling, n: int) -> Batch[Row]:
        if n < 1:
            raise UsageError(f"n={n}: expected at least one completion")
        ahead = self.fork().read(text) if len(text) else self.fork()
        if not ahead.n_tokens:
            raise UsageError("nothing was read yet: give a text to go on from")
        rows = [self.engine.row(i, i, (), sampling) for i in range(n)]
        states = cache.fork(ahead.states, n) if n > 1 else ahead.states
        cache.reserve(states, max(row.budget for row in rows))
        batch: Batch[Row] = Batch(self.engine.model)
        batch.join(rows, states, ahead.hidden_BD.repeat_interleave(n, dim=0))
        return batch

    def _step(self, batch: Batch[Row], sampling: Sampling) -> list[str]:
        """One token for every row; the text that it released."""
        ids, logprobs = batch.sample(sampling)
        pieces = [self.engine.advance(*step) for step in zip(batch.rows, ids, logprobs)]
        batch.step(ids)
        return pieces
