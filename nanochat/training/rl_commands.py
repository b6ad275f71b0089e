"""The command `chat_rl`: reinforcement learning on tasks whose answers can be checked.

    chat_rl --tasks arithmetic:digits=1 --source sft
    chat_rl --tasks gsm8k:split=train,path=FILE --val gsm8k:path=FILE --tool calculator
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nanochat import config
from nanochat.engine.tools import Calculator
from nanochat.errors import NanochatError, UsageError
from nanochat.model.lm import LM
from nanochat.rag.rewards import CHAT_WEIGHTS, Reward, RewardModel, Rewards, read_weights
from nanochat.report import write_report
from nanochat.runtime import Runtime, log
from nanochat.tasks.registry import open_task
from nanochat.tasks.task import Task
from nanochat.tokenizer import Tokenizer
from nanochat.training.commands import (
    find_source,
    finish,
    load_tokenizer,
    model_from,
    run_dir,
    run_stage,
    split_task,
    start,
)
from nanochat.training.course import Course
from nanochat.training.play import Play, Player, Tools
from nanochat.training.policy import PolicyStage
from nanochat.training.reinforce import Objective
from nanochat.training.reward_model import load_reward_model
from nanochat.training.rollback import PolicyTrainer
from nanochat.training.settings import TrainSettings

TOOLS = ("none", "calculator")


@dataclass(frozen=True)
class PolicySettings(TrainSettings):
    """Shared by the stages of reinforcement learning."""

    source: str = "sft"
    """where the weights come from: a stage or a path"""
    n_prompts: int = 16
    """prompts of a round, over all processes"""
    n_samples: int = 8
    """answers sampled to each prompt: a group"""
    oversample: int = 1
    """prompts drawn for each of --n_prompts: groups whose answers are all worth the same leave first (DAPO)"""
    max_tokens: int = 64
    """tokens that an answer may have, results of tools not counted"""
    temperature: float = 1.0
    """of sampling; at 1 the samples are the model's own, which the objective takes them for"""
    max_rows: int = 64
    """conversations that are sampled together"""
    reward_weights: str = ""
    """weights of the rewards, as answer=0.6,relevance=0.3,efficiency=0.1"""
    reward_gates: tuple[str, ...] = ("format",)
    """rewards that the sum of the others is multiplied with"""
    reward_model: str = ""
    """directory of a reward model (reward_train), which then is the reward `model` of --reward_weights"""
    advantage: str = "dr_grpo"
    """what a reward is compared with: dr_grpo (the group's mean), grpo (and spread), weighted (nothing: the reward
    weighs the answer, as in supervised training)"""
    per: str = "token"
    """what is averaged: token (over all tokens), sequence (each answer's mean first) or constant (sum / max_tokens)"""
    ratio: str = "token"
    """importance ratio of each token, or one of the whole answer (sequence)"""
    clip_low: float = 0.2
    """a ratio below 1 - clip_low is clipped"""
    clip_high: float = 0.28
    """a ratio above 1 + clip_high is clipped; more than clip_low lets unlikely tokens rise"""
    kl: float = 0.0
    """weight of the divergence from the model that the stage began with (0: none, and no second model in memory)"""
    epochs: int = 1
    """passes over the answers of a round"""
    minibatches: int = 1
    """optimizer steps of a pass"""
    curriculum: str = "success"
    """how harder levels open: success, progress, none (all at once), or learnable (all at once, and those are drawn
    most whose problems are sometimes solved and sometimes not)"""
    rise_at: float = 0.7
    """success rate at which the next level opens"""
    eval_prompts: int = 128
    """problems of each validation task"""
    keep_best: bool = True
    """end with the weights of the best evaluation instead of the last"""
    num_iterations: int = 200
    """optimizer steps"""
    device_batch_size: int = 32
    """answers per forward pass and process"""
    embedding_lr: float = 0.02
    """learning rate of embeddings, for a width of 768: AdamW moves them as far for noise as for a reason"""
    lr_scale: float = 0.3
    """factor on every learning rate; a tenth of it for models of hundreds of millions of parameters"""
    weight_decay: float = 0.0
    """of the matrices"""
    warmup: float = 0.0
    """share of the run in which the learning rate rises"""
    warmdown: float = 0.8
    """share of the run in which it falls"""
    eval_every: int = 20
    """steps between evaluations (0: only at the end)"""
    save_every: int = 50
    """steps between checkpoints (0: only at the end)"""
    log_every: int = 1
    """steps between lines of log.jsonl"""

    def check(self) -> None:
        super().check()
        for flag in ("n_prompts", "oversample", "max_tokens", "max_rows", "epochs", "minibatches", "eval_prompts"):
            if getattr(self, flag) < 1:
                raise UsageError(f"--{flag} {getattr(self, flag)}: must be at least 1")
        if self.n_samples < 2 and self.advantage != "weighted":
            raise UsageError(f"--n_samples {self.n_samples}: a group needs at least 2 to compare")
        if self.temperature <= 0:
            raise UsageError(f"--temperature {self.temperature}: must be above 0, or all samples are the same")
        if self.compile == "on" or self.start_len:
            raise UsageError("--compile on and --start_len are for packed rows: leave them out")
        if not self.num_iterations and not self.max_minutes:
            raise UsageError("--num_iterations 0: give a number of steps, or --max_minutes")
        if "model" in read_weights(self.reward_weights) and not self.reward_model:
            raise UsageError("--reward_weights names `model`: give its directory with --reward_model")
        self.objective()

    def objective(self) -> Objective:
        """The objective that the flags describe. Raises UsageError that names the one that cannot be."""
        return Objective(self.advantage, self.per, self.ratio, self.clip_low, self.clip_high, self.kl)

    def play(self, **more: Any) -> Play:
        """How answers are sampled."""
        return Play(
            self.n_prompts, self.n_samples, self.max_tokens, self.temperature, max_rows=self.max_rows,
            rows=self.device_batch_size, oversample=self.oversample, epochs=self.epochs, minibatches=self.minibatches,
            eval_prompts=self.eval_prompts, seed=self.seed, **more,
        )  # fmt: skip


