"""Chat tasks: how often a model's answer is right.

*Generative* tasks: the model answers freely (greedy unless asked otherwise) and the task judges the text. *Categorical*
tasks: the answer letters' logits at the answer's place are compared, in one forward pass without generation; so a small
model is measured on what it knows and not on whether it learnt to answer with a letter.

Letters: B rows, D model width, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from tqdm import tqdm

from nanochat import runtime
from nanochat.data.answers import is_abstention
from nanochat.engine.generate import Engine, prefill
from nanochat.engine.sampling import Sampling
from nanochat.errors import NanochatError, UsageError
from nanochat.intervals import Metric, exact, share
from nanochat.model.lm import LM
from nanochat.runtime import log
from nanochat.tasks.task import Task, message_text
from nanochat.tokenizer import Rendered, Tokenizer

GREEDY = Sampling(max_tokens=256, temperature=0.0)
T = TypeVar("T")


class Judged(NamedTuple):
    """One problem and what became of it."""

    number: int  # its place in the task
    question: str
    answer: str  # the model's
    gold: str
    right: bool
    abstained: bool | None  # None: the task does not ask for it
    cut: bool  # the prompt did not fit into the context: oldest turns or the middle of texts were left out
    first: bool = False  # categorical: whether the first letter would have been right
    chance: float = 0.0  # categorical: 1 / number of letters


@dataclass(frozen=True)
class TaskResult:
    """What `evaluate` found. `accuracy` and `abstention` carry n and a 95% interval."""

    name: str
    eval_type: str
    accuracy: Metric
    abstention: Metric | None  # share of answers that abstain, right or wrong; None where the task has no such notion
    controls: dict[str, Metric] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    n_cut: int = 0  # prompts that did not fit into the context
    seconds: float = 0.0

    def metrics(self, name: str | None = None) -> dict[str, Metric]:
        """`NAME_accuracy`, `NAME_abstained` and the controls, under the task's name or another one."""
        name = name or self.name
        found = {f"{name}_accuracy": self.accuracy}
        if self.abstention is not None:
            found[f"{name}_abstained"] = self.abstention
        return found | {f"{name}_{control}": metric for control, metric in self.controls.items()}


def evaluate(
    model: LM,
    tokenizer: Tokenizer,
    task: Task,
    *,
    max_problems: int = 0,
    seed: int = 0,
    batch_size: int = 64,
    sampling: Sampling = GREEDY,
    controls: bool = False,
    n_samples: int = 5,
    progress: bool = False,
) -> TaskResult:
    """Accuracy of `model` on `task`, or on `max_problems` (0: all) of its problems, drawn and ordered by `seed`.

    controls: categorical tasks also say what always answering the first letter, guessing and the same architecture with
    random weights score. Under torchrun each rank takes its share of the problems and gets the result of all.
    Raises UsageError for a task that cannot be judged, NanochatError when the data or the letters do not fit.
    """
    numbers = choose(len(task), max_problems, seed)
    if not numbers:
        raise NanochatError(f"{task.name}: there are no problems to evaluate")
    if task.eval_type == "generative":
        task.evaluate(task[numbers[0]], "")  # a task without a judge says so before the model spends minutes
    began = time.perf_counter()
    judged = judge(model, tokenizer, task, numbers, batch_size, sampling, progress)
    seconds = time.perf_counter() - began
    right = sum(j.right for j in judged)
    abstained = [j.abstained for j in judged if j.abstained is not None]
    extra = baselines(model, tokenizer, task, numbers, judged, batch_size, seed) if controls else {}
    n_cut = sum(j.cut for j in judged)
    if n_cut:
        log.warning("%s: %d of %d prompts did not fit into the context and were cut", task.name, n_cut, len(judged))
    return TaskResult(
        name=task.name,
        eval_type=task.eval_type,
        accuracy=share(right, len(judged)),
        abstention=share(sum(abstained), len(abstained)) if abstained else None,
        controls=extra,
        samples=[as_sample(task.name, j) for j in judged[:n_samples]],
        n_cut=n_cut,
        seconds=seconds,
    )


def choose(n: int, max_problems: int, seed: int) -> list[int]:
    """Numbers of the problems to take, in order: the same for the same arguments; a larger maximum only adds some."""
    order = np.random.default_rng(seed).permutation(n).tolist()
    return order[:max_problems] if max_problems else order


def judge(
    model: LM, tokenizer: Tokenizer, task: Task, numbers: list[int], batch_size: int, sampling: Sampling, progress: bool
) -> list[Judged]:
    """The problems with their answers, in order; this rank's share is computed here, the others' are gathered."""
    rank, world = runtime.rank(), runtime.world_size()
    mine = numbers[rank::world]
    if task.eval_type == "categorical":
        found = categorical(model, tokenizer, task, mine, batch_size)
    else:
        found = generative(model, tokenizer, task, mine, batch_size, sampling)
    bar = tqdm(found, total=len(mine), desc=task.name, unit="problem", disable=not progress or rank > 0)
    place = {number: i for i, number in enumerate(numbers)}
    return sorted(gather(list(bar)), key=lambda j: place[j.number])


