"""The supervised stages: what is a target, shares of sources, validation, cursors and reports."""

from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import QUESTIONS, WORLD

from nanochat.data.batches import IGNORED, Batch
from nanochat.data.corpus import open_corpus
from nanochat.data.text import TextSource
from nanochat.model.config import ModelConfig
from nanochat.model.lm import LM
from nanochat.runtime import Runtime
from nanochat.tasks.registry import open_task
from nanochat.tokenizer import Tokenizer
from nanochat.training.supervised import ChatSource, PackedStage, describe, to_device

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer(finished: Path) -> Tokenizer:
    return Tokenizer.load(finished / "tiny" / "tokenizer")


def chat(tokenizer: Tokenizer, T: int = 48, **options: Any) -> ChatSource:
    return ChatSource(open_task(QUESTIONS[0]), tokenizer, T, **{"seed": 0, **options})


def stage(
    tokenizer: Tokenizer, share: float = 0.5, rank: int = 0, world_size: int = 1, eval_tokens: int = 500
) -> PackedStage:
    corpus = open_corpus(WORLD)
    text, val = (TextSource(corpus, tokenizer, split) for split in ("train", "val"))
    train: dict[str, Any] = {"chat": (chat(tokenizer), 1 - share, False), "text": (text, share, True)}
    held: dict[str, Any] = {"chat": (chat(tokenizer, shuffle=False), False), "text": (val, True)}
    runtime = Runtime(CPU, torch.float32, rank, rank, world_size)
    sizes = {"rows": 2, "sequence_len": 48, "n_lanes": 8, "eval_tokens": eval_tokens}
    return PackedStage(train, held, tokenizer, runtime, **sizes)


def kind(batch: Batch) -> str:
    return "text" if (batch.targets != IGNORED).all() else "chat"


# ---- sources


def test_every_token_of_a_text_is_a_target_and_the_end_is_the_next_bos(tokenizer: Tokenizer) -> None:
    source = TextSource(open_corpus(WORLD), tokenizer, "train")
    first, empty = source.encode(["Hello there.", ""])
    assert empty is None
    assert first is not None
    assert first.inputs[0] == tokenizer.bos
    assert first.targets[-1] == tokenizer.bos
    assert first.inputs[1:].tolist() == first.targets[:-1].tolist() == tokenizer.encode("Hello there.")


