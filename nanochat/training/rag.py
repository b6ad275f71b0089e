"""The RAG stage: questions with their documents in the prompt, answered with citations or not at all.

    rag_finetune --knowledge_base data/rag/knowledge_base --source mid --retriever_type hybrid --top_k 5

It is the supervised loop over other tasks: what a knowledge base finds for the questions beside it (or in
`--questions`), contexts of the tiny world, and chat tasks with retrieval put before them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat import config
from nanochat.checkpoint import read_meta
from nanochat.data.spec import read_options, split_spec
from nanochat.errors import NanochatError, UsageError
from nanochat.rag.knowledge import Knowledge, open_knowledge
from nanochat.rag.questions import RagQuestion, load_questions
from nanochat.rag.tasks import RagWorld, Retrieved, Wrapped
from nanochat.tasks.registry import open_task
from nanochat.tasks.task import Curriculum, Mixture, Task
from nanochat.tokenizer import Tokenizer
from nanochat.training.commands import (
    find_source,
    finish,
    load_tokenizer,
    run_dir,
    split_task,
    start,
    train_on_tasks,
)
from nanochat.training.settings import TrainSettings

WORLD_OPTIONS = {"seed": int, "n": int, "documents": int, "questions": int, "absent": float}


@dataclass(frozen=True)
class RagSettings(TrainSettings):
    """Fine-tune on documents in the prompt: cite, answer, or abstain."""

    source: str = "mid"
    """where the weights come from: a stage or a path"""
    knowledge_base: str = ""
    """directory of the knowledge base that questions are searched in"""
    questions: str = ""
    """JSONL of questions with answers and gold documents (default: train.jsonl beside the knowledge base)"""
    retriever_type: str = ""
    """how to search: simple, bm25, dense or hybrid (default: what the knowledge base was built for)"""
    top_k: int = 5
    """documents a prompt"""
    document_tokens: int = 0
    """tokens that the documents of a prompt may take (0: three quarters of the context)"""
    absent: float = 0.15
    """share of the prompts whose documents do not answer, so that abstaining is learnt"""
    contexts: str = ""
    """contexts of the tiny world mixed in, each of a world of its own: seed=1,n=100000,documents=3,questions=6"""
    first: float = 0.3
    """share of the run at the beginning with one document a context (only with --contexts and no knowledge base)"""
    tasks: tuple[str, ...] = ()
    """chat tasks mixed in, with what the knowledge base finds put before them"""
    epochs: float = 1.0
    """passes over the tasks, when no number of steps or tokens is given"""
    lr_scale: float = 0.35
    """factor on every learning rate"""

    def problems(self) -> list[str]:
        found = super().problems()
        if self.top_k < 1:
            found.append(f"--top_k {self.top_k}: must be at least 1")
        for flag in ("absent", "first"):
            if not 0 <= getattr(self, flag) < 1:
                found.append(f"--{flag} {getattr(self, flag)}: must be at least 0 and below 1")
        if not (self.knowledge_base or self.contexts):
            found.append(
                "nothing to train on: give --knowledge_base DIRECTORY (train.jsonl beside it, or --questions FILE), or "
                "--contexts documents=3 for contexts of the tiny world"
            )
        return found


def train_rag(settings: RagSettings) -> dict[str, float]:
    """Check everything, then train the stage `rag` of the run. Raises UsageError that lists all that is wrong."""
    knowledge, questions = validate(settings)
    rt = start(settings)
    tokenizer = load_tokenizer(run_dir(settings) / "tokenizer")
    context = settings.sequence_len or read_meta(find_source(settings))["model_config"]["sequence_len"]
    train, val = rag_tasks(settings, tokenizer, context, knowledge, questions)
    ordered = isinstance(train, Curriculum)
    return train_on_tasks("rag", settings, train, val, tokenizer, rt, epochs=settings.epochs, shuffle=not ordered)


def validate(settings: RagSettings) -> tuple[Knowledge | None, list[RagQuestion]]:
    """The knowledge base and its questions. Raises UsageError that names everything wrong with them, and with the
    flags, at once."""
    problems = settings.problems()

    def attempt(work: Callable[[], Any]) -> Any:
        try:
            return work()
        except NanochatError as error:
            problems.append(str(error))
            return None

    attempt(lambda: world_options(settings.contexts))
    knowledge: Knowledge | None = None
    questions: list[RagQuestion] = []
    if settings.knowledge_base:
        knowledge = attempt(lambda: open_knowledge(settings.knowledge_base, settings.retriever_type))
        path = Path(settings.questions or Path(settings.knowledge_base).parent / "train.jsonl")
        if not settings.questions and not path.exists():
            problems.append(f"{path}: there is no such file: give the questions with --questions FILE")
        else:
            questions = attempt(lambda: load_questions(path)) or []
        if knowledge is not None and questions:
            gold = {g: question.place for question in reversed(questions) for g in question.gold}
            missing = sorted(g for g in gold if g not in knowledge)
            if missing:
                shown = ", ".join(f"{g} of {gold[g]}" for g in missing[:5])
                problems.append(
                    f"{path}: {len(missing)} of {len(gold)} gold documents are not in {settings.knowledge_base} "
                    f"(such as {shown}): build the knowledge base from the documents that the questions were made for"
                )
        if len(questions) == 1:
            problems.append(f"{path} holds one question: training needs at least 2")
    if settings.tasks and not settings.knowledge_base:
        problems.append("--tasks needs --knowledge_base: what it finds is put before their questions")
    for spec in settings.tasks:
        attempt(lambda spec=spec: open_task(spec))  # type: ignore[misc]
    if problems:
        raise UsageError("\n".join(["the RAG stage cannot start:", *(f"- {problem}" for problem in problems)]))
    return knowledge, questions


def world_options(contexts: str) -> dict[str, Any]:
    """The options of --contexts. Raises UsageError for unknown ones."""
    if not contexts:
        return {}
    _, given = split_spec(f"contexts:{contexts}")
    options = read_options(f"--contexts {contexts}", given, WORLD_OPTIONS)
    for name in ("n", "documents", "questions"):
        if options.get(name, 1) < 1:
            raise UsageError(f"--contexts {contexts}: {name} must be at least 1")
    return options


def rag_tasks(
    settings: RagSettings,
    tokenizer: Tokenizer,
    context: int,
    knowledge: Knowledge | None,
    questions: list[RagQuestion],
) -> tuple[Task, Task]:
    """What to train on, and what to measure the loss on. context: tokens of a row."""
    budget = settings.document_tokens or 3 * context // 4
    train: list[Task] = []
    val: list[Task] = []
    if knowledge is not None:
        options: dict[str, Any] = {"tokenizer": tokenizer, "max_tokens": budget, "seed": settings.seed}
        held = max(1, len(questions) // 50)  # the last 2%
        kept = Retrieved(
            questions[:-held], knowledge, settings.top_k, keep_gold=True, absent=settings.absent, **options
        )
        train.append(kept)
        val.append(Retrieved(questions[-held:], knowledge, settings.top_k, **options))
        for spec in settings.tasks:
            inner, held_back = split_task(open_task(spec))
            train.append(Wrapped(inner, knowledge, settings.top_k, tokenizer, budget))
            val.append(Wrapped(held_back, knowledge, settings.top_k, tokenizer, budget))
    if settings.contexts:
        given = {"absent": settings.absent, **world_options(settings.contexts)}
        contexts = RagWorld(**given)
        val.append(RagWorld(**{**given, "n": 64, "seed": given.get("seed", 0) + (1 << 40)}))
        if knowledge is None and settings.first > 0 and contexts.n_documents > 1:
            easy = RagWorld(**{**given, "documents": 1, "seed": given.get("seed", 0) + (1 << 41)})
            return Curriculum([(settings.first, easy), (1.0, contexts)], n=contexts.n), val[0]
        train.append(contexts)
    return (train[0] if len(train) == 1 else Mixture(train)), (val[0] if len(val) == 1 else Mixture(val))


def rag_finetune(argv: list[str] | None = None) -> None:
    """The command `rag_finetune`."""
    finish("rag", train_rag, config.parse(RagSettings, argv, prog="rag_finetune"))
