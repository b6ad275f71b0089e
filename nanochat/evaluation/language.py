"""Language modelling: nats a token and bits a byte, the measure that does not depend on the tokenizer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch

from nanochat.data.batches import IGNORED, Batch
from nanochat.errors import NanochatError
from nanochat.model.lm import LM
from nanochat.runtime import all_reduce_sum
from nanochat.tokenizer import Tokenizer


class Losses(NamedTuple):
    """Sums over all counted targets, over all ranks."""

    nats: float
    tokens: int
    text_nats: float  # of targets that stand for bytes (special tokens left out)
    n_bytes: int

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float:
        return self.text_nats / math.log(2) / self.n_bytes


class RowLosses(NamedTuple):
    """Sums over the targets of each row, float64; this rank's rows only."""

    nats: np.ndarray
    tokens: np.ndarray
    text_nats: np.ndarray
    n_bytes: np.ndarray


def row_losses(model: LM, batches: Iterable[Batch], tokenizer: Tokenizer) -> RowLosses:
    """Losses of `model` on every row of `batches`. Special tokens stand for no bytes: they are not in `text_nats`."""
    token_bytes = torch.from_numpy(np.asarray(tokenizer.token_bytes, dtype=np.int64))
    found: list[np.ndarray] = []
    was_training = model.training
    model.eval()
    for batch in batches:
        inputs, targets, segments = (x.to(model.device) for x in (batch.inputs, batch.targets, batch.segments))
        nll = model.nll(inputs, targets, segments).double().cpu()
        counted = batch.targets != IGNORED
        size = token_bytes[batch.targets.clamp(min=0)] * counted
        rows = (nll, counted, nll * (size > 0), size)
        found.append(torch.stack([x.double().sum(dim=1) for x in rows], dim=1).numpy())
    model.train(was_training)
    return RowLosses(*(np.concatenate(found).T if found else np.zeros((4, 0))))


def bits_per_byte(model: LM, batches: Iterable[Batch], tokenizer: Tokenizer) -> Losses:
    """Losses of `model` over `batches`, over all ranks.

    Raises NanochatError when there is nothing to evaluate.
    """
    rows = row_losses(model, batches, tokenizer)
    nats, tokens, text_nats, n_bytes = (all_reduce_sum(float(x.sum())) for x in rows)
    if not tokens:
        raise NanochatError("there are no validation tokens: give more data, or a larger --eval_tokens")
    return Losses(nats, round(tokens), text_nats, max(1, round(n_bytes)))