@dataclass(frozen=True)
class ChatRLSettings(PolicySettings):
    """Reinforcement learning on tasks that judge answers: arithmetic, GSM8K, questions about the tiny world."""

    tasks: tuple[str, ...] = field(default=("arithmetic",))
    """what to train on, as specs of nanochat.tasks; several are levels of a curriculum, easy ones first"""
    val: tuple[str, ...] = ()
    """what to measure (default: 2% of each task, held back)"""
    tool: str = "none"
    """what the model may call: none or calculator"""
    max_calls: int = 8
    """calls of an answer"""

    def check(self) -> None:
        super().check()
        if self.tool not in TOOLS:
            raise UsageError(f"--tool {self.tool}: must be one of {', '.join(TOOLS)}")
        if self.max_calls < 0:
            raise UsageError(f"--max_calls {self.max_calls}: must not be negative")
        if not self.tasks:
            raise UsageError("--tasks: nothing to train on")


def train_policy(
    name: str,
    settings: PolicySettings,
    levels: Sequence[Task],
    val: Mapping[str, Task],
    tokenizer: Tokenizer,
    rt: Runtime,
    play: Play,
    tools: Tools,
    weights: Mapping[str, float],
    own: Mapping[str, Reward | RewardModel] | None = None,
) -> dict[str, float]:
    """Train the source's model on rewards. weights: when --reward_weights says nothing. own: the user's rewards."""
    model = model_from(find_source(settings), tokenizer, settings, rt)
    own = dict(own or {})
    if settings.reward_model:
        own["model"] = load_reward_model(settings.reward_model, str(rt.device), tokenizer)
    rewards = Rewards(read_weights(settings.reward_weights) or weights, settings.reward_gates, own)
    reference: LM | None = None
    if settings.kl:
        reference = copy.deepcopy(model).requires_grad_(False)
        reference.compute_dtype = rt.dtype
    course = Course(levels, settings.seed, settings.curriculum, settings.rise_at)
    player = Player(model, tokenizer, rewards, play, tools)
    stage = PolicyStage(player, course, val, settings.objective(), rt, reference)
    n_steps, n_micro = settings.num_iterations, play.n_micro(rt.world_size)
    size = f"{play.n_prompts * play.n_samples // play.minibatches} answers"

    def make(directory: Any) -> PolicyTrainer:
        return PolicyTrainer(stage, model, tokenizer, settings, rt, directory, n_steps, n_micro, settings.keep_best)

    metrics = run_stage(name, settings, model, rt, n_steps, size, make)
    extend_report(settings, rt)
    return metrics


def extend_report(settings: TrainSettings, rt: Runtime) -> None:
    """The run's report, with what was just trained. A run whose report cannot be written is trained nonetheless."""
    if not rt.is_main:
        return
    try:
        log.info("report: %s", write_report(run_dir(settings)))
    except NanochatError as error:
        log.warning("the report was not written: %s", error)


def named(tasks: Sequence[tuple[str, Task]]) -> dict[str, Task]:
    """Tasks by name, and none is lost: of two of one name, which differ in options only, the second is `name-2`."""
    found: dict[str, Task] = {}
    seen: Counter[str] = Counter()
    for name, task in tasks:
        seen[name] += 1
        found[name if seen[name] == 1 else f"{name}-{seen[name]}"] = task
    return found


def train_chat_rl(settings: ChatRLSettings) -> dict[str, float]:
    """The stage `rl` of a run."""
    rt = start(settings)
    tokenizer = load_tokenizer(run_dir(settings) / "tokenizer")
    opened = [open_task(spec) for spec in settings.tasks]
    val = named([(task.name, task) for task in map(open_task, settings.val)])
    if not val:
        parts = [split_task(task) for task in opened]
        opened, val = [train for train, _ in parts], named([(held.name.split()[0], held) for _, held in parts])
    for task in (*opened, *val.values()):
        task.evaluate(task[0], "")  # a task without a judge says so before anything is loaded
    calculator = [Calculator()] if settings.tool == "calculator" else []
    play = settings.play(max_calls=settings.max_calls if calculator else 0, max_result_tokens=32)
    return train_policy("rl", settings, opened, val, tokenizer, rt, play, lambda _: calculator, CHAT_WEIGHTS)


def chat_rl(argv: list[str] | None = None) -> None:
    """The command `chat_rl`."""
    finish("rl", train_chat_rl, config.parse(ChatRLSettings, argv, prog="chat_rl"))
