"""Answers to problems: rollouts through the engine, with tools, and their scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from nanochat.engine.generate import MAX_ROWS
from nanochat.engine.rollout import Rollout, rollouts
from nanochat.engine.sampling import Sampling
from nanochat.engine.tools import Tool
from nanochat.errors import UsageError
from nanochat.evaluation.chat import question
from nanochat.model.lm import LM
from nanochat.rag.multihop import Hop, documents_of, read_answer
from nanochat.rag.rewards import Rewards, Sample, Score
from nanochat.rag.traces import Trace, trace_of
from nanochat.tokenizer import Tokenizer
from nanochat.training.course import Problem

# what an assistant may write; the other special tokens belong to its partners
OWN_TOKENS = ("assistant_end", "bos", "tool_call_start", "tool_call_end", "search_start", "search_end", "cite_start",
              "cite_end", "abstain", "code_start", "code_end")  # fmt: skip
Tools = Callable[[Sequence[Problem]], Sequence[Tool]]  # the tools for some problems, in the order of their prompts


@dataclass(frozen=True)
class Play:
    """How answers are sampled. n_prompts: of a round, over all processes."""

    n_prompts: int = 16
    n_samples: int = 8
    max_tokens: int = 64
    temperature: float = 1.0
    max_calls: int = 3
    max_result_tokens: int = 256
    max_rows: int = MAX_ROWS
    rows: int = 32  # rollouts in a forward pass of training
    oversample: int = 1  # prompts drawn for each that counts
    epochs: int = 1
    minibatches: int = 1
    eval_prompts: int = 128  # of each validation task
    seed: int = 0

    @property
    def steps(self) -> int:
        """Optimizer steps of a round."""
        return self.epochs * self.minibatches

    def n_micro(self, world_size: int) -> int:
        """Micro-batches of a step. Raises UsageError when prompts cannot be shared out evenly."""
        if self.n_prompts % (world_size * self.minibatches):
            raise UsageError(
                f"--n_prompts {self.n_prompts}: must be a multiple of {world_size} process(es) x --minibatches "
                f"{self.minibatches}"
            )
        n_rollouts = self.n_prompts * self.n_samples // (world_size * self.minibatches)
        return -(-n_rollouts // self.rows)


class Played(NamedTuple):
    """One answer and what became of it."""

    problem: Problem
    rollout: Rollout
    sample: Sample
    score: Score

    def trace(self, tokenizer: Tokenizer) -> Trace:
        """The answer as a record to look at."""
        asked = self.problem.conversation
        return trace_of(
            self.rollout, tokenizer, question(asked), name=self.sample.name, answers=asked.get("answers", ()),
            gold=asked.get("gold_documents", ()), right=self.sample.right, reward=round(self.score.total, 4),
            rewards={name: round(value, 4) for name, value in self.score.parts.items()},
        )  # fmt: skip


class Player:
    """A model that answers problems with tools, and the rewards that judge it."""

    def __init__(self, model: LM, tokenizer: Tokenizer, rewards: Rewards, options: Play, tools: Tools) -> None:
        self.model, self.tokenizer, self.rewards, self.options, self.tools = model, tokenizer, rewards, options, tools
        self.own = {tokenizer.special(name) for name in OWN_TOKENS}

    def play(
        self, problems: Sequence[Problem], sampling: Sampling, n: int, streams: Sequence[int] | None = None
    ) -> list[Played]:
        """`n` answers to each problem, scored. streams: of random numbers, see `engine.rollout.steps`."""
        o, context = self.options, self.model.config.sequence_len
        limit = context - min(o.max_tokens + o.max_calls * o.max_result_tokens, 3 * context // 4)
        prompts = [self.tokenizer.render_prompt(p.conversation, limit).ids for p in problems]
        rolled = rollouts(
            self.model, self.tokenizer, prompts, sampling, n, self.tools(problems), o.max_calls,
            max_rows=o.max_rows, max_result_tokens=o.max_result_tokens, streams=streams,
        )  # fmt: skip
        of = [problem for problem in problems for _ in range(n)]
        samples = [self.sample(problem, one, i % n) for i, (problem, one) in enumerate(zip(of, rolled))]
        scores = self.rewards.score(samples)
        return [Played(*each) for each in zip(of, rolled, samples, scores)]

    def sample(self, problem: Problem, rollout: Rollout, number: int) -> Sample:
        """What rewards see of a rollout."""
        said = rollout.ids[:-1] if rollout.ids[-1:] == [self.tokenizer.eot] else rollout.ids
        text = self.tokenizer.decode(said)
        mine = [i for i, sampled in zip(rollout.ids, rollout.sampled) if sampled]
        failed = [c for c in rollout.calls if c.result is None or (isinstance(c.result, Hop) and not c.result.query)]
        return Sample(
            name=f"{problem.name}, sample {number}",
            conversation=problem.conversation,
            text=text,
            answer=read_answer(rollout, self.tokenizer),
            right=bool(problem.task.evaluate(problem.conversation, text)),
            documents=documents_of(rollout.calls),
            calls=tuple(call.text for call in rollout.calls),
            failed_calls=len(failed),
            forged=sum(self.tokenizer.is_special(i) and i not in self.own for i in mine),
            n_tokens=len(mine),
            max_tokens=self.options.max_tokens,
            max_calls=self.options.max_calls,
            finish_reason=rollout.finish_reason,
        )
