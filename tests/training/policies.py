"""Runs of reinforcement learning that take a second: what the tests of this folder train by reward."""

from pathlib import Path
from typing import Any

from tiny import COMMON, settings, train

from nanochat import checkpoint
from nanochat.report import read_log
from nanochat.training.commands import train_sft
from nanochat.training.rl_commands import ChatRLSettings, train_chat_rl

SUMS = "arithmetic:digits=1,n=300"
PLAY = {
    "n_prompts": 4, "n_samples": 4, "max_tokens": 8, "device_batch_size": 8, "eval_prompts": 8, "save_every": 4,
    "eval_every": 4, "num_iterations": 6, "source": "sums", "tasks": (SUMS,),
}  # fmt: skip


def rl_settings(root: Path, **options: Any) -> ChatRLSettings:
    return ChatRLSettings(**{**COMMON, "out_dir": str(root), **PLAY, **options})


def train_rl(root: Path, **options: Any) -> dict[str, float]:
    return train_chat_rl(rl_settings(root, **options))


def teach_sums(root: Path, steps: int = 250, task: str = SUMS) -> None:
    """The stage `sums`: the tiny base model, which has seen some sums."""
    given = settings("sft", root, tasks=(task,), num_iterations=steps, eval_every=0, save_every=0, lr_scale=1.0)
    train_sft(given)
    (root / "tiny" / "sft").rename(root / "tiny" / "sums")


def rounds(root: Path, stage: str = "rl") -> list[dict[str, Any]]:
    return [record for record in read_log(root / "tiny" / stage / "log.jsonl") if "entropy" in record]


def evaluations(root: Path, stage: str = "rl") -> list[dict[str, Any]]:
    return [record for record in read_log(root / "tiny" / stage / "log.jsonl") if "val_reward" in record]


def final_meta(root: Path, stage: str = "rl") -> dict[str, Any]:
    path = checkpoint.latest(root / "tiny" / stage)
    assert path is not None
    return checkpoint.read_meta(path)


__all__ = ["evaluations", "final_meta", "rl_settings", "rounds", "teach_sums", "train", "train_rl"]
