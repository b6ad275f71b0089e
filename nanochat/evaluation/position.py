"""Long context: what a token's place in the row costs, and whether a number said once is still known.

*By position*: validation documents end to end, nothing reset between them, in rows longer than those of training. Every
place holds the same kind of text, so the loss may fall with the position (more to go by) and rises only where the model
fails to use, or is confused by, what lies further back than it ever saw.

*Passkey* (Mohtashami & Jaggi 2023, arXiv 2305.16300): a five-digit number in the middle of validation text; at the end
the model is asked for it. Right means that greedy decoding would say it. The gain is how many nats a token less the
number costs than where the text named another one: it shows recall long before answers are right.

Letters: B rows, T time.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat import runtime
from nanochat.data.corpus import Corpus
from nanochat.engine.generate import PREFILL_TOKENS
from nanochat.errors import NanochatError, UsageError
from nanochat.evaluation.chat import gather
from nanochat.intervals import Metric, mean, share
from nanochat.model.lm import LM
from nanochat.tokenizer import Tokenizer

FIRST_SPAN = 64  # tokens
SAID = " The pass key is {key}. Remember it. {key} is the pass key."
ASKED = " What is the pass key? The pass key is"


# ---- by position


def by_position(
    model: LM, tokenizer: Tokenizer, corpus: Corpus, length: int, n_rows: int, batch_size: int = 1, seed: int = 0
) -> dict[str, Metric]:
    """`nats_at_<first>_<last>` for spans of positions, in nats a token; and, where rows are longer than those of
    training, `nats_beyond_minus_within`: all positions beyond the training length against the second half of those
    within, row by row.

    Raises NanochatError when the validation split does not fill one row, UsageError for fewer than 2 positions.
    """
    if length < 2:
        raise UsageError(f"--position_len {length}: must be at least 2 tokens")
    rows = long_rows(corpus, tokenizer, length + 1, n_rows)
    if not rows:
        raise NanochatError(f"--position_len {length}: the validation split of {corpus.name} is shorter than one row")
    mine = rows[runtime.rank() :: runtime.world_size()]
    parts = [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]
    found = gather([row for part in parts for row in nats(model, torch.tensor(part)).double().numpy()])
    nll = np.stack(found)
    T = model.config.sequence_len
    metrics = {f"nats_at_{a}_{b - 1}": mean(nll[:, a:b].mean(1), seed) for a, b in spans(length, T)}
    if length > T:
        metrics["nats_beyond_minus_within"] = mean(nll[:, T:].mean(1) - nll[:, T // 2 : T].mean(1), seed)
    return metrics


def long_rows(corpus: Corpus, tokenizer: Tokenizer, n_tokens: int, n_rows: int) -> list[list[int]]:
    """Rows of `n_tokens` ids: the validation documents, each with its <|bos|>, end to end. At most `n_rows`."""
    ids: list[int] = []
    for text in corpus.documents("val"):
        ids += tokenizer.encode(text, bos=True)
        if len(ids) >= n_tokens * n_rows:
            break
    return [ids[i * n_tokens : (i + 1) * n_tokens] for i in range(min(n_rows, len(ids) // n_tokens))]


def spans(length: int, trained: int) -> Iterator[tuple[int, int]]:
    """[first, end) that double in length, with a border at the length of the training rows."""
    borders = {0, length, trained}
    end = FIRST_SPAN
    while end < length:
        borders.add(end)
        end *= 2
    ordered = sorted(b for b in borders if b <= length)
    yield from pairwise(ordered)


@torch.no_grad()
def nats(model: LM, ids_BT: Tensor) -> Tensor:
    """The negative log-likelihood of every token but the first, (B, T - 1) fp32 on the CPU. Rows of any length: they go
    through the model in chunks, with the state carried."""
    ids_BT = ids_BT.to(model.device)
    inputs, targets = ids_BT[:, :-1], ids_BT[:, 1:]
    chunk = max(1, PREFILL_TOKENS // len(ids_BT))
    states = model.init_states(len(ids_BT))
    parts = [
        model.nll(x, y, states=states) for x, y in zip(inputs.split(chunk, dim=1), targets.split(chunk, dim=1))
    ]
    return torch.cat(parts, 1).cpu()


# ---- passkey


class Passkey(NamedTuple):
    """A prompt with its answer, and the same prompt in which another key is named."""

    ids: list[int]
    control: list[int]
    answer: list[int]


def passkey(
    model: LM, tokenizer: Tokenizer, corpus: Corpus, lengths: Sequence[int], n_samples: int, seed: int = 0
) -> dict[str, Metric]:
    """`passkey_<tokens>` (share right) and `passkey_gain_<tokens>` (nats a token of the key) for each length, over keys
    in `n_samples` depths from the beginning of the text to its end.

    Raises UsageError for a length without room for the question, NanochatError when there is no validation text.
    """
    filler = [i for (i,) in long_rows(corpus, tokenizer, 1, 4 * max(lengths)) if not tokenizer.is_special(i)]
    if not filler:
        raise NanochatError(f"--passkey: the validation split of {corpus.name} holds no text")
    metrics: dict[str, Metric] = {}
    for length in lengths:
        mine = range(n_samples)[runtime.rank() :: runtime.world_size()]
        depths = [i / max(1, n_samples - 1) for i in range(n_samples)]
        draws = [(depths[i], random.Random(f"{seed}/{length}/{i}")) for i in mine]
        found = gather([judged(model, passkey_case(tokenizer, filler, length, *draw)) for draw in draws])
        metrics[f"passkey_{length}"] = share(sum(right for right, _ in found), len(found))
        metrics[f"passkey_gain_{length}"] = mean([gain for _, gain in found], seed)
    return metrics


def passkey_case(
    tokenizer: Tokenizer, filler: Sequence[int], length: int, depth: float, random: random.Random
) -> Passkey:
    """`length` tokens, the answer not counted: <|bos|>, text, the key at `depth` (0: at once, 1: right before the
    question), text, the question."""
    key, other = (str(n) for n in random.sample(range(10000, 100000), 2))
    asked = tokenizer.encode(ASKED)
    start = random.randrange(len(filler))

    def prompt(named: str) -> list[int]:
        said = tokenizer.encode(SAID.format(key=named))
        room = length - 1 - len(said) - len(asked)
        if room < 0:
            raise UsageError(f"--passkey {length}: the key and the question alone take {length - room} tokens")
        text = [filler[(start + i) % len(filler)] for i in range(room)]
        at = round(depth * room)
        return [tokenizer.bos, *text[:at], *said, *text[at:], *asked]

    return Passkey(prompt(key), prompt(other), tokenizer.encode(f" {key}"))


def judged(model: LM, case: Passkey) -> tuple[bool, float]:
    """Whether greedy decoding gives the key, and the nats a token that its having been named saves."""
    right, named = answered(model, case.ids, case.answer)
    _, unnamed = answered(model, case.control, case.answer)
    return right, unnamed - named


@torch.no_grad()
def answered(model: LM, prompt: Sequence[int], answer: Sequence[int]) -> tuple[bool, float]:
    """Whether greedy decoding answers so, and the nats a token of this answer. The prompt is read in chunks."""
    states = model.init_states(1, len(prompt) + len(answer))
    for chunk in torch.tensor([prompt[:-1]], device=model.device).split(PREFILL_TOKENS, dim=1):
        model(chunk, states)
    last = torch.tensor([[prompt[-1], *answer[:-1]]], device=model.device)
    logits = model.logits(model(last, states))[0]
    expected = torch.tensor(answer, device=model.device)
    nll = F.cross_entropy(logits, expected)
    return bool((logits.argmax(-1) == expected).all()), float(nll)
