"""The quickstart: tokenizer, base, mid, SFT, RAG, evaluation and report in a row, from the embedded tiny world.

Every stage resumes by itself, so an interrupted quickstart goes on where it stopped. Nothing is fetched from a network.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nanochat import config, runtime
from nanochat.checkpoint import latest, read_meta
from nanochat.data.world import World
from nanochat.engine.load import load_checkpoint
from nanochat.errors import NanochatError, UsageError
from nanochat.evaluation.chat import TaskResult, evaluate
from nanochat.evaluation.commands import BaseEvalSettings, evaluate_base
from nanochat.evaluation.metrics import table
from nanochat.evaluation.rag import GREEDY, Options, measure_rag
from nanochat.evaluation.rag_commands import LONGEST, open_world_of
from nanochat.evaluation.rag_questions import world_questions
from nanochat.evaluation.rag_result import RagResult
from nanochat.evaluation.refrag import Hops, measure_refrag
from nanochat.intervals import Metric, exact, mean
from nanochat.rag.knowledge import Knowledge, open_knowledge
from nanochat.rag.tasks import as_document
from nanochat.report import write_report
from nanochat.runtime import log
from nanochat.tasks.registry import open_task
from nanochat.training.commands import TokenizerSettings, run_dir, train_base, train_mid, train_sft, train_tokenizer
from nanochat.training.rag import RagSettings, train_rag
from nanochat.training.refrag import RefragSettings, train_refrag
from nanochat.training.settings import BaseSettings, MidSettings, SFTSettings


@dataclass(frozen=True)
class Profile:
    """How large everything is. The CPU profile is made for two slow cores and a few minutes."""

    known: int  # entities of the world that the pretraining text tells about
    new: int  # entities that it does not
    wordings: int  # documents an entity
    vocab_size: int
    depth: int
    d_model: int
    sequence_len: int
    rows: int
    base_steps: int
    mid_steps: int
    sft_steps: int
    rag_steps: int
    rag_rows: int
    rag_documents: int  # in a prompt, at most
    refrag_steps: int  # of the supervised stage
    refrag_rounds: int  # of reinforcement learning


RAG_LEN = 1024  # tokens of a row of contexts
EVAL_ROWS = 256  # questions that are answered together: the small model takes as long for one row as for many
PROFILES = {
    "cpu": Profile(120, 1000, 40, 2048, 4, 128, 256, 8, 400, 500, 50, 3000, 1, 3, 1800, 8),
    "gpu": Profile(1000, 8000, 60, 2048, 6, 384, 512, 32, 1200, 1000, 100, 4000, 8, 5, 3000, 100),
}


@dataclass(frozen=True)
class QuickstartSettings:
    """From nothing to a small model that chats about an invented world."""

    run: str = "quickstart"
    """name of the run: everything lies under OUT_DIR/RUN"""
    out_dir: str | None = None
    """directory of all runs (default: $NANOCHAT_OUT, or out)"""
    pattern: str = "alternate"
    """blocks of the model: alternate (Mamba-2 and attention by turns), transformer, mamba, mamba2, or letters such as
    MMMT; a model that reads documents wants two attention blocks"""
    profile: str = "auto"
    """cpu or gpu: how large world and model are (auto: by device)"""
    seed: int = 0
    """seed of initialisation and data order"""
    world_seed: int = 0
    """seed of the invented world"""
    eval_seed: int = 0
    """seed that draws the evaluation's questions and their wording"""
    eval_questions: int = 400
    """questions of each kind at most"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps"""
    dtype: str = "auto"
    """dtype of activations: auto, float32, bfloat16 or float16"""
    scale: float = 1.0
    """factor on the steps of every stage"""
    rag: bool = True
    """also train on documents in the prompt, and build a knowledge base of people the model never heard of (on a CPU
    five to twelve minutes more)"""
    refrag: bool = True
    """also train to search in several hops, first by example, then by reward (only with rag; about as long)"""
    rag_questions: int = 500
    """questions of each kind about the knowledge base at most"""

    @property
    def searches(self) -> bool:
        """Whether there is a stage that searches by itself."""
        return self.rag and self.refrag


@dataclass(frozen=True)
class Plan:
    """The settings of every stage, and the specs of what they read."""

    tokenizer: TokenizerSettings
    base: BaseSettings
    mid: MidSettings
    sft: SFTSettings
    rag: RagSettings
    refrag_sft: RefragSettings
    refrag: RefragSettings
    rag_world: str
    evaluation: dict[str, str]


