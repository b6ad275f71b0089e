import math

import pytest
import torch
import torch.nn.functional as F

from nanochat.data.batches import IGNORED, Batch, Packer
from nanochat.data.text import TextSource
from nanochat.errors import NanochatError
from nanochat.evaluation.language import bits_per_byte, row_losses
from nanochat.model.config import ModelConfig
from nanochat.model.lm import LM
from nanochat.tokenizer import Tokenizer

DOCUMENTS = [
    "The fox ran over the hill.",
    "A café in Zürich — naïve, 北京.",
    "In 1821 the town had 300 people, and one tower.",
    "Short.",
    "The fox came back over the same hill in the same year, and the town had one more person.",
]


class Texts:
    """A corpus from a list."""

    name = "texts"

    def documents(self, split, start=0):
        return iter(DOCUMENTS[start:])


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(DOCUMENTS * 3, 330)


@pytest.fixture(scope="module")
def model(tokenizer):
    shape = {"sequence_len": 128, "depth": 2, "d_model": 32, "n_head": 2, "pattern": "T M2"}
    config = ModelConfig(vocab_size=tokenizer.vocab_size, **shape)
    return LM.build(config, seed=0).eval()


def batches(tokenizer, rows=2, T=128):
    packer = Packer(TextSource(Texts(), tokenizer, "val"), T, pad_id=tokenizer.bos, n_lanes=1, epochs=1)
    found = []
    while (batch := packer.batch(rows)) is not None:
        found.append(batch)
    return found


@torch.no_grad()
def alone(model, tokenizer, document):
    """(nats of text tokens, nats of the end, tokens) of one document on its own, from the logits, in float64."""
    ids = tokenizer.encode(document, bos=True)
    logits = model.logits(model(torch.tensor([ids])))[0].double()
    nats = F.cross_entropy(logits, torch.tensor([*ids[1:], tokenizer.bos]), reduction="none")
    return float(nats[:-1].sum()), float(nats[-1]), len(ids)


def test_bits_per_byte_is_that_of_the_documents_on_their_own(model, tokenizer):
    losses = bits_per_byte(model, batches(tokenizer), tokenizer)
    each = [alone(model, tokenizer, document) for document in DOCUMENTS]
    n_bytes = sum(len(document.encode()) for document in DOCUMENTS)
    assert losses.n_bytes == n_bytes
    assert losses.tokens == sum(n for _, _, n in each)
    assert losses.text_nats == pytest.approx(sum(text for text, _, _ in each), rel=1e-5)
    assert losses.nats == pytest.approx(sum(text + end for text, end, _ in each), rel=1e-5)
    assert losses.bits_per_byte == pytest.approx(losses.text_nats / math.log(2) / n_bytes)
    assert losses.nats_per_token == pytest.approx(losses.nats / losses.tokens)


def test_an_untrained_model_knows_nothing(tokenizer):
    config = ModelConfig(vocab_size=tokenizer.vocab_size, sequence_len=64, depth=1, d_model=32, n_head=2)
    model = LM.build(config, seed=0)
    with torch.no_grad():
        model.head.weight.zero_()
    losses = bits_per_byte(model, batches(tokenizer), tokenizer)
    assert losses.nats_per_token == pytest.approx(math.log(tokenizer.vocab_size), rel=1e-6)


def test_rows_add_up_however_they_are_batched(model, tokenizer):
    rows = row_losses(model, batches(tokenizer, 1, 48), tokenizer)
    other = row_losses(model, batches(tokenizer, 2, 48), tokenizer)
    assert len(rows.nats) >= 2
    for a, b in zip(rows, other):
        assert a == pytest.approx(b, rel=1e-5)
    losses = bits_per_byte(model, batches(tokenizer, 3, 48), tokenizer)
    assert sum(rows.text_nats) == pytest.approx(losses.text_nats)
    assert sum(rows.n_bytes) == losses.n_bytes


def test_ignored_targets_do_not_count(model, tokenizer):
    whole = batches(tokenizer)[0]
    targets = whole.targets.clone()
    targets[:, ::2] = IGNORED
    losses = bits_per_byte(model, [whole._replace(targets=targets)], tokenizer)
    assert losses.tokens == int((targets != IGNORED).sum())
    with pytest.raises(NanochatError, match="no validation tokens"):
        bits_per_byte(model, [whole._replace(targets=torch.full_like(targets, IGNORED))], tokenizer)


def test_nothing_to_evaluate_is_an_error(model, tokenizer):
    with pytest.raises(NanochatError, match="--eval_tokens"):
        bits_per_byte(model, iter(()), tokenizer)


def test_only_special_targets_give_nats_and_no_bytes(model, tokenizer):
    ids = torch.full((1, 4), tokenizer.bos)
    batch = Batch(ids, ids, torch.ones(1, 4), torch.zeros(1, 4, dtype=torch.int32))
    losses = bits_per_byte(model, [batch], tokenizer)
    assert losses.tokens == 4
    assert losses.text_nats == 0.0
    assert losses.bits_per_byte == 0.0


def test_the_model_stays_in_its_mode(model, tokenizer):
    model.train()
    bits_per_byte(model, batches(tokenizer), tokenizer)
    assert model.training
    model.eval()
    bits_per_byte(model, batches(tokenizer), tokenizer)
    assert not model.training
