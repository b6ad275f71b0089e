"""Truncated backpropagation through time: states from batch to batch, rows in order, exact resume."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import WORLD, assert_identical, make_tokenizer, saved, train
from torch import Tensor

from nanochat.data.batches import IGNORED
from nanochat.data.corpus import open_corpus
from nanochat.data.text import TextSource
from nanochat.errors import UsageError
from nanochat.model.config import ModelConfig
from nanochat.model.lm import LM
from nanochat.runtime import Runtime
from nanochat.tokenizer import Tokenizer
from nanochat.training.carry import Carry, carried_rows
from nanochat.training.supervised import PackedStage

BOS, T = 60, 12
close = torch.testing.assert_close


def small(pattern: str = "M T M2 T") -> LM:
    shape: Any = {"d_model": 32, "head_dim": 8, "d_state": 5, "d_state2": 6, "head_dim2": 16, "sequence_len": T}
    model = LM.build(ModelConfig(vocab_size=61, depth=4, pattern=pattern, **shape), seed=0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return model


def row(*shape: int, seed: int = 0) -> Tensor:
    """Ids that hold no BOS."""
    return torch.randint(0, BOS, shape, generator=torch.Generator().manual_seed(seed))


def arguments(inputs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a batch of one document a row gives to the loss."""
    targets = torch.roll(inputs, -1, 1)
    return inputs, targets, torch.ones(inputs.shape), torch.zeros(inputs.shape, dtype=torch.int32)


# ---- states from batch to batch


def test_the_loss_is_that_of_the_long_row_and_gradients_end_at_the_border() -> None:
    model = small()
    long = row(1, 2 * T)
    long[0, 0] = BOS
    parts = arguments(long)
    carry = Carry(model, 1, BOS)
    losses = [carry.loss(*(x[:, a : a + T] for x in parts)) for a in (0, T)]  # type: ignore[arg-type]
    close(losses[0] + losses[1], model.loss(*parts))
    assert not any(x.requires_grad for state in carry.states for x in state.tensors().values())
    together = torch.autograd.grad(losses[0] + losses[1], model.blocks[0].mixer.in_proj.weight)  # type: ignore
    full = torch.autograd.grad(model.loss(*parts), model.blocks[0].mixer.in_proj.weight)  # type: ignore
    assert (together[0] - full[0]).norm() > 1e-3 * full[0].norm()


def test_a_row_that_begins_a_document_forgets() -> None:
    carry, alone = Carry(small(), 2, BOS), Carry(small(), 1, BOS)
    first, second = row(2, T, seed=1), row(2, T, seed=2)
    second[0, 0] = BOS  # row 0 begins anew, row 1 goes on
    carry.loss(*arguments(first))
    carry.loss(*arguments(second))
    alone.loss(*arguments(second[:1]))
    for layer, expected in zip(carry.state_dict(), alone.state_dict()):
        for key, value in expected.items():
            close(layer[key][:1], value)
    fresh = Carry(small(), 1, BOS)
    fresh.loss(*arguments(second[1:]))
    for layer, unlike in zip(carry.state_dict(), fresh.state_dict()):
        assert not all(torch.allclose(layer[key][1:], value) for key, value in unlike.items())


def test_states_of_ranks_are_kept_by_lane() -> None:
    carry = Carry(small(), 4, BOS)
    carry.loss(*arguments(row(4, T)))
    ranks = [Carry(small(), 2, BOS) for _ in range(2)]
    for rank, part in enumerate(ranks):
        part.load_state_dict(carry.state_dict(), rank, 2)
        for layer, whole in zip(part.state_dict(), carry.state_dict()):
            assert all(torch.equal(layer[key], whole[key][rank::2]) for key in whole)
    merged = carried_rows([part.state_dict() for part in ranks])
    for layer, whole in zip(merged, carry.state_dict()):
        assert all(torch.equal(layer[key], whole[key]) for key in whole)


# ---- rows in order, and the training command


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_each_row_of_a_batch_goes_on_with_its_document(tokenizer: Tokenizer) -> None:
    """The rows of one place, one after the other, are whole documents."""
    source = TextSource(open_corpus(WORLD), tokenizer, "train")
    runtime = Runtime(torch.device("cpu"), torch.float32)
    options: Any = {"rows": 3, "sequence_len": 16, "n_lanes": 8, "eval_tokens": 64, "in_order": True}
    stage = PackedStage({"text": (source, 1.0, True)}, {}, tokenizer, runtime, **options)
    stream = stage.batches("train")
    taken = [next(stream) for _ in range(40)]
    stage.close()
    texts = set(open_corpus(WORLD).documents("train"))
    n_long = 0
    for place in range(3):
        ids = torch.cat([batch.inputs[place] for batch in taken]).tolist()
        assert all((batch.targets[place] != IGNORED).all() for batch in taken)
        starts = [i for i, token in enumerate(ids) if token == tokenizer.bos]
        assert starts[0] == 0
        for start, end in itertools.pairwise(starts):
            assert tokenizer.decode(ids[start + 1 : end]) in texts
            n_long += end - start > 16
    assert n_long > 5


def test_a_run_with_carried_states_resumes_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    options: Any = {"carry_state": True, "sequence_len": 16, "pattern": "M2 T", "num_iterations": 8}
    for root in (a, b):
        make_tokenizer(root)
    found = train("base", a, **options)
    assert found["train_loss"] < 5.5
    real = LM.loss
    calls = []

    def stopping(self: LM, *args: Any) -> Tensor:
        calls.append(args)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(LM, "loss", stopping)
        with pytest.raises(KeyboardInterrupt):
            train("base", b, **options)
    train("base", b, **options)
    assert_identical(saved(a), saved(b))


@pytest.mark.parametrize("other", [{"start_len": 8}, {"checkpointing": True}])
def test_what_it_does_not_go_with(tmp_path: Path, other: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="carry_state and --"):
        train("base", tmp_path, carry_state=True, **other)
