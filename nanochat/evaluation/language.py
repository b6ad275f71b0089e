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


def bits_per_byte(model: LM, batches: Iterable[Batch], tokenizer: Tokenizer) -> Losses:
    """Losses of `model` over `batches`. Special tokens stand for no bytes and do not count in bits per byte.

    Raises NanochatError when there is nothing to evaluate.
    """
    token_bytes = torch.from_numpy(np.asarray(tokenizer.token_bytes, dtype=np.int64))
    nats, tokens, text_nats, n_bytes = 0.0, 0, 0.0, 0
    was_training = model.training
    model.eval()
    for batch in batches:
        nll = model.nll(*(x.to(model.device) for x in (batch.inputs, batch.targets, batch.segments))).double().cpu()
        counted = batch.targets != IGNORED
        size = token_bytes[batch.targets.clamp(min=0)] * counted
        nats += float(nll.sum())
        tokens += int(counted.sum())
        text_nats += float(nll[size > 0].sum())
        n_bytes += int(size.sum())
    model.train(was_training)
    total = Losses(all_reduce_sum(nats), all_reduce_sum(tokens), all_reduce_sum(text_nats), all_reduce_sum(n_bytes))
    if not total.tokens:
        raise NanochatError("there are no validation tokens: give more data, or a larger --eval_tokens")
    return total._replace(n_bytes=max(1, total.n_bytes))
