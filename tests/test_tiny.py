"""End to end in seconds: text -> tokenizer -> base -> mid -> SFT -> a model that answers. Read this one first."""

import math
from pathlib import Path

import pytest

import nanochat
from nanochat.tasks.registry import open_task
from nanochat.training.commands import TokenizerSettings, train_base, train_mid, train_sft, train_tokenizer
from nanochat.training.loop import read_log
from nanochat.training.settings import BaseSettings, MidSettings, SFTSettings

WORLD = "world:seed=0,known=10,wordings=4"  # ten invented people, towns and companies, each described four times
QUESTIONS = "world-qa:seed=0,known=10,limit=12"  # "Where was X born?"


def test_from_text_to_chat(tmp_path: Path) -> None:
    run = {"out_dir": str(tmp_path), "run": "tiny"}
    tokenizer = train_tokenizer(TokenizerSettings(**run, data=WORLD, vocab_size=400))

    train = {**run, "device": "cpu", "dtype": "float32", "device_batch_size": 4, "eval_tokens": 512}
    shape = {"pattern": "T M M2", "depth": 3, "d_model": 64, "head_dim": 32, "d_state2": 16, "sequence_len": 64}
    base = train_base(BaseSettings(**train, **shape, data=WORLD, num_iterations=25))
    train_mid(MidSettings(**train, data=WORLD, tasks=(QUESTIONS,), num_iterations=20))
    sft = train_sft(SFTSettings(**train, tasks=(QUESTIONS,), num_iterations=40))

    losses = [line["loss"] for line in read_log(tmp_path / "tiny/base/log.jsonl") if "loss" in line]
    assert losses[0] == pytest.approx(math.log(tokenizer.vocab_size), abs=0.1)  # an untrained model knows nothing
    assert base["train_loss"] < 0.6 * losses[0]
    assert sft["train_loss"] < 0.5

    chat = nanochat.load("sft", run="tiny", out_dir=tmp_path, device="cpu")
    task = open_task(QUESTIONS)
    answers = [chat.chat(task[i]["messages"][0]["content"], temperature=0.0, max_tokens=24) for i in range(len(task))]
    right = sum(task.evaluate(task[i], answer) for i, answer in enumerate(answers))
    assert right >= len(task) - 2, answers  # question 0 was held back to measure the loss on
