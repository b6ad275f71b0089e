"""Rewards for what a model did: named, bounded, put together by weights and gates.

    rewards = Rewards({"answer": 0.6, "relevance": 0.3, "efficiency": 0.1}, gates=("format",))
    rewards.score(samples)      # a total and its parts for each sample

A reward looks at a `Sample` and says a number from -1 to 1 (the ones below: 0 to 1). The total is the weighted mean of
the parts, times the product of the gates: whoever does not keep to the form gets nothing for content. Any function of a
`Sample` can be a reward; a `RewardModel` judges many samples at once.

answer       1 for a right answer (an abstention, where nothing answers the question)
f1           the same, with a share for an answer that has some of the right words
relevance    share of the gold documents that were found; where there are none: whether anything was searched
efficiency   of a right answer only: 1 less what went into calls and tokens that it did not need
citation     F1 of the documents that a right answer cites with the gold ones
honesty      1 for a right answer, 0.5 for "I do not know" where there was an answer, 0 for a wrong one
format       1 when the model ended by itself, and every query and citation and the answer are well-formed
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeAlias

from nanochat.data.answers import normalize_answer, token_f1
from nanochat.errors import NanochatError, UsageError
from nanochat.rag.citations import Answer
from nanochat.retrieval.document import Document


@dataclass(frozen=True)
class Sample:
    """What a reward may look at."""

    name: str  # for messages: which problem, which sample
    conversation: Mapping[str, Any]  # of the task, with its gold answer; keys: see tasks
    text: str  # all that the model said, special tokens by name
    answer: Answer  # what it said last, with its citations
    right: bool  # in the judgement of the task
    documents: tuple[Document, ...] = ()  # that it was shown; citation n names documents[n - 1]
    calls: tuple[str, ...] = ()  # queries and expressions, in order
    failed_calls: int = 0  # of these, how many were empty or gave no value
    forged: int = 0  # special tokens that only others may write, such as the beginning of a result
    n_tokens: int = 0  # that it produced
    max_tokens: int = 0
    max_calls: int = 0
    finish_reason: str = "stop"  # see engine.rollout


class RewardModel(Protocol):
    """A judge of many samples at once, such as training.reward_model.LinearRewardModel. Values from -1 to 1."""

    def score(self, samples: Sequence[Sample]) -> Sequence[float]: ...


Reward: TypeAlias = Callable[[Sample], float]


class Score(NamedTuple):
    """The reward of one sample, and what each named part gave (gates included)."""

    total: float
    parts: dict[str, float]


def answer(sample: Sample) -> float:
    return float(sample.right)


def f1(sample: Sample) -> float:
    """Token F1 with the best of the gold answers. Gold sentences are not compared: wrong answers share most of their
    words. An abstention is right or wrong, and nothing in between."""
    if sample.right or _should_abstain(sample) or sample.answer.abstained:
        return float(sample.right)
    said = normalize_answer(sample.answer.text).split()
    gold = sample.conversation.get("answers", ())
    return max((token_f1(said, normalize_answer(one).split()) for one in gold), default=0.0)


def relevance(sample: Sample) -> float:
    gold = set(sample.conversation.get("gold_documents", ()))
    if not gold:
        return float(bool(sample.calls))
    return len(gold & {document.id for document in sample.documents}) / len(gold)


def efficiency(sample: Sample) -> float:
    """Two halves: calls beyond one for each hop, as a share of those allowed; tokens as a share of those allowed."""
    if not sample.right:
        return 0.0
    extra = max(0, len(sample.calls) - int(sample.conversation.get("hops", 0)))
    wasted = 0.5 * extra / max(1, sample.max_calls) + 0.5 * sample.n_tokens / max(1, sample.max_tokens)
    return max(0.0, 1.0 - wasted)


def citation(sample: Sample) -> float:
    if not sample.right or _should_abstain(sample):
        return float(sample.right)
    gold = set(sample.conversation.get("gold_documents", ()))
    cited = {sample.documents[n - 1].id for n in sample.answer.citations}
    common = len(gold & cited)
    return 2 * common / (len(gold) + len(cited) + len(sample.answer.invalid)) if common else 0.0


def honesty(sample: Sample) -> float:
    return 1.0 if sample.right else 0.5 * sample.answer.abstained


def form(sample: Sample) -> float:
    said = bool(sample.answer.text) or sample.answer.abstained
    well_formed = not (sample.failed_calls or sample.forged or sample.answer.invalid)
    return float(sample.finish_reason == "stop" and said and well_formed)


REWARDS: dict[str, Reward] = {
    "answer": answer,
    "f1": f1,
    "relevance": relevance,
    "efficiency": efficiency,
    "citation": citation,
    "honesty": honesty,
    "format": form,
}
SEARCH_WEIGHTS = {"answer": 0.6, "relevance": 0.3, "efficiency": 0.1}  # of multi-hop answers
CHAT_WEIGHTS = {"answer": 1.0}


@dataclass(frozen=True)
class Rewards:
    """Weighted parts and gates. `own`: further rewards and reward models by name. Raises UsageError for an unknown
    name and for weights that are no weights."""

    weights: Mapping[str, float] = field(default_factory=lambda: dict(SEARCH_WEIGHTS))
    gates: Sequence[str] = ("format",)
    own: Mapping[str, Reward | RewardModel] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = {**REWARDS, **self.own}
        for name in (*self.weights, *self.gates):
            if name not in known:
                raise UsageError(f"unknown reward {name!r}: there is {', '.join(known)}")
        if not self.weights or not all(0 <= w < math.inf for w in self.weights.values()) or not self.total_weight:
            raise UsageError(f"reward weights {dict(self.weights)}: expected numbers of 0 or more, not all 0")

    @property
    def total_weight(self) -> float:
        return sum(self.weights.values())

    @property
    def names(self) -> tuple[str, ...]:
        """All parts, gates last."""
        return tuple(dict.fromkeys([*self.weights, *self.gates]))

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        """Raises NanochatError that names reward and sample when one raises, or gives no number from -1 to 1."""
        columns = {name: self.column(name, samples) for name in self.names}
        return [self.combine({name: values[i] for name, values in columns.items()}) for i in range(len(samples))]

    def combine(self, parts: dict[str, float]) -> Score:
        total = sum(weight * parts[name] for name, weight in self.weights.items()) / self.total_weight
        for gate in self.gates:
            total *= parts[gate]
        return Score(total, parts)

    def column(self, name: str, samples: Sequence[Sample]) -> list[float]:
        """One part of all samples."""
        reward: Any = self.own[name] if name in self.own else REWARDS[name]
        if hasattr(reward, "score"):
            values = list(_called(name, "all samples", reward.score, samples))
            if len(values) != len(samples):
                raise NanochatError(f"the reward {name} gave {len(values)} values for {len(samples)} samples")
        else:
            values = [_called(name, sample.name, reward, sample) for sample in samples]
        return [_checked(name, sample.name, value) for sample, value in zip(samples, values)]


def _called(name: str, where: str, function: Callable[[Any], Any], argument: Any) -> Any:
    try:
        return function(argument)
    except Exception as error:  # a user's function may raise anything
        raise NanochatError(f"the reward {name} failed on {where}: {error!r}") from error


def _checked(name: str, where: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not -1.0 <= number <= 1.0:
        raise NanochatError(f"the reward {name} gave {value!r} for {where}: expected a number from -1 to 1")
    return number


def read_weights(text: str, flag: str = "--reward_weights") -> dict[str, float]:
    """`answer=0.6,relevance=0.3` as a dict. Raises UsageError that names the flag."""
    weights: dict[str, float] = {}
    for item in filter(None, text.split(",")):
        name, _, number = item.partition("=")
        try:
            weights[name.strip()] = float(number)
        except ValueError:
            raise UsageError(f"{flag} {text}: expected name=number,name=number; {item!r} is not that") from None
    return weights


def _should_abstain(sample: Sample) -> bool:
    return bool(sample.conversation.get("abstain", False))
