"""REFRAG: a model that searches on its own, hop by hop. First supervised on traces of somebody who knows the way, then
by reinforcement learning on what its own searches and answers are worth.

    refrag_finetune --knowledge_base data/rag/knowledge_base --max_hops 3 --retriever_type hybrid --use_rewards True
    refrag_finetune --contexts entities=120 --max_hops 3        no knowledge base: worlds of their own, in memory

The supervised stage is `refrag_sft` of the run, the other `refrag`, which begins with its weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from nanochat import config
from nanochat.checkpoint import read_meta
from nanochat.data.spec import read_options, split_spec
from nanochat.errors import UsageError
from nanochat.rag.knowledge import Knowledge, open_knowledge
from nanochat.rag.multihop import SearchTool
from nanochat.rag.multihop_tasks import MultiHopQuestions, MultiHopWorld, SearchTask
from nanochat.rag.questions import RagQuestion, load_questions
from nanochat.rag.rewards import SEARCH_WEIGHTS, Reward, RewardModel
from nanochat.runtime import Runtime, log
from nanochat.tasks.task import Curriculum, Mixture, Task
from nanochat.tokenizer import Tokenizer
from nanochat.training.commands import (
    estimate_tokens,
    find_source,
    finish,
    load_tokenizer,
    run_dir,
    start,
    train_on_tasks,
)
from nanochat.training.rl_commands import PolicySettings, extend_report, train_policy
from nanochat.training.settings import TrainSettings
from nanochat.training.supervised import ChatSource

WORLD_OPTIONS = {"seed": int, "n": int, "entities": int, "per_world": int, "short": int}
HELD = 1 << 40  # seeds from here on are of worlds that only validation sees
N_VAL = 512  # problems of a level that validation may take
COURSE = 0.2  # of the supervised stage: until then the hops grow; whoever sees long ones late only stops too early


@dataclass(frozen=True)
class RefragSettings(PolicySettings):
    """Fine-tune to search in several hops: supervised on gold chains, then by reinforcement learning."""

    source: str = "rag"
    """where the weights come from: a stage or a path; one that has read documents before learns faster"""
    knowledge_base: str = ""
    """directory of the knowledge base that is searched"""
    questions: str = ""
    """JSONL of questions with answers and gold documents (default: train.jsonl beside the knowledge base)"""
    retriever_type: str = ""
    """how to search: simple, bm25, dense or hybrid (default: what the knowledge base was built for)"""
    contexts: str = ""
    """questions over the tiny world instead, every few over a world of its own: entities=120,per_world=16,short=0"""
    max_hops: int = 3
    """searches of an answer, at most"""
    top_k: int = 2
    """documents that a search shows"""
    absent: float = 0.1
    """share of the questions that nothing answers (only with --contexts)"""
    use_rewards: bool = True
    """reinforcement learning after the supervised stage"""
    warm_start_steps: int = 1600
    """optimizer steps of the supervised stage (0: none, the source has learnt to search already)"""
    warm_start_mix: tuple[float, ...] = ()
    """the supervised stage's traces of one hop, of two and so on against each other (default: all alike); 1 1 0.05
    shows few of three hops and leaves the rest to the rewards, 1 1 0 none"""
    warm_start_rows: int = 1
    """rows per forward pass and process of the supervised stage"""
    warm_start_lr_scale: float = 0.7
    """factor on every learning rate of the supervised stage"""
    max_tokens: int = 128
    """tokens that queries and answer may have together"""

    def check(self) -> None:
        super().check()
        if bool(self.knowledge_base) == bool(self.contexts):
            raise UsageError(
                "give --knowledge_base DIRECTORY (train.jsonl beside it, or --questions FILE), or --contexts "
                "entities=120 for questions over the tiny world: one of the two"
            )
        if self.max_hops < 1:
            raise UsageError(f"--max_hops {self.max_hops}: must be at least 1; chat_rl is for answers without a search")
        for flag in ("top_k", "warm_start_rows"):
            if getattr(self, flag) < 1:
                raise UsageError(f"--{flag} {getattr(self, flag)}: must be at least 1")
        if not 0 <= self.absent < 1:
            raise UsageError(f"--absent {self.absent}: must be at least 0 and below 1")
        mix = self.warm_start_mix
        if mix and (len(mix) != self.max_hops or not all(0 <= weight < math.inf for weight in mix) or not any(mix)):
            raise UsageError(
                f"--warm_start_mix {' '.join(f'{weight:g}' for weight in mix)}: give {self.max_hops} number(s), one "
                "for each of --max_hops, not negative and not all 0"
            )
        for flag in ("warm_start_steps", "warm_start_lr_scale"):
            if not getattr(self, flag) >= 0:
                raise UsageError(f"--{flag} {getattr(self, flag)}: must not be negative")
        if not (self.warm_start_steps or self.use_rewards):
            raise UsageError("--warm_start_steps 0 with --use_rewards False leaves nothing to do")
        world_options(self.contexts)

    def result_tokens(self, context: int) -> int:
        """Tokens that the result of one search may have: all of them together take three quarters of the context."""
        return max(8, 3 * context // 4 // self.max_hops)


class Levels(NamedTuple):
    """Tasks by number of hops, from easy to hard, for training and for validation."""

    train: dict[str, SearchTask]
    val: dict[str, SearchTask]

    def weights(self, mix: Sequence[float]) -> list[float]:
        """Of the levels in a mix by number of hops; without one all weigh 1. Raises UsageError when all weigh 0."""
        found = [mix[int(name.removesuffix("hop")) - 1] if mix else 1.0 for name in self.train]
        if not any(found):
            raise UsageError(f"--warm_start_mix leaves no question: the levels are {', '.join(self.train)}")
        return found


def world_options(contexts: str) -> dict[str, Any]:
    """The options of --contexts. Raises UsageError for unknown ones."""
    if not contexts:
        return {}
    _, given = split_spec(f"contexts:{contexts}")
    return read_options(f"--contexts {contexts}", given, WORLD_OPTIONS)


def world_levels(settings: RefragSettings, shown: Mapping[str, Any]) -> Levels:
    """Levels over the tiny world. shown: how traces show documents."""
    given: dict[str, Any] = {**world_options(settings.contexts), "absent": settings.absent, **shown}
    seed = given.pop("seed", settings.seed)
    train: dict[str, SearchTask] = {}
    val: dict[str, SearchTask] = {}
    for hops in range(1, min(settings.max_hops, 3) + 1):
        train[f"{hops}hop"] = MultiHopWorld((hops,), seed + (hops << 32), **given)
        val[f"{hops}hop"] = MultiHopWorld((hops,), seed + HELD + hops, **{**given, "n": N_VAL})
    return Levels(train, val)


def question_levels(
    settings: RefragSettings, knowledge: Knowledge, questions: Sequence[RagQuestion], shown: Mapping[str, Any]
) -> Levels:
    """Levels over a knowledge base; the last 2% of the questions of each (at least one) are for validation. Questions
    without gold documents are of the first level. Raises UsageError when no level has two questions."""
    found = Levels({}, {})
    for hops in range(1, settings.max_hops + 1):
        some = [question for question in questions if max(1, len(question.gold)) == hops]
        held = max(1, len(some) // 50)
        if len(some) > held:
            found.train[f"{hops}hop"] = MultiHopQuestions(some[:-held], knowledge, **shown)
            found.val[f"{hops}hop"] = MultiHopQuestions(some[-held:], knowledge, **shown)
    more = sum(len(question.gold) > settings.max_hops for question in questions)
    if more:
        log.warning("%d of %d questions need more than --max_hops %d and are left out", more, len(questions),
                    settings.max_hops)  # fmt: skip
    if not found.train:
        raise UsageError(f"of {len(questions)} questions too few can be answered in {settings.max_hops} hop(s)")
    return found


def make_levels(settings: RefragSettings, tokenizer: Tokenizer, context: int) -> Levels:
    """What to train on, and what to measure."""
    shown: dict[str, Any] = {
        "top_k": settings.top_k, "tokenizer": tokenizer, "max_result_tokens": settings.result_tokens(context)
    }  # fmt: skip
    if settings.contexts:
        return world_levels(settings, shown)
    knowledge = open_knowledge(settings.knowledge_base, settings.retriever_type)
    path = settings.questions or Path(settings.knowledge_base).parent / "train.jsonl"
    questions = load_questions(path)
    missing = sorted({g for question in questions for g in question.gold if g not in knowledge})
    if missing:
        raise UsageError(
            f"{path}: {len(missing)} gold documents are not in {settings.knowledge_base} (such as "
            f"{', '.join(missing[:5])}): build the knowledge base from the documents that the questions were made for"
        )
    return question_levels(settings, knowledge, questions, shown)


def traces_course(levels: Sequence[Task], n: int, weights: Sequence[float] = ()) -> Task:
    """Traces in the order of the supervised stage: one hop first, then longer ones join, then all mixed, by weight."""
    weights = weights or [1.0] * len(levels)
    if len(levels) == 1:
        return levels[0]
    steps: list[tuple[float, Task]] = []
    for k in range(1, len(levels)):
        mixed = levels[0] if k == 1 else Mixture(levels[:k], weights[:k])
        steps.append((COURSE * k / (len(levels) - 1), mixed))
    return Curriculum([*steps, (1.0, Mixture(levels, weights))], n=n)


def warm_start(
    settings: RefragSettings, levels: Levels, tokenizer: Tokenizer, rt: Runtime, context: int
) -> dict[str, float]:
    """The supervised stage `refrag_sft`."""
    plain = TrainSettings(**{f.name: getattr(settings, f.name) for f in fields(TrainSettings)})
    own = replace(
        plain, num_iterations=settings.warm_start_steps, device_batch_size=settings.warm_start_rows, max_minutes=0.0,
        lr_scale=settings.warm_start_lr_scale, total_batch_size=0, weight_decay=TrainSettings.weight_decay,
        warmup=TrainSettings.warmup, warmdown=TrainSettings.warmdown, eval_every=TrainSettings.eval_every,
        save_every=TrainSettings.save_every, log_every=TrainSettings.log_every,
    )  # fmt: skip
    shown = [(name, weight) for name, weight in zip(levels.train, levels.weights(settings.warm_start_mix)) if weight]
    tasks, weights = [levels.train[name] for name, _ in shown], [weight for _, weight in shown]
    mixed = tasks[0] if len(tasks) == 1 else Mixture(tasks, weights)
    per_trace = estimate_tokens(ChatSource(mixed, tokenizer, context, settings.seed), 50) / len(mixed)
    n = max(len(tasks) * 2, round(own.num_iterations * own.device_batch_size * context * rt.world_size / per_trace))
    val = [levels.val[name] for name, _ in shown]
    train = traces_course(tasks, n, weights)
    shuffle = not isinstance(train, Curriculum)
    return train_on_tasks(
        "refrag_sft", own, train, val[0] if len(val) == 1 else Mixture(val), tokenizer, rt, shuffle=shuffle
    )


def train_refrag(settings: RefragSettings, own: Mapping[str, Reward | RewardModel] | None = None) -> dict[str, float]:
    """Both stages; the metrics of the last. own: rewards of the user's by name, for --reward_weights. What is wrong
    with settings, knowledge base and questions is said before anything is trained."""
    rt = start(settings)
    tokenizer = load_tokenizer(run_dir(settings) / "tokenizer")
    context = settings.sequence_len or read_meta(find_source(settings))["model_config"]["sequence_len"]
    levels = make_levels(settings, tokenizer, context)
    metrics: dict[str, float] = {}
    if settings.warm_start_steps:
        metrics = warm_start(settings, levels, tokenizer, rt, context)
        settings = replace(settings, source=str(run_dir(settings) / "refrag_sft"))
    if not settings.use_rewards:
        extend_report(settings, rt)
        return metrics
    play = settings.play(max_calls=settings.max_hops, max_result_tokens=settings.result_tokens(context))
    tools = partial(search_tools, tokenizer, settings.top_k)
    tasks = list(levels.train.values())
    return train_policy("refrag", settings, tasks, levels.val, tokenizer, rt, play, tools, SEARCH_WEIGHTS, own)


def search_tools(tokenizer: Tokenizer, top_k: int, problems: Sequence[Any]) -> list[SearchTool]:
    """What searches, for the prompt of each problem, where its answer lies."""
    return [SearchTool(tokenizer, [problem.task.searcher(problem.number) for problem in problems], top_k)]


def refrag_finetune(argv: list[str] | None = None) -> None:
    """The command `refrag_finetune`."""
    settings = config.parse(RefragSettings, argv, prog="refrag_finetune")
    finish("refrag" if settings.use_rewards else "refrag_sft", train_refrag, settings)
