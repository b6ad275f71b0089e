"""Models and tokenizers of others taken over and given away: the same ids as `tokenizers`, the same logits after it."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers

from nanochat import checkpoint
from nanochat.chat import load
from nanochat.data.corpus import open_corpus
from nanochat.errors import NanochatError, UsageError
from nanochat.export import export_model, import_model
from nanochat.model.config import ModelConfig
from nanochat.model.interop import PLAIN, write
from nanochat.model.lm import LM
from nanochat.model.vocabulary import read_tokenizer, reorder
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer

SIGNS = "It's 1821, isn't it?  Zürich — naïve\n\n\t北京. "
TEXTS = [*open_corpus("world:seed=0,known=20").documents("train"), SIGNS] * 2


def gpt_neox(path: Path) -> tokenizers.Tokenizer:
    """A small tokenizer of the same making as GPT-NeoX's: special tokens first, byte-level, runs of spaces added."""
    theirs = tokenizers.Tokenizer(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options: dict[str, Any] = {"initial_alphabet": alphabet, "special_tokens": ["<|endoftext|>", "<|padding|>"]}
    trainer = trainers.BpeTrainer(vocab_size=500, show_progress=False, **options)
    theirs.train_from_iterator(TEXTS, trainer)
    theirs.add_tokens(["    "])
    theirs.save(str(path))
    return theirs


def small(vocab_size: int, tied: bool = True) -> LM:
    shape: Any = {"depth": 2, "d_model": 32, "pattern": "mamba", "d_state": 4, "tie_embeddings": tied, **PLAIN}
    model = LM.build(ModelConfig(vocab_size=vocab_size, sequence_len=64, **shape), seed=0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return model.eval()


def test_the_same_tokens_under_other_ids(tmp_path: Path) -> None:
    theirs = gpt_neox(tmp_path / "tokenizer.json")
    ours, rows = read_tokenizer(tmp_path / "tokenizer.json")
    assert ours.vocab_size == len(rows) == 498 + len(SPECIAL_TOKENS)
    assert rows[ours.bos] == theirs.token_to_id("<|endoftext|>")
    shuffled = random.Random(0)
    mixed = ["".join(shuffled.sample(text, len(text))) for text in TEXTS[:40]]
    for text in [*TEXTS, *mixed]:
        if "    " not in text:
            assert [rows[i] for i in ours.encode(text)] == theirs.encode(text, add_special_tokens=False).ids
            assert ours.decode(ours.encode(text)) == text


def test_our_own_tokenizer_comes_back(tmp_path: Path) -> None:
    ours = Tokenizer.train(TEXTS, 400)
    again, rows = read_tokenizer(ours.export_hf(tmp_path))
    assert rows == list(range(400))
    assert again.hash == ours.hash


@pytest.mark.parametrize("tied", [True, False])
def test_the_model_speaks_the_same_over_its_own_ids(tmp_path: Path, tied: bool) -> None:
    theirs = gpt_neox(tmp_path / "tokenizer.json")
    ours, rows = read_tokenizer(tmp_path / "tokenizer.json")
    model = small(504, tied)  # padded, as public ones are
    other = reorder(model, rows)
    text = TEXTS[3]
    there = model.logits(model(torch.tensor([theirs.encode(text).ids])))[0]
    here = other.logits(other(torch.tensor([ours.encode(text)])))[0]
    known = [i for i, row in enumerate(rows) if row is not None]
    torch.testing.assert_close(here[:, known], there[:, [rows[i] for i in known]])
    assert torch.isfinite(here).all()
    with pytest.raises(UsageError, match="do not belong together"):
        reorder(small(400), rows)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda r: r["model"].update(type="Unigram"), "Unigram"),
        (lambda r: r.update(pre_tokenizer={"type": "Metaspace"}), "Metaspace"),
        (lambda r: r.update(pre_tokenizer=None), "splits text by nothing"),
        (lambda r: r["pre_tokenizer"].update(add_prefix_space=True), "ByteLevel"),
        (lambda r: r["model"]["vocab"].pop("a"), "255 of 256 bytes"),
    ],
)
def test_other_tokenizers_are_refused(tmp_path: Path, change: Any, named: str) -> None:
    gpt_neox(tmp_path / "tokenizer.json")
    record = json.loads((tmp_path / "tokenizer.json").read_text())
    change(record)
    (tmp_path / "tokenizer.json").write_text(json.dumps(record))
    with pytest.raises(UsageError, match=named):
        read_tokenizer(tmp_path / "tokenizer.json")


def test_a_tokenizer_that_is_missing_or_damaged(tmp_path: Path) -> None:
    with pytest.raises(NanochatError, match="--tokenizer"):
        read_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(NanochatError, match="damaged"):
        read_tokenizer(tmp_path / "tokenizer.json")


# ---- the commands


def test_import_then_export_then_import(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    public = write(tmp_path / "public", small(504), "state-spaces")
    gpt_neox(public / "tokenizer.json")
    out = f"--out_dir={tmp_path / 'out'}"
    import_model([f"--weights={public}", "--run=a", out, "--sequence_len=64"])
    assert "2 blocks of M" in capsys.readouterr().out
    chat = load("base", run="a", out_dir=tmp_path / "out", device="cpu")
    said = chat.generate(TEXTS[0][:20], temperature=0.0, max_tokens=8)
    export_model([f"--output={tmp_path / 'given'}", "--source=base", "--run=a", out])
    assert sorted(path.name for path in (tmp_path / "given").iterdir()) == [
        "config.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip
    for name, tokenizer in (("b", []), ("c", [f"--tokenizer={tmp_path / 'out' / 'a' / 'tokenizer'}"])):
        import_model([f"--weights={tmp_path / 'given'}", f"--run={name}", out, "--sequence_len=64", *tokenizer])
        again = load("base", run=name, out_dir=tmp_path / "out", device="cpu")
        assert again.generate(TEXTS[0][:20], temperature=0.0, max_tokens=8) == said
        assert all(torch.equal(x, chat.model.state_dict()[key]) for key, x in again.model.state_dict().items())
    with pytest.raises(UsageError, match="--run b"):
        import_model([f"--weights={public}", "--run=b", out])
    path = checkpoint.latest(tmp_path / "out" / "a" / "base")
    assert path is not None
    assert checkpoint.read_meta(path)["imported_from"] == str(public)


def test_missing_arguments(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--output"):
        export_model(["--source=base"])
    with pytest.raises(UsageError, match="--weights"):
        import_model([])
