"""The supervised stages: raw text (base), text and conversations mixed (mid), conversations (SFT)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from nanochat.data.background import Background
from nanochat.data.batches import IGNORED, Batch, Packer, Piece, Report, Source
from nanochat.errors import UsageError
from nanochat.evaluation.language import Losses, bits_per_byte
from nanochat.model.lm import LM
from nanochat.runtime import Runtime
from nanochat.tasks.task import Task
from nanochat.tokenizer import Tokenizer


class Stage(Protocol):
    """Where batches come from, and what is measured during training. The loop trains them all."""

    def batches(self, split: str) -> Iterator[Batch]: ...
    def evaluate(self, model: LM) -> dict[str, float]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...
    def report(self) -> dict[str, float]: ...
    def close(self) -> None: ...


class ChatSource:
    """Conversations of a task as pieces: only what the assistant wrote is a target. Each epoch in a new order."""

    def __init__(self, task: Task, tokenizer: Tokenizer, max_tokens: int, seed: int, shuffle: bool = True) -> None:
        self.task, self.tokenizer, self.max_tokens, self.seed, self.shuffle = task, tokenizer, max_tokens, seed, shuffle
        self.name = f"{task.name} ({len(task):,} conversations, order {seed})"

    def read(self, epoch: int, start: int) -> Iterator[dict[str, Any]]:
        n = len(self.task)
        order = np.random.default_rng((self.seed, epoch)).permutation(n) if self.shuffle else np.arange(n)
        return (self.task[int(i)] for i in order[start:])

    def encode(self, raw: Sequence[dict[str, Any]]) -> list[Piece | None]:
        return [self.piece(conversation) for conversation in raw]

    def piece(self, conversation: dict[str, Any]) -> Piece | None:
        rendered = self.tokenizer.render(conversation, self.max_tokens + 1)
        ids = np.array(rendered.ids, dtype=np.int32)
        mask = np.array(rendered.mask[1:], dtype=bool)
        if not mask.any():
            return None
        targets = np.where(mask, ids[1:], np.int32(IGNORED))
        return Piece(ids[:-1], targets, rendered.truncated_tokens, rendered.dropped_turns)


class PackedStage:
    """A stage over packed rows of one or two sources (raw text, conversations).

    sources: name -> (source, share of rows, whether documents may be split over rows).
    """

    def __init__(
        self,
        train: dict[str, tuple[Source, float, bool]],
        val: dict[str, tuple[Source, bool]],
        tokenizer: Tokenizer,
        runtime: Runtime,
        *,
        rows: int,
        sequence_len: int,
        n_lanes: int,
        eval_tokens: int,
        in_order: bool = False,
    ) -> None:
        """in_order: every row of a batch is a lane of its own, and reads its documents one after the other, each going
        on in the next row where it did not end (instead of rows packed from the pieces that fit best)."""
        if in_order:
            n_lanes = rows * runtime.world_size
        options = {"buffer_size": 1} if in_order else {}
        self.tokenizer, self.runtime, self.rows, self.T = tokenizer, runtime, rows, sequence_len
        self.val, self.eval_tokens = val, eval_tokens
        self.shares = {name: share for name, (_, share, _) in train.items()}
        self.packers = {
            name: self.packer(source, split, n_lanes, **options) for name, (source, _, split) in train.items()
        }
        self.taken = dict.fromkeys(train, 0)
        self.threads: dict[str, Background] = {}

    def packer(self, source: Source, split: bool, n_lanes: int, **options: Any) -> Packer:
        return Packer(
            source,
            self.T,
            split=split,
            pad_id=self.tokenizer.bos,
            n_lanes=n_lanes,
            rank=self.runtime.rank,
            world_size=self.runtime.world_size,
            **options,
        )

    def batches(self, split: str) -> Iterator[Batch]:
        """Endless for train; for val the same rows every time, all sources in a row, each rank its own part."""
        if split == "train":
            return self.training_batches()
        return (batch for name in self.val for batch in self.validation_batches(name))

    def training_batches(self) -> Iterator[Batch]:
        """The source that is furthest behind its share gives the next micro-batch; the rule needs no random number."""
        self.close()
        self.threads = {name: Background(packer, self.rows) for name, packer in self.packers.items()}
        while True:
            total = sum(self.taken.values()) + 1
            name = max(self.shares, key=lambda n: self.shares[n] * total - self.taken[n])
            batch = next(self.threads[name])
            self.taken[name] += 1
            yield batch

    def validation_batches(self, name: str) -> Iterator[Batch]:
        source, split = self.val[name]
        world = self.runtime.world_size
        packer = self.packer(source, split, n_lanes=world, epochs=1)
        left = -(-self.eval_tokens // (self.T * world))
        while left > 0:
            batch = packer.batch(min(self.rows, left))
            if batch is None:
                return
            left -= len(batch.inputs)
            yield batch

    def evaluate(self, model: LM) -> dict[str, float]:
        """Validation loss of each source: `val_bpb` for text, `val_chat_loss` (nats a trained token) for chats."""
        found: dict[str, float] = {}
        for name in self.val:
            losses: Losses = bits_per_byte(model, self.validation_batches(name), self.tokenizer)
            if name == "text":
                found["val_bpb"] = losses.bits_per_byte
            else:
                found[f"val_{name}_loss"] = losses.nats_per_token
        return found

    def state_dict(self) -> dict[str, Any]:
        cursors = {name: (self.threads.get(name) or packer).state_dict() for name, packer in self.packers.items()}
        return {"cursors": cursors, "taken": dict(self.taken)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises UsageError when the state was taken from other sources."""
        if set(state["cursors"]) != set(self.packers):
            raise UsageError(
                f"the checkpoint was trained on {' and '.join(state['cursors'])}, this run on "
                f"{' and '.join(self.packers)}: give the same data and tasks, another --run, or --no-resume to start "
                "again"
            )
        for name, cursor in state["cursors"].items():
            self.packers[name].load_state_dict(cursor)
            if self.runtime.rank:  # a checkpoint counts for all ranks; rank 0 goes on counting from there
                self.packers[name].report = Report()
        self.taken = dict(state["taken"])

    def report(self) -> dict[str, float]:
        """Shares of tokens padded and cropped so far, documents split over rows, documents skipped."""
        found: dict[str, float] = {}
        for name, packer in self.packers.items():
            report = self.threads[name].cursor.report if name in self.threads else packer.report
            found[f"{name}_padded_share"] = round(report.padded_share, 5)
            found[f"{name}_cropped_share"] = round(report.cropped_share, 5)
            found[f"{name}_split_documents"] = report.split
            found[f"{name}_skipped_documents"] = report.skipped
            found[f"{name}_dropped_turns"] = report.dropped_turns
        return found

    def close(self) -> None:
        """Stop the threads; the packers go back to the last batch that was taken."""
        for name, thread in self.threads.items():
            thread.close()
            self.packers[name].load_state_dict(thread.state_dict())
        self.threads = {}


def describe(batch: Batch, tokenizer: Tokenizer, n: int = 160) -> str:
    """The beginning of a batch's first row as text, to find it in the data."""
    text = tokenizer.decode(batch.inputs[0, : n // 2].tolist())
    bad = int((batch.targets == IGNORED).all())
    return ("(nothing to train on) " if bad else "") + repr(text[:n])


def to_device(batch: Batch, device: torch.device) -> Batch:
    if device.type == "cpu":
        return batch
    if device.type == "cuda":
        return type(batch)(*(x.pin_memory().to(device, non_blocking=True) for x in batch))
    return type(batch)(*(x.to(device) for x in batch))