def plan(settings: QuickstartSettings) -> Plan:
    """Everything the quickstart will do. Raises UsageError for an unknown profile or a scale that leaves no step."""
    name = settings.profile
    if name == "auto":
        name = "gpu" if runtime.setup(settings.device, settings.dtype, settings.seed).device.type == "cuda" else "cpu"
    if name not in PROFILES:
        raise UsageError(f"--profile {settings.profile}: must be auto, {' or '.join(PROFILES)}")
    if settings.scale <= 0:
        raise UsageError(f"--scale {settings.scale}: must be above 0")
    p = PROFILES[name]
    world = f"seed={settings.world_seed},known={p.known},new={p.new}"
    text = f"world:{world},wordings={p.wordings},dialogues=0.1"
    tasks = (
        f"world-qa:{world},split=known,part=train,wordings=4,style=sentence",
        f"world-qa:{world},split=new,part=train,limit={17 * p.known}",
        f"world-chat:{world},split=known,part=train,n={p.known},style=sentence",
    )
    asked = f"part=heldout,draw={settings.eval_seed}"
    where: dict[str, Any] = {"run": settings.run, "out_dir": settings.out_dir}
    common: dict[str, Any] = {
        **where, "seed": settings.seed, "device": settings.device, "dtype": settings.dtype, "eval_tokens": 16384,
        "device_batch_size": p.rows, "total_batch_size": p.rows * p.sequence_len, "save_every": 100, "eval_every": 100,
        "sequence_len": p.sequence_len,
    }  # fmt: skip

    def steps(n: int) -> int:
        return max(1, round(n * settings.scale))

    search: dict[str, Any] = {
        **where, "seed": settings.seed, "device": settings.device, "dtype": settings.dtype, "eval_tokens": 16384,
        "sequence_len": RAG_LEN, "top_k": 1, "contexts": f"entities=120,seed={settings.world_seed}",
        "warm_start_rows": p.rag_rows, "warm_start_lr_scale": RagSettings.lr_scale, "save_every": 200, "absent": 0.2,
    }  # fmt: skip
    return Plan(
        TokenizerSettings(**where, data=text, vocab_size=p.vocab_size),
        BaseSettings(
            **common, data=text, depth=p.depth, d_model=p.d_model, pattern=settings.pattern,
            num_iterations=steps(p.base_steps), warmdown=0.4,
        ),
        MidSettings(**common, data=text, data_share=0.5, tasks=tasks, num_iterations=steps(p.mid_steps)),
        SFTSettings(**common, tasks=tasks, num_iterations=steps(p.sft_steps)),
        RagSettings(
            **{**common, "sequence_len": RAG_LEN, "device_batch_size": p.rag_rows, "save_every": 200,
               "eval_every": 1000, "total_batch_size": p.rag_rows * RAG_LEN},
            source="sft", contexts=f"seed={settings.world_seed},n={rag_contexts(p, settings.scale)},"
            f"documents={p.rag_documents},questions=12", num_iterations=steps(p.rag_steps), top_k=p.rag_documents,
        ),
        RefragSettings(**search, warm_start_steps=steps(p.refrag_steps), use_rewards=False),
        RefragSettings(**search, source="refrag_sft", warm_start_steps=0, num_iterations=steps(p.refrag_rounds),
                       eval_prompts=64, eval_every=4, curriculum="none", oversample=2, max_rows=256),
        f"world:seed={settings.world_seed + 1},known=10,new={p.new}",
        {
            "closed_book_known_em": f"world-qa:{world},split=known,{asked},style=sentence",
            "closed_book_new_abstain": f"world-qa:{world},split=new,{asked}",
        },
    )  # fmt: skip


def rag_contexts(p: Profile, scale: float) -> int:
    """How many contexts the RAG stage reads: one fills about 490 tokens."""
    return max(20, round(scale * p.rag_steps * p.rag_rows * RAG_LEN / 490))