def test_only_the_assistants_words_are_targets(tokenizer: Tokenizer) -> None:
    conversation = {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ursa Kirby"}]}
    piece = chat(tokenizer).piece(conversation)
    assert piece is not None
    assert piece.inputs[0] == tokenizer.bos
    trained = piece.targets[piece.targets != IGNORED].tolist()
    assert trained == [*tokenizer.encode("Ursa Kirby"), tokenizer.eot]
    assert trained[:-1] == piece.inputs[1 - len(trained) :].tolist()  # each target is the next input
    nobody = {"messages": [{"role": "user", "content": "Who?"}]}
    assert chat(tokenizer).piece(nobody) is None


def test_long_conversations_lose_their_oldest_turns_and_it_is_counted(tokenizer: Tokenizer) -> None:
    turn = [{"role": "user", "content": "What then?"}, {"role": "assistant", "content": "Nothing much."}]
    piece = chat(tokenizer, T=40).piece({"messages": turn * 6})
    assert piece is not None
    assert len(piece.inputs) <= 40
    assert piece.dropped_turns > 0
    long = chat(tokenizer, T=40).piece({"messages": [turn[0], {"role": "assistant", "content": "word " * 100}]})
    assert long is not None
    assert len(long.inputs) == 40
    assert long.cropped > 0


def test_each_epoch_has_an_order_of_its_own(tokenizer: Tokenizer) -> None:
    source = chat(tokenizer)
    n = len(source.task)

    def order(source: ChatSource, epoch: int, start: int = 0) -> list[str]:
        return [c["messages"][0]["content"] for c in source.read(epoch, start)]

    assert order(source, 0) == order(chat(tokenizer), 0)
    assert order(source, 0) != order(source, 1)
    assert sorted(order(source, 0)) == sorted(order(source, 1))
    assert order(source, 0, n - 3) == order(source, 0)[-3:]
    assert order(chat(tokenizer, seed=1), 0) != order(source, 0)
    plain = chat(tokenizer, shuffle=False)
    assert order(plain, 0) == order(plain, 1) == [source.task[i]["messages"][0]["content"] for i in range(n)]


# ---- stages


@pytest.mark.parametrize("share", [0.5, 0.25, 0.9])
def test_sources_take_turns_by_their_shares(tokenizer: Tokenizer, share: float) -> None:
    made = stage(tokenizer, share)
    kinds = [kind(batch) for batch in islice(made.batches("train"), 40)]
    made.close()
    for n in range(1, 41):
        assert abs(Counter(kinds[:n])["text"] - share * n) <= 1
    assert made.taken == {"chat": Counter(kinds)["chat"], "text": Counter(kinds)["text"]}


def test_state_goes_on_where_it_was_also_after_closing(tokenizer: Tokenizer) -> None:
    expected = list(islice((whole := stage(tokenizer)).batches("train"), 9))
    whole.close()

    cut = stage(tokenizer)
    batches = cut.batches("train")
    first = list(islice(batches, 4))
    running = cut.state_dict()
    cut.close()
    closed = cut.state_dict()
    for state in (running, closed):
        other = stage(tokenizer)
        other.load_state_dict(state)
        rest = list(islice(other.batches("train"), 5))
        other.close()
        assert all(torch.equal(a, b) for x, y in zip(first + rest, expected) for a, b in zip(x, y))
    again = list(islice(cut.batches("train"), 5))  # the very same stage, opened once more
    cut.close()
    assert all(torch.equal(a, b) for x, y in zip(again, expected[4:]) for a, b in zip(x, y))


def test_validation_is_the_same_every_time_and_ranks_share_it(tokenizer: Tokenizer) -> None:
    made = stage(tokenizer)
    batches = list(made.batches("val"))
    assert all(torch.equal(a, b) for x, y in zip(batches, made.batches("val")) for a, b in zip(x, y))
    n_rows = Counter[str]()
    for batch in batches:
        n_rows[kind(batch)] += len(batch.inputs)
    assert n_rows == {"chat": 11, "text": 11}  # 500 tokens of each, in whole rows of 48

    def trained(of: PackedStage) -> Counter[int]:
        return Counter(
            t for batch in of.validation_batches("chat") for t in batch.targets.flatten().tolist() if t != IGNORED
        )

    alone = trained(stage(tokenizer, eval_tokens=10_000))  # all questions
    both = [trained(stage(tokenizer, rank=rank, world_size=2, eval_tokens=10_000)) for rank in range(2)]
    assert all(both)
    assert both[0] + both[1] == alone


def test_evaluate_measures_each_source(tokenizer: Tokenizer) -> None:
    config = ModelConfig(vocab_size=tokenizer.vocab_size, depth=1, d_model=16, head_dim=8, pattern="T", sequence_len=48)
    found = stage(tokenizer).evaluate(LM.build(config, seed=0))
    assert set(found) == {"val_bpb", "val_chat_loss"}
    nats = torch.log(torch.tensor(float(tokenizer.vocab_size))).item()  # an untrained model is uniform
    assert found["val_chat_loss"] == pytest.approx(nats, abs=0.01)
    assert 1 < found["val_bpb"] < 8.4


def test_the_report_says_what_was_padded_split_and_skipped(tokenizer: Tokenizer) -> None:
    made = stage(tokenizer)
    list(islice(made.batches("train"), 20))
    running = made.report()
    made.close()
    assert made.report() == running
    assert running["text_padded_share"] == running["text_cropped_share"] == running["chat_split_documents"] == 0
    assert 0 < running["chat_padded_share"] < 0.2
    assert running["text_split_documents"] > 0
    assert {name.partition("_")[2] for name in running} == {
        "padded_share", "cropped_share", "split_documents", "skipped_documents", "dropped_turns",
    }  # fmt: skip


def test_a_batch_is_described_by_its_text(tokenizer: Tokenizer) -> None:
    ids = torch.tensor([tokenizer.encode("The town of Goldbury", bos=True)])
    batch = Batch(ids, ids, torch.ones(ids.shape), torch.zeros(ids.shape, dtype=torch.int32))
    assert describe(batch, tokenizer) == "'<|bos|>The town of Goldbury'"
    nothing = batch._replace(targets=torch.full_like(ids, IGNORED))
    assert describe(nothing, tokenizer).startswith("(nothing to train on) '<|bos|>The")
    assert to_device(batch, CPU) is batch
