"""A reward model from preferences: which of two answers to the same question is the better one.

    reward_train --source sft --pairs preferences.jsonl          -> out/RUN/reward
    chat_rl --reward_model out/RUN/reward --reward_weights answer=0.5,model=0.5

A line of the file is {"question": ..., "chosen": ..., "rejected": ...}, or "messages" instead of the question. The
model of a stage reads question and answer; what it makes of the last token, h, is judged by a linear head. The head is
fitted to the Bradley-Terry model (1952), P(chosen beats rejected) = sigmoid(w (h_chosen - h_rejected)), by Newton's
method: the problem is convex, so there is one answer, and nothing to tune but the weight of w's own size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanochat import checkpoint, config, runtime
from nanochat.engine.generate import prefill
from nanochat.engine.load import load_checkpoint
from nanochat.errors import NanochatError, UsageError
from nanochat.evaluation.chat import slices
from nanochat.model.lm import LM
from nanochat.rag.rewards import Sample
from nanochat.tasks.conversations import check_conversation
from nanochat.tasks.rows import JsonRows
from nanochat.tokenizer import Tokenizer

ROWS = 64  # conversations read together
STEPS = 50  # of Newton's method, which needs about 10


@dataclass(frozen=True)
class RewardSettings:
    """Fit a reward model to preference pairs."""

    run: str = "default"
    """name of the run"""
    out_dir: str | None = None
    """directory of all runs (default: $NANOCHAT_OUT, or out)"""
    source: str = "sft"
    """the model that reads: a stage or a path"""
    pairs: str = ""
    """JSONL of preferences: question (or messages), chosen, rejected"""
    ridge: float = 1.0
    """weight of the head's own size against the pairs: more for few pairs"""
    held_back: float = 0.1
    """share of the pairs that the accuracy is measured on"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps"""
    dtype: str = "auto"
    """dtype of activations: auto, float32, bfloat16 or float16"""

    def check(self) -> None:
        """Raises UsageError for values that cannot be."""
        if not self.pairs:
            raise UsageError("--pairs FILE: the preferences to learn from are missing")
        if not self.ridge > 0:
            raise UsageError(f"--ridge {self.ridge}: must be above 0")
        if not 0 < self.held_back < 1:
            raise UsageError(f"--held_back {self.held_back}: must be between 0 and 1")


class Pair(NamedTuple):
    """Two conversations that differ in the last message."""

    chosen: dict[str, Any]
    rejected: dict[str, Any]


def load_pairs(path: str | Path) -> list[Pair]:
    """Raises NanochatError when the file cannot be read, UsageError that names the line that is no preference."""
    rows, found = JsonRows(Path(path)), []
    for i in range(len(rows)):
        row = rows[i]
        try:
            found.append(Pair(*(_conversation(row, row.get(name)) for name in ("chosen", "rejected"))))
        except ValueError as error:
            needs = '"question" (or "messages" that end with the user), "chosen" and "rejected"'
            raise UsageError(f"{rows.where(i)}: needs {needs}: {error}") from None
    if len(found) < 2:
        raise UsageError(f"{path} holds {len(found)} preference(s): at least 2 are needed, some of them to measure")
    return found


def _conversation(row: dict[str, Any], answer: Any) -> dict[str, Any]:
    """Raises ValueError for what is none."""
    asked = row.get("messages", [{"role": "user", "content": row.get("question")}])
    if not isinstance(asked, list) or not isinstance(answer, str):
        raise ValueError("one of them is missing, or of another type")
    conversation = check_conversation([*asked, {"role": "assistant", "content": answer}])
    if [message["role"] for message in conversation["messages"][-2:]] != ["user", "assistant"]:
        raise ValueError("no question comes before the answer")
    return conversation


def fit(difference_ND: Tensor, ridge: float) -> Tensor:
    """The head w (D,) that maximises sum log sigmoid(d w) - ridge / 2 |w|^2 over rows d, in float64."""
    d = difference_ND.double()
    w = d.new_zeros(d.size(1))
    eye = ridge * torch.eye(d.size(1), dtype=d.dtype)
    for _ in range(STEPS):
        p = torch.sigmoid(d @ w)
        gradient = d.t() @ (1 - p) - ridge * w
        step = torch.linalg.solve(d.t() @ (d * (p * (1 - p))[:, None]) + eye, gradient)
        w = w + step
        if float(step.abs().max()) < 1e-10:
            break
    return w