class Clock:
    """Seconds spent on each part, summed over calls that were interrupted."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, float] = {}
        if path.exists():
            try:
                self.seconds = json.loads(path.read_text())
            except ValueError:
                log.warning("%s is damaged: timings start again", path)

    def time(self, name: str, work: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        try:
            return work()
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.seconds))


    def of(self, kind: str) -> float:
        """Seconds of all parts whose names begin with this word."""
        return sum(seconds for name, seconds in self.seconds.items() if name.split("_")[0] == kind)


def run_quickstart(settings: QuickstartSettings) -> dict[str, Metric]:
    """Do what is not done yet, write report.html and report.json, and return the metrics."""
    todo = plan(settings)
    directory = run_dir(todo.base)
    remember(settings, directory)
    clock = Clock(directory / "timings.json")
    if not (directory / "tokenizer").exists():
        clock.time("tokenizer", lambda: train_tokenizer(todo.tokenizer))
    stages: list[tuple[str, Callable[[], object]]] = [
        ("base", lambda: train_base(todo.base)),
        ("mid", lambda: train_mid(todo.mid)),
        ("sft", lambda: train_sft(todo.sft)),
    ]
    if settings.rag:
        stages.append(("rag", lambda: train_rag(todo.rag)))
    if settings.searches:
        stages.append(("refrag_sft", lambda: train_refrag(todo.refrag_sft)))
        stages.append(("refrag", lambda: train_refrag(todo.refrag)))
    for name, train in stages:
        if complete(directory / name):
            log.info("%s: complete", name)
        else:
            clock.time(name, train)
        trained = read_meta_of(directory / name)["metrics"]["train_seconds"]  # a killed call left no time of its own
        clock.seconds[name] = max(clock.seconds.get(name, 0.0), trained)
    metrics, samples = clock.time("evaluation", lambda: measure(settings, todo, directory))
    if settings.rag:
        found, more = clock.time("rag_evaluation", lambda: measure_grounded(settings, todo, directory))
        metrics |= found
        samples += more
        metrics["rag_seconds"] = exact(clock.of("rag"))
    if settings.searches:
        found, more = clock.time("refrag_evaluation", lambda: measure_searching(settings, todo, directory))
        metrics |= found
        samples += more
        metrics["refrag_seconds"] = exact(clock.of("refrag"))
    metrics |= {
        "train_seconds": exact(sum(clock.seconds.values()) - clock.of("rag") - clock.of("refrag")),
        "tokens_per_second": exact(read_meta_of(directory / "base")["metrics"]["tokens_per_second"]),
    }
    extra = {"samples": samples, "timings": clock.seconds, "settings": asdict(settings)}
    write_report(directory, {"metrics": {name: asdict(metric) for name, metric in metrics.items()}, **extra})
    return metrics


def remember(settings: QuickstartSettings, directory: Path) -> None:
    """One directory is one quickstart: other settings in it would continue a different model.

    Raises UsageError naming what differs. What only concerns the evaluation may change.
    """
    path = directory / "quickstart.json"
    if path.exists():
        before = config.load(QuickstartSettings, path)
        free = {"eval_seed", "eval_questions", "rag_questions", "out_dir"}
        changed = [k for k in config.differences(before, settings) if k not in free]
        if changed:
            shown = ", ".join(f"--{k} was {getattr(before, k)} and is {getattr(settings, k)}" for k in changed)
            raise UsageError(f"{directory} holds another quickstart ({shown}): give another --run, or delete it")
    config.save(settings, path)


def complete(stage_dir: Path) -> bool:
    return latest(stage_dir) is not None and read_meta_of(stage_dir)["metrics"].get("final") == 1.0


def read_meta_of(stage_dir: Path) -> dict[str, Any]:
    path = latest(stage_dir)
    if path is None:
        raise NanochatError(f"{stage_dir} holds no checkpoint: run the quickstart again")
    return read_meta(path)


def measure(
    settings: QuickstartSettings, todo: Plan, directory: Path
) -> tuple[dict[str, Metric], list[dict[str, Any]]]:
    """Held-out questions to the SFT model, bits per byte of the base model."""
    chat = load_checkpoint(str(directory / "sft"), device=settings.device, dtype=settings.dtype)
    metrics, samples = {}, []
    for name, spec in todo.evaluation.items():
        result: TaskResult = evaluate(
            chat.model, chat.tokenizer, open_task(spec), max_problems=settings.eval_questions, seed=settings.eval_seed,
            n_samples=6, progress=True,
        )  # fmt: skip
        metrics[name] = result.accuracy
        samples += result.samples
    text = evaluate_base(
        BaseEvalSettings(
            source=str(directory / "base"), data=todo.base.data, eval_tokens=todo.base.eval_tokens,
            seed=settings.eval_seed, device=settings.device, dtype=settings.dtype,
        )
    )  # fmt: skip
    metrics["val_bpb"] = text["val_bpb"]
    return metrics, samples


def measure_grounded(
    settings: QuickstartSettings, todo: Plan, directory: Path
) -> tuple[dict[str, Metric], list[dict[str, Any]]]:
    """Questions about a world that no stage has seen, to the RAG model with a knowledge base of that world."""
    world = open_world_of(todo.rag_world)
    knowledge = build_knowledge(directory / "knowledge_base", world)
    chat = load_checkpoint(str(directory / "rag"), device=settings.device, dtype=settings.dtype)
    questions = world_questions(world, settings.rag_questions, settings.rag_questions, settings.eval_seed)
    options = Options(
        top_k=todo.rag.top_k, n_latency=0, seed=settings.eval_seed, progress=True, batch_size=EVAL_ROWS
    )  # fmt: skip
    result = measure_rag(chat.model, chat.tokenizer, knowledge, questions, options)
    return result.metrics(), result.samples(6)


def measure_searching(
    settings: QuickstartSettings, todo: Plan, directory: Path
) -> tuple[dict[str, Metric], list[dict[str, Any]]]:
    """Questions of two and three hops about the same world: to the model that searches, before and after it learnt from
    rewards, and with one search for as many documents to the RAG model."""
    world, wanted = open_world_of(todo.rag_world), settings.rag_questions
    knowledge = build_knowledge(directory / "knowledge_base", world)
    questions = world_questions(world, wanted, -(-wanted // 5), settings.eval_seed, (2, 3))
    hops = Hops(todo.refrag.max_hops, todo.refrag.top_k)
    options = Options(
        top_k=hops.max_hops * hops.top_k, n_latency=0, seed=settings.eval_seed, progress=True, batch_size=EVAL_ROWS,
        sampling=replace(GREEDY, max_tokens=LONGEST["refrag"]),
    )  # fmt: skip
    results: dict[str, RagResult] = {}
    for stage in ("rag", "refrag_sft", "refrag"):
        chat = load_checkpoint(str(directory / stage), device=settings.device, dtype=settings.dtype)
        asked = (chat.model, chat.tokenizer, knowledge, questions, options)
        results[stage] = measure_rag(*asked, ["rag"]) if stage == "rag" else measure_refrag(*asked, hops, ["refrag"])
    metrics = results["refrag"].metrics()
    before, after = (
        [float(j.right) for j in results[stage].columns["refrag"].judged if j.question.answerable]
        for stage in ("refrag_sft", "refrag")
    )
    metrics["refrag_sft_em"] = results["refrag_sft"].metrics()["refrag_em"]
    metrics["refrag_rl_gain"] = mean([b - a for a, b in zip(before, after)], settings.eval_seed)
    metrics["multihop_one_shot_em"] = results["rag"].metrics()["rag_em"]
    return metrics, results["refrag"].samples(6)


def build_knowledge(path: Path, world: World) -> Knowledge:
    """The documents of all new entities of a world as a knowledge base (made once). Without the `rag` extra it is one
    that needs numpy only."""
    from nanochat.retrieval import KnowledgeBase

    if not path.exists():
        kind = "bm25" if importlib.util.find_spec("tantivy") else "simple"
        unfinished = path.with_name(path.name + ".part")
        shutil.rmtree(unfinished, ignore_errors=True)
        with KnowledgeBase.create(unfinished, kind=kind) as base:
            base.add(as_document(record) for record in world.documents("new"))
        unfinished.rename(path)
    return open_knowledge(path)


def quickstart(argv: list[str] | None = None) -> None:
    """The command `nanochat quickstart`."""
    settings = config.parse(QuickstartSettings, argv, prog="nanochat quickstart")
    try:
        metrics = run_quickstart(replace(settings, out_dir=settings.out_dir or str(runtime.out_root())))
    finally:
        runtime.finish()
    directory = Path(settings.out_dir or runtime.out_root()) / settings.run
    runtime.print0(f"\n{table(metrics)}\n\nreport: {directory / 'report.html'}")
    question = open_task(plan(settings).evaluation["closed_book_known_em"])[0]["messages"][0]["content"]
    command = Path(sys.prefix) / "bin" / "nanochat"
    runtime.print0(f"talk to it: {command} chat_cli --run {settings.run} --temperature 0 -p {json.dumps(question)}")
    if settings.rag:
        base = directory / "knowledge_base"
        runtime.print0(
            f"ask about documents: {command} chat_cli --run {settings.run} --source rag --knowledge_base {base} "
            f"--documents {plan(settings).rag.top_k} -p {json.dumps(ask_example(plan(settings)))}"
        )


def ask_example(todo: Plan) -> str:
    """A question that the knowledge base answers."""
    world = open_world_of(todo.rag_world)
    return next(world.questions(1, "new", "heldout", 0, 1)).text
