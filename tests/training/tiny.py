"""A run so small that a stage takes a fraction of a second: what the tests of this folder train."""

import shutil
from pathlib import Path
from typing import Any

import torch

from nanochat import checkpoint
from nanochat.data.corpus import open_corpus
from nanochat.tokenizer import Tokenizer
from nanochat.training.commands import train_base, train_mid, train_sft
from nanochat.training.rag import RagSettings, train_rag
from nanochat.training.settings import BaseSettings, MidSettings, SFTSettings

WORLD = "world:seed=0,known=10,wordings=4"
QUESTIONS = ("world-qa:seed=0,known=10,limit=40",)
SHAPE = {
    "depth": 2, "pattern": "M2 T", "d_model": 32, "head_dim": 16, "d_state2": 8, "head_dim2": 16, "sequence_len": 32,
}  # fmt: skip
COMMON = {
    "run": "tiny", "device": "cpu", "dtype": "float32", "device_batch_size": 2, "eval_tokens": 128, "eval_every": 4,
    "save_every": 3, "log_every": 1, "num_iterations": 10,
}  # fmt: skip
STAGES = ("base", "mid", "sft", "rag")


def make_tokenizer(root: Path) -> Tokenizer:
    tokenizer = Tokenizer.train(open_corpus(WORLD).documents("train"), 320)
    tokenizer.save(root / "tiny" / "tokenizer")
    return tokenizer


def settings(stage: str, root: Path, **options: Any) -> Any:
    given = {**COMMON, "out_dir": str(root)}
    if stage == "base":
        return BaseSettings(**{**given, **SHAPE, "data": WORLD, **options})
    if stage == "mid":
        return MidSettings(**{**given, "data": WORLD, "tasks": QUESTIONS, **options})
    if stage == "rag":
        contexts = "n=40,documents=2,questions=2"
        return RagSettings(**{**given, "contexts": contexts, "sequence_len": 256, "source": "base", **options})
    return SFTSettings(**{**given, "tasks": QUESTIONS, "source": "base", **options})


def train(stage: str, root: Path, **options: Any) -> dict[str, float]:
    command: Any = {"base": train_base, "mid": train_mid, "sft": train_sft, "rag": train_rag}[stage]
    return command(settings(stage, root, **options))


def copy_run(source: Path, target: Path, *parts: str) -> Path:
    """A new root with some parts (tokenizer, base…) of the run under `source`."""
    for part in parts:
        shutil.copytree(source / "tiny" / part, target / "tiny" / part)
    return target


def saved(root: Path, stage: str = "base") -> dict[str, torch.Tensor]:
    """Everything that the newest checkpoint holds of weights and optimizer."""
    path = checkpoint.latest(root / "tiny" / stage)
    assert path is not None
    tensors = checkpoint.load(path, files=("model", "optim")).tensors
    return {f"{file}/{name}": tensor for file, part in tensors.items() for name, tensor in part.items()}


def assert_identical(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, different
