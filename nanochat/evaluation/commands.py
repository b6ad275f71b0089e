"""The evaluation commands: a checkpoint in; a printed table and a JSON file beside the stages of its run out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from nanochat import config, runtime
from nanochat.data.batches import Batch, Packer
from nanochat.data.corpus import Corpus, open_corpus
from nanochat.data.spec import split_spec
from nanochat.data.text import TextSource
from nanochat.engine.generate import Engine
from nanochat.engine.load import Loaded, load_checkpoint
from nanochat.engine.sampling import Sampling
from nanochat.errors import NanochatError, UsageError
from nanochat.evaluation.chat import TaskResult, evaluate, gather
from nanochat.evaluation.language import row_losses
from nanochat.evaluation.metrics import table, write_metrics
from nanochat.evaluation.position import by_position, passkey
from nanochat.intervals import Metric, ratio
from nanochat.tasks.registry import open_task


@dataclass(frozen=True)
class EvalSettings:
    """Shared by both evaluations."""

    source: str = "sft"
    """what to evaluate: a stage (base, mid, sft), or the path of a checkpoint, stage or run directory"""
    run: str | None = None
    """name of the run (default: the one that wrote this stage last)"""
    out_dir: str | None = None
    """directory of all runs (default: $NANOCHAT_OUT, or out)"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps"""
    dtype: str = "auto"
    """dtype of activations: auto, float32, bfloat16 or float16"""
    quantize: str | None = None
    """weights in fewer bytes: fp32, bf16 or int8"""
    batch_size: int = 32
    """rows that go through the model together"""
    seed: int = 0
    """of samples, of the problems drawn, and of the bootstrap"""

    def check(self) -> None:
        """Raises UsageError naming the flag, its value and what is allowed."""
        limits = {
            "batch_size": 1, "eval_tokens": 1, "max_problems": 0, "max_tokens": 1, "samples": 0, "position_len": 0,
            "passkey_samples": 1,
        }  # fmt: skip
        for flag, least in limits.items():
            if getattr(self, flag, least) < least:
                raise UsageError(f"--{flag} {getattr(self, flag)}: must be at least {least}")


@dataclass(frozen=True)
class BaseEvalSettings(EvalSettings):
    """Evaluate a model on raw text: bits per byte, nats per token, and a few continuations."""

    source: str = "base"
    """what to evaluate: a stage (base, mid, sft), or the path of a checkpoint, stage or run directory"""
    data: str = "world:seed=0,known=200"
    """where validation text comes from, as for base_train"""
    eval_tokens: int = 131072
    """validation tokens to measure (fewer when there are fewer)"""
    prompts: tuple[str, ...] = ()
    """texts to continue (default: the first words of validation documents)"""
    samples: int = 4
    """how many such documents"""
    max_tokens: int = 64
    """longest continuation"""
    temperature: float = 0.0
    """of the continuations; 0: always the most likely token"""
    by_position: bool = False
    """also measure the loss at every position of rows longer than those of training"""
    position_len: int = 0
    """tokens of such a row (0: 4 times the training's)"""
    passkey: tuple[int, ...] = ()
    """also ask for a number that was said once, in texts of so many tokens each"""
    passkey_samples: int = 20
    """numbers asked for in each length, from said at once to said right before the question"""


@dataclass(frozen=True)
class ChatEvalSettings(EvalSettings):
    """Evaluate a model on chat tasks: how often it is right, and how often it abstains."""

    tasks: tuple[str, ...] = (
        "world-qa:seed=0,known=200,split=known,part=heldout",
        "world-qa:seed=0,known=200,split=new,part=heldout",
    )
    """tasks as specs of nanochat.tasks; world tasks without draw=N are drawn by --seed"""
    max_problems: int = 0
    """problems of each task, drawn by --seed (0: all)"""
    max_tokens: int = 256
    """longest answer"""
    temperature: float = 0.0
    """0: always the most likely token"""
    controls: bool = False
    """multiple choice: also score always the first letter, guessing, and random weights"""
    samples: int = 5
    """answers of each task to keep"""


