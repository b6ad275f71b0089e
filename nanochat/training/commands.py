"""The training commands: settings in, a trained stage directory out. `scripts/` and the pipeline call these."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from nanochat import checkpoint, config, runtime
from nanochat.data.corpus import open_corpus
from nanochat.data.text import TextSource
from nanochat.errors import UsageError
from nanochat.model.config import ModelConfig
from nanochat.model.lm import LM
from nanochat.runtime import Runtime, log
from nanochat.tasks.registry import open_mixture
from nanochat.tasks.task import Mixture, Task, short_questions
from nanochat.tokenizer import Tokenizer
from nanochat.training import restart
from nanochat.training.carry import Carry
from nanochat.training.loop import Trainer
from nanochat.training.settings import BaseSettings, MidSettings, SFTSettings, TrainSettings, check_architecture
from nanochat.training.supervised import ChatSource, PackedStage

S = TypeVar("S", bound=TrainSettings)


@dataclass(frozen=True)
class TokenizerSettings:
    """Train the tokenizer of a run."""

    run: str = "default"
    """name of the run"""
    out_dir: str | None = None
    """directory of all runs (default: $NANOCHAT_OUT, or out)"""
    data: str = "world:seed=0,known=200"
    """where text comes from, as for base_train"""
    vocab_size: int = 32768
    """tokens, special ones included"""
    max_chars: int = 2_000_000_000
    """characters of text to learn from"""
    doc_cap: int = 10_000
    """characters of one document to learn from"""


def run_dir(settings: TrainSettings | TokenizerSettings) -> Path:
    return runtime.run_path(settings.out_dir, settings.run)


def train_tokenizer(settings: TokenizerSettings) -> Tokenizer:
    """Train on the corpus's training split and save under the run's `tokenizer/`. Raises UsageError rather than
    replace the tokenizer of models that were trained with it."""
    runtime.start_log()
    directory = run_dir(settings) / "tokenizer"
    corpus = open_corpus(settings.data)
    texts = (text[: settings.doc_cap] for text in corpus.documents("train"))
    tokenizer = Tokenizer.train(texts, settings.vocab_size, max_chars=settings.max_chars)
    stages = sorted({path.parent.parent.name for path in directory.parent.glob("*/step_*/meta.json")})
    if stages and (directory / "bpe.json").exists() and Tokenizer.load(directory).hash != tokenizer.hash:
        raise UsageError(
            f"--run {settings.run}: {', '.join(stages)} of this run were trained with another tokenizer, and would be "
            f"worthless without it: choose another --run, or delete {directory.parent} first"
        )
    tokenizer.save(directory)
    log.info("tokenizer: %d tokens in %s", tokenizer.vocab_size, directory)
    return tokenizer


def load_tokenizer(directory: Path) -> Tokenizer:
    if not directory.exists():
        run = directory.parent.name
        others = sorted(path.parent.name for path in directory.parent.parent.glob("*/tokenizer"))
        hint = f", or give another --run: there is {', '.join(others)}" if others else ""
        raise UsageError(f"there is no tokenizer in {directory}: run `nanochat tok_train --run {run}` first{hint}")
    return Tokenizer.load(directory)


def start(settings: TrainSettings) -> Runtime:
    settings.check()
    return runtime.setup(device=settings.device, dtype=settings.dtype, seed=settings.seed)


def new_model(settings: TrainSettings, tokenizer: Tokenizer, rt: Runtime) -> LM:
    options = {"sequence_len": 512, **settings.model_options()}
    return LM.build(ModelConfig(vocab_size=tokenizer.vocab_size, **options), device=rt.device, seed=settings.seed)


def model_from(path: Path, tokenizer: Tokenizer, settings: TrainSettings, rt: Runtime) -> LM:
    """The model of a checkpoint, checked against the tokenizer and the settings.

    Raises UsageError when an option contradicts the checkpoint, NanochatError when the checkpoint is damaged.
    """
    saved = checkpoint.load(path, device="cpu")
    architecture = ModelConfig.from_dict(saved.meta["model_config"])
    check_architecture(architecture, settings, str(path))
    check_tokenizer(saved.meta, tokenizer, path)
    if settings.sequence_len is not None:
        architecture = replace(architecture, sequence_len=settings.sequence_len).resolved()
    with torch.device("meta"):
        model = LM(architecture)
    model.to_empty(device=rt.device)
    model.load_state_dict(saved.tensors["model"])
    model.source = saved.meta["checksum"]
    model.suggestions = saved.meta.get("suggestions", [])
    return model


def check_tokenizer(meta: dict[str, Any], tokenizer: Tokenizer, path: Path) -> None:
    if meta["tokenizer_hash"] != tokenizer.hash:
        raise UsageError(
            f"the tokenizer of this run ({tokenizer.hash[:12]}) is not the one that {path} was trained with "
            f"({meta['tokenizer_hash'][:12]}): use the run whose tokenizer/ it was trained with, or train again"
        )


def horizon(settings: TrainSettings, own_tokens: int, T: int, rt: Runtime) -> tuple[int, int]:
    """(optimizer steps, micro-batches a step). Raises UsageError when the total batch is no multiple of one pass."""
    once = settings.device_batch_size * T * rt.world_size
    total = settings.total_batch_size or once
    if total % once:
        raise UsageError(
            f"--total_batch_size {total} must be a multiple of {once} = {settings.device_batch_size} rows x {T} tokens "
            f"x {rt.world_size} process(es)"
        )
    if settings.num_iterations:
        return settings.num_iterations, total // once
    if settings.max_minutes:
        return 0, total // once
    return max(1, math.ceil((settings.target_tokens or own_tokens) / total)), total // once


def train_stage(
    name: str,
    settings: TrainSettings,
    stage: PackedStage,
    model: LM,
    tokenizer: Tokenizer,
    rt: Runtime,
    own_tokens: int,
    carry: Carry | None = None,
) -> dict[str, float]:
    """Train for as long as the settings say, or until `own_tokens` are read; the final metrics."""
    check_start_len(settings.start_len, stage)
    n_steps, n_micro = horizon(settings, own_tokens, stage.T, rt)
    size = f"{n_micro * settings.device_batch_size * stage.T * rt.world_size:,} tokens"

    def make(directory: Path) -> Trainer:
        return Trainer(stage, model, tokenizer, settings, rt, directory, n_steps, n_micro, carry)

    return run_stage(name, settings, model, rt, n_steps, size, make)


def run_stage(
    name: str, settings: TrainSettings, model: LM, rt: Runtime, n_steps: int, size: str, make: Callable[[Path], Trainer]
) -> dict[str, float]:
    """Lock the stage directory, make its trainer, train, return the final metrics. size: of a step, for the log."""
    directory = run_dir(settings) / name
    model.checkpointing = settings.checkpointing
    model.compute_dtype = rt.dtype
    counts = model.n_params()
    log.info(
        "%s: %s, %.2fM parameters (%.2fM in blocks), %s, %s a step",
        name, " ".join(model.config.blocks), counts["total"] / 1e6, counts["blocks"] / 1e6,
        f"{settings.max_minutes:g} minutes" if settings.max_minutes else f"{n_steps} steps",
        size,
    )  # fmt: skip
    with checkpoint.lock(directory) if rt.is_main else contextlib.nullcontext():
        if rt.is_main:
            (restart.settle if settings.resume else restart.begin)(directory)
        runtime.barrier()  # no rank looks for a checkpoint before
        return make(directory).run()


def train_base(settings: BaseSettings) -> dict[str, float]:
    """Pretrain on raw text."""
    rt = start(settings)
    tokenizer = load_tokenizer(run_dir(settings) / "tokenizer")
    corpus = open_corpus(settings.data)
    if settings.source:
        model = model_from(find_source(settings), tokenizer, settings, rt)
    else:
        model = new_model(settings, tokenizer, rt)
    stage = PackedStage(
        {"text": (TextSource(corpus, tokenizer, "train"), 1.0, True)},
        {"text": (TextSource(corpus, tokenizer, "val"), True)},
        tokenizer, rt, **stage_options(settings, model), in_order=settings.carry_state,
    )  # fmt: skip
    own = round(settings.tokens_per_param * model.n_params()["blocks"])
    model.compute_dtype = rt.dtype
    carry = Carry(model, settings.device_batch_size, tokenizer.bos) if settings.carry_state else None
    return train_stage("base", settings, stage, model, tokenizer, rt, own, carry)


def train_mid(settings: MidSettings) -> dict[str, float]:
    """Go on with text and conversations mixed."""
    return train_on_chats("mid", settings, settings.tasks, settings.data, settings.data_share, settings.epochs)


def train_sft(settings: SFTSettings) -> dict[str, float]:
    """Fine-tune on conversations."""
    return train_on_chats("sft", settings, settings.tasks, "", 0.0, settings.epochs)


def train_on_chats(
    name: str, settings: TrainSettings, tasks: tuple[str, ...], data: str, share: float, epochs: float
) -> dict[str, float]:
    rt = start(settings)
    tokenizer = load_tokenizer(run_dir(settings) / "tokenizer")
    train_task, val_task = split_task(open_tasks(tasks))
    return train_on_tasks(name, settings, train_task, val_task, tokenizer, rt, data, share, epochs)


def train_on_tasks(
    name: str,
    settings: TrainSettings,
    train_task: Task,
    val_task: Task,
    tokenizer: Tokenizer,
    rt: Runtime,
    data: str = "",
    share: float = 0.0,
    epochs: float = 1.0,
    shuffle: bool = True,
) -> dict[str, float]:
    """Train the source's model on a task, with `share` of the rows from raw text `data`. shuffle: each epoch in an
    order of its own; a curriculum goes in its own order."""
    model = model_from(find_source(settings), tokenizer, settings, rt)
    T = model.config.sequence_len
    chat = ChatSource(train_task, tokenizer, T, settings.seed, shuffle)
    val_chat = ChatSource(val_task, tokenizer, T, settings.seed, shuffle=False)
    if name in ("mid", "sft"):  # what later stages add, questions about documents, needs the documents
        model.suggestions = short_questions(val_task)
    train: dict[str, Any] = {"chat": (chat, 1.0 - share if data else 1.0, False)}
    val: dict[str, Any] = {"chat": (val_chat, False)}
    if data:
        corpus = open_corpus(data)
        train["text"] = (TextSource(corpus, tokenizer, "train"), share, True)
        val["text"] = (TextSource(corpus, tokenizer, "val"), True)
    stage = PackedStage(train, val, tokenizer, rt, **stage_options(settings, model))
    chat_tokens = estimate_tokens(chat) * epochs
    return train_stage(name, settings, stage, model, tokenizer, rt, round(chat_tokens / train["chat"][1]))


def stage_options(settings: TrainSettings, model: LM) -> dict[str, Any]:
    return {
        "rows": settings.device_batch_size,
        "sequence_len": model.config.sequence_len,
        "n_lanes": settings.n_lanes,
        "eval_tokens": settings.eval_tokens,
    }


def check_start_len(start_len: int, stage: PackedStage) -> None:
    """Raises UsageError for rows that must stay whole, and where doubling does not lead to their length."""
    if start_len and "chat" in stage.packers:
        raise UsageError(f"--start_len {start_len} is for base_train: shorter rows would part answers from questions")
    if start_len and (stage.T % start_len or (stage.T // start_len).bit_count() != 1):
        raise UsageError(f"--start_len {start_len}: the rows' {stage.T} tokens must be it times a power of 2")


def find_source(settings: TrainSettings) -> Path:
    return checkpoint.find(settings.source, run_dir(settings).parent, settings.run)


def open_tasks(specs: tuple[str, ...]) -> Task:
    """The tasks that the specs name, with their weights, in one order."""
    mixture = open_mixture(specs)
    only = mixture.tasks[0]
    return only if len(mixture.tasks) == 1 and len(mixture) == len(only) else mixture


class Part:
    """Every `n`-th conversation of a task (or all others)."""

    def __init__(self, task: Task, indices: list[int], name: str) -> None:
        self.task, self.indices, self.name, self.eval_type = task, indices, name, task.eval_type

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.task[self.indices[i]]

    def evaluate(self, conversation: dict[str, Any], completion: str) -> bool:
        return self.task.evaluate(conversation, completion)


def split_task(task: Task, every: int = 50) -> tuple[Task, Task]:
    """Training conversations, and a fixed 2% of them held back to measure the loss on (at least one). What a mixture
    goes through several times is held back as a whole: it is measured once, and never trained on."""
    n = len(task)
    at: Callable[[int], Any] = task.locate if isinstance(task, Mixture) and task.repeats else int  # which conversation
    held: dict[Any, int] = {}  # and where it comes first
    for i in range(0, n, every):
        held.setdefault(at(i), i)
    train = [i for i in range(n) if at(i) not in held]
    if not train:
        raise UsageError(f"the task {task.name} has {len(held)} conversation(s): training needs at least 2")
    return Part(task, train, task.name), Part(task, list(held.values()), f"{task.name} (held back)")


def estimate_tokens(chat: ChatSource, sample: int = 200) -> float:
    """Tokens of one pass over the task, from an evenly spaced sample."""
    n = len(chat.task)
    at = range(0, n, max(1, n // sample))
    sizes = [len(p.inputs) if (p := chat.piece(chat.task[i])) else 0 for i in at]
    return n * sum(sizes) / len(sizes)


def tok_train(argv: list[str] | None = None) -> None:
    train_tokenizer(config.parse(TokenizerSettings, argv, prog="tok_train"))


def base_train(argv: list[str] | None = None) -> None:
    finish("base", train_base, config.parse(BaseSettings, argv, prog="base_train"))


def mid_train(argv: list[str] | None = None) -> None:
    finish("mid", train_mid, config.parse(MidSettings, argv, prog="mid_train"))


def chat_sft(argv: list[str] | None = None) -> None:
    finish("sft", train_sft, config.parse(SFTSettings, argv, prog="chat_sft"))


def finish(name: str, train: Any, settings: Any) -> None:
    try:
        metrics = train(settings)
        shown = ", ".join(f"{k} {v:,.4g}" for k, v in metrics.items() if k != "final")
        runtime.print0(f"{name}: {shown}\nsaved under {run_dir(settings) / name}")
    finally:
        runtime.finish()