def generative(
    model: LM, tokenizer: Tokenizer, task: Task, numbers: list[int], batch_size: int, sampling: Sampling
) -> Iterator[Judged]:
    """Generate and judge. The engine keeps `batch_size` rows busy over a few batches' worth of problems at a time."""
    engine = Engine(model, tokenizer, max_rows=batch_size)
    room = min(sampling.max_tokens, model.config.sequence_len // 4)
    for some in slices(numbers, 4 * batch_size):
        conversations = [task[i] for i in some]
        prompts = [tokenizer.render_prompt(c, model.config.sequence_len - room) for c in conversations]
        completions = engine.generate_batch([prompt.ids for prompt in prompts], sampling)
        for i, conversation, prompt, completion in zip(some, conversations, prompts, completions):
            yield Judged(
                i, question(conversation), completion.text.strip(), message_text(conversation["messages"][-1]),
                task.evaluate(conversation, completion.text),
                is_abstention(completion.text) if "abstain" in conversation else None,
                was_cut(prompt),
            )  # fmt: skip


@torch.no_grad()
def categorical(model: LM, tokenizer: Tokenizer, task: Task, numbers: list[int], batch_size: int) -> Iterator[Judged]:
    """The letter with the largest logit behind the prompt is the answer; ties go to the earlier letter."""
    for some in slices(numbers, batch_size):
        conversations = [task[i] for i in some]
        prompts = [tokenizer.render_prompt(c, model.config.sequence_len) for c in conversations]
        _, hidden_BD = prefill(model, [prompt.ids for prompt in prompts])
        logits_BV = model.logits(hidden_BD).float().cpu()
        for i, conversation, prompt, logits_V in zip(some, conversations, prompts, logits_BV):
            letters, gold = conversation["letters"], message_text(conversation["messages"][-1])
            scores = logits_V[letter_ids(tokenizer, letters, task.name)].tolist()
            answer = letters[scores.index(max(scores))]
            yield Judged(
                i, question(conversation), answer, gold, task.evaluate(conversation, answer), None,
                was_cut(prompt), task.evaluate(conversation, letters[0]), 1 / len(letters),
            )  # fmt: skip


def letter_ids(tokenizer: Tokenizer, letters: Sequence[str], name: str) -> list[int]:
    """The token that begins each answer. Raises NanochatError when two answers begin alike."""
    ids = [tokenizer.encode(letter)[0] for letter in letters]
    if len(set(ids)) < len(ids):
        raise NanochatError(f"{name}: the answers {', '.join(letters)} do not begin with different tokens")
    return ids


def baselines(
    model: LM, tokenizer: Tokenizer, task: Task, numbers: list[int], judged: list[Judged], batch_size: int, seed: int
) -> dict[str, Metric]:
    """What says nothing about the questions scores, for a categorical task."""
    if task.eval_type != "categorical":
        return {}
    untrained = LM.build(model.config, model.device, seed).eval()
    untrained.compute_dtype = model.compute_dtype
    random = judge(untrained, tokenizer, task, numbers, batch_size, GREEDY, False)
    n = len(judged)
    return {
        "always_first": share(sum(j.first for j in judged), n),
        "random_weights": share(sum(j.right for j in random), n),
        "chance": exact(sum(j.chance for j in judged) / n, n),
    }


def question(conversation: dict[str, Any]) -> str:
    """The last thing the user said."""
    said = [message_text(m) for m in conversation["messages"] if m["role"] == "user"]
    if not said:
        raise UsageError("a conversation without a message of the user cannot be evaluated")
    return said[-1]


def as_sample(task: str, judged: Judged) -> dict[str, Any]:
    """A problem as a report shows it."""
    shown = {"question": judged.question, "answer": judged.answer, "gold": judged.gold, "right": judged.right}
    return {"task": task, **shown}


def was_cut(prompt: Rendered) -> bool:
    return bool(prompt.truncated_tokens or prompt.dropped_turns)


def slices(items: list[T], size: int) -> Iterator[list[T]]:
    return (items[i : i + size] for i in range(0, len(items), size))


def gather(items: list[T]) -> list[T]:
    """The items of all ranks, rank by rank."""
    if runtime.world_size() == 1:
        return items
    parts: list[list[T]] = [[] for _ in range(runtime.world_size())]
    torch.distributed.all_gather_object(parts, items)
    return [item for part in parts for item in part]