class LinearRewardModel:
    """Judges answers from 0 to 1: the probability that one beats the middling answer of the training pairs.

    weight (D,), centre (the mean judgement of the training answers), and the frozen model that reads. A `RewardModel`.
    """

    def __init__(self, model: LM, tokenizer: Tokenizer, weight: Tensor, centre: float, scale: Tensor) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.weight, self.centre, self.scale = weight.double(), centre, scale.double()

    def features(self, conversations: Sequence[dict[str, Any]]) -> Tensor:
        """What the model makes of the last token of each conversation, (N, D) float64."""
        return read(self.model, self.tokenizer, conversations) / self.scale

    def score(self, samples: Sequence[Sample]) -> list[float]:
        """See `rag.rewards.RewardModel`."""
        conversations = []
        for sample in samples:
            asked = list(sample.conversation["messages"])
            while asked and asked[-1]["role"] == "assistant":
                asked.pop()
            conversations.append({"messages": [*asked, {"role": "assistant", "content": sample.answer.text or " "}]})
        return torch.sigmoid(self.features(conversations) @ self.weight - self.centre).tolist()


@torch.no_grad()
def read(model: LM, tokenizer: Tokenizer, conversations: Sequence[dict[str, Any]]) -> Tensor:
    """Hidden states of the last tokens, (N, D) float64 on the CPU."""
    ids = [tokenizer.render(one, model.config.sequence_len).ids for one in conversations]
    hidden = [prefill(model, some)[1].double().cpu() for some in slices(ids, ROWS)]
    return torch.cat(hidden)


def train_reward_model(settings: RewardSettings) -> dict[str, float]:
    """Fit, measure on pairs that were held back, save under the run's `reward/`."""
    settings.check()
    pairs = load_pairs(settings.pairs)
    loaded = load_checkpoint(settings.source, settings.run, settings.out_dir, settings.device, settings.dtype)
    chosen_ND = read(loaded.model, loaded.tokenizer, [pair.chosen for pair in pairs])
    rejected_ND = read(loaded.model, loaded.tokenizer, [pair.rejected for pair in pairs])
    n_val = min(max(1, round(len(pairs) * settings.held_back)), len(pairs) - 1)
    scale_D = torch.cat([chosen_ND[n_val:], rejected_ND[n_val:]]).std(0) + 1e-6
    chosen_ND, rejected_ND = chosen_ND / scale_D, rejected_ND / scale_D
    difference_ND = chosen_ND - rejected_ND
    weight = fit(difference_ND[n_val:], settings.ridge)
    centre = float((torch.cat([chosen_ND[n_val:], rejected_ND[n_val:]]) @ weight).mean())
    right = (difference_ND @ weight > 0).double()
    metrics = {
        "pairs": float(len(pairs)),
        "train_accuracy": float(right[n_val:].mean()),
        "accuracy": float(right[:n_val].mean()),
    }
    root = runtime.run_path(settings.out_dir, settings.run) / "reward"
    meta = {"stage": "reward", "tokenizer_hash": loaded.tokenizer.hash, "reader": loaded.meta["checksum"],
            "reader_path": str(loaded.path.resolve()), "centre": centre, "metrics": metrics}  # fmt: skip
    checkpoint.save(root, 1, {"head": {"weight": weight, "scale": scale_D}}, meta)
    return metrics


def load_reward_model(path: str, device: str, tokenizer: Tokenizer) -> LinearRewardModel:
    """The reward model of a directory, with the model that it was fitted with as its reader. Raises NanochatError when
    that is gone or has changed, UsageError for another tokenizer."""
    found = checkpoint.latest(path)
    if found is None:
        raise UsageError(f"--reward_model {path}: there is no reward model; make one with `nanochat reward_train`")
    saved = checkpoint.load(found, files=("head",))
    if saved.meta["tokenizer_hash"] != tokenizer.hash:
        raise UsageError(f"--reward_model {path}: it was fitted with another tokenizer than this run's")
    reader = load_checkpoint(saved.meta["reader_path"], device=device, dtype="float32" if device == "cpu" else "auto")
    if reader.meta["checksum"] != saved.meta["reader"]:
        raise NanochatError(f"{reader.path} has changed since the reward model {path} was fitted: fit it again")
    head = saved.tensors["head"]
    return LinearRewardModel(reader.model, tokenizer, head["weight"], saved.meta["centre"], head["scale"])


def reward_train(argv: list[str] | None = None) -> None:
    """The command `reward_train`."""
    settings = config.parse(RewardSettings, argv, prog="reward_train")
    metrics = train_reward_model(settings)
    print(", ".join(f"{name} {value:,.4g}" for name, value in metrics.items()))