def evaluate_base(settings: BaseEvalSettings) -> dict[str, Metric]:
    """Measure, write `base_eval_<stage>.json` into the run's directory, and return the metrics."""
    settings.check()
    corpus = open_corpus(settings.data)
    loaded = load(settings)
    rows = row_losses(loaded.model, validation_batches(loaded, corpus, settings), loaded.tokenizer)
    sums = gather(list(zip(*(column.tolist() for column in rows))))
    if not sums:
        raise NanochatError(f"--data {settings.data}: its validation split holds no text")
    nats, tokens, text_nats, n_bytes = zip(*sums)
    bits = [nat / math.log(2) for nat in text_nats]
    metrics = {"val_bpb": ratio(bits, n_bytes, settings.seed), "val_nats_per_token": ratio(nats, tokens, settings.seed)}
    model, tokenizer = loaded.model, loaded.tokenizer
    if settings.by_position:
        n_long = settings.position_len or 4 * model.config.sequence_len
        n_rows = max(1, settings.eval_tokens // n_long)
        metrics |= by_position(model, tokenizer, corpus, n_long, n_rows, settings.batch_size, settings.seed)
    if settings.passkey:
        metrics |= passkey(model, tokenizer, corpus, settings.passkey, settings.passkey_samples, settings.seed)
    samples = continuations(loaded, corpus, settings)
    more = {
        "data": settings.data, "tokens": round(sum(tokens)), "bytes": round(sum(n_bytes)),
        "rows": len(sums), "sequence_len": loaded.model.config.sequence_len, "samples": samples,
    }  # fmt: skip
    save("base_eval", settings, loaded, metrics, more)
    return metrics


def validation_batches(loaded: Loaded, corpus: Corpus, settings: BaseEvalSettings) -> Iterator[Batch]:
    """The same rows as at the end of training, for the same corpus, number of tokens and ranks."""
    rank, world = runtime.rank(), runtime.world_size()
    source = TextSource(corpus, loaded.tokenizer, "val")
    T = loaded.model.config.sequence_len
    packer = Packer(source, T, pad_id=loaded.tokenizer.bos, n_lanes=world, rank=rank, world_size=world, epochs=1)
    left = -(-settings.eval_tokens // (T * world))
    while left > 0 and (batch := packer.batch(min(settings.batch_size, left))) is not None:
        left -= len(batch.inputs)
        yield batch


def continuations(loaded: Loaded, corpus: Corpus, settings: BaseEvalSettings) -> list[dict[str, Any]]:
    """What the model makes of the prompts, or of the beginnings of validation documents."""
    prompts = list(settings.prompts)
    if not prompts:
        documents = islice(corpus.documents("val"), settings.samples)
        prompts = [" ".join(text.split()[:6]) for text in documents]
    room = loaded.model.config.sequence_len - 1
    ids = [loaded.tokenizer.encode(prompt, bos=True)[:room] for prompt in prompts]
    sampling = Sampling(max_tokens=settings.max_tokens, temperature=settings.temperature, seed=settings.seed)
    completions = Engine(loaded.model, loaded.tokenizer).generate_batch(ids, sampling)
    return [{"prompt": prompt, "text": completion.text} for prompt, completion in zip(prompts, completions)]


def evaluate_chat(settings: ChatEvalSettings) -> dict[str, Metric]:
    """Evaluate every task, write `chat_eval_<stage>.json` into the run's directory, and return the metrics."""
    settings.check()
    if not settings.tasks:
        raise UsageError("--tasks: name at least one task, for example world-qa:part=heldout or arc:path=FILE")
    sampling = Sampling(max_tokens=settings.max_tokens, temperature=settings.temperature, seed=settings.seed)
    specs = [drawn(spec, settings.seed) for spec in settings.tasks]
    tasks = [open_task(spec) for spec in specs]
    loaded = load(settings)
    metrics: dict[str, Metric] = {}
    found: list[dict[str, Any]] = []
    samples: list[dict[str, Any]] = []
    for spec, task in zip(specs, tasks):
        result = evaluate(
            loaded.model, loaded.tokenizer, task,
            max_problems=settings.max_problems, seed=settings.seed, batch_size=settings.batch_size, sampling=sampling,
            controls=settings.controls, n_samples=settings.samples, progress=True,
        )  # fmt: skip
        name = task.name if f"{task.name}_accuracy" not in metrics else spec  # two specs may share a name
        metrics |= result.metrics(name)
        found.append(describe(name, spec, result))
        samples += result.samples
    save("chat_eval", settings, loaded, metrics, {"tasks": found, "samples": samples})
    return metrics


def drawn(spec: str, seed: int) -> str:
    """The spec, with `draw` from the seed where it is of a world task that does not say."""
    name, options = split_spec(spec)
    if not name.startswith("world-") or "draw" in options:
        return spec
    return f"{name}:" + ",".join(f"{key}={value}" for key, value in {**options, "draw": str(seed)}.items())


def describe(name: str, spec: str, result: TaskResult) -> dict[str, Any]:
    return {
        "name": name,
        "spec": spec,
        "eval_type": result.eval_type,
        "n": result.accuracy.n,
        "n_cut": result.n_cut,
        "seconds": round(result.seconds, 3),
    }


def load(settings: EvalSettings) -> Loaded:
    return load_checkpoint(
        settings.source, settings.run, settings.out_dir, settings.device, settings.dtype, settings.quantize
    )


def save(kind: str, settings: EvalSettings, loaded: Loaded, metrics: dict[str, Metric], more: dict[str, Any]) -> Path:
    """Write `<kind>_<stage>.json` beside the stage directory, on rank 0."""
    stage = str(loaded.meta.get("stage") or loaded.path.parent.name)
    path = loaded.path.parent.parent / f"{kind}_{stage}.json"
    if runtime.rank() == 0:
        about = {"kind": kind, "stage": stage, "step": loaded.meta["step"], "checkpoint": str(loaded.path)}
        if settings.quantize:
            about["quantize"] = settings.quantize
        write_metrics(path, metrics, **about, seed=settings.seed, **more)
    runtime.print0(f"{loaded.path}\n{table(metrics)}\nwritten to {path}")
    return path


def base_eval(argv: list[str] | None = None) -> None:
    """The command `nanochat base_eval`."""
    try:
        evaluate_base(config.parse(BaseEvalSettings, argv, prog="nanochat base_eval"))
    finally:
        runtime.finish()


def chat_eval(argv: list[str] | None = None) -> None:
    """The command `nanochat chat_eval`."""
    try:
        evaluate_chat(config.parse(ChatEvalSettings, argv, prog="nanochat chat_eval"))
    finally:
        runtime.finish()
