"""A run on disk with a tiny model of random weights, and a knowledge base: what chat and terminal are tested on."""

import pytest
import torch

import nanochat
from nanochat import checkpoint
from nanochat.chat import ChatModel, load
from nanochat.model.config import ModelConfig
from nanochat.model.lm import LM
from nanochat.tokenizer import Tokenizer

TOKENIZER = Tokenizer([bytes([i]) for i in range(256)])
GREEDY = {"temperature": 0.0, "max_tokens": 8}


def save_stage(out, stage: str, run: str = "r", tokenizer_hash: str = TOKENIZER.hash) -> None:
    config = ModelConfig(
        vocab_size=TOKENIZER.vocab_size, sequence_len=80, depth=2, d_model=32, head_dim=16, head_dim2=16, d_state2=16
    ).resolved()
    model = LM.build(config, seed=0)
    with torch.no_grad():
        model.head.weight.normal_(generator=torch.Generator().manual_seed(1))
    meta = {"stage": stage, "model_config": config.to_dict(), "tokenizer_hash": tokenizer_hash, "metrics": {}}
    checkpoint.save(out / run / stage, 5, {"model": model.state_dict()}, meta)
    TOKENIZER.save(out / run / "tokenizer")


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    path = tmp_path_factory.mktemp("out")
    for stage in ("base", "sft"):
        save_stage(path, stage)
    return path


@pytest.fixture(scope="module")
def chat(out) -> ChatModel:
    return load("sft", out_dir=out)


@pytest.fixture(scope="module")
def knowledge(tmp_path_factory):
    path = tmp_path_factory.mktemp("knowledge") / "kb"
    with nanochat.KnowledgeBase.create(path, kind="simple") as base:
        base.add(
            [
                nanochat.Document("torwick", "Mara Velt founded it.", "Torwick", "towns.jsonl"),
                nanochat.Document("orvane", "It lies on the river Rill.", "Orvane"),
            ]
        )
    return path
