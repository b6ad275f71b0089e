"""Tasks by name: what a line of a training or evaluation config means."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from nanochat.data.corpus import open_world
from nanochat.data.spec import nearest, read_options, split_spec
from nanochat.errors import UsageError
from nanochat.tasks.arc import ARC
from nanochat.tasks.arithmetic import Arithmetic
from nanochat.tasks.conversations import own_conversations
from nanochat.tasks.gsm8k import GSM8K
from nanochat.tasks.humaneval import HumanEval
from nanochat.tasks.mmlu import MMLU
from nanochat.tasks.smoltalk import SmolTalk
from nanochat.tasks.task import Mixture, Task
from nanochat.tasks.world import WorldDialogues, WorldQuestions, WorldUnanswerable


class Entry(NamedTuple):
    """How to build a task, and its options with their types."""

    build: Callable[..., Task]
    options: Mapping[str, type]
    required: tuple[str, ...] = ()


_ROWS = {"path": str, "limit": int, "seed": int}
_WORLD = {"seed": int, "known": int, "new": int}  # of the world itself; `draw` is the seed of the questions
_DRAWN = {**_WORLD, "split": str, "part": str, "draw": int}


def _of_world(task: Callable[..., Task]) -> Callable[..., Task]:
    def build(**options: Any) -> Task:
        return task(open_world(options), **{k: v for k, v in options.items() if k not in _WORLD})

    return build


TASKS: dict[str, Entry] = {
    "world-qa": Entry(
        _of_world(WorldQuestions), {**_DRAWN, "hops": int, "limit": int, "wordings": int, "style": str}
    ),
    "world-unanswerable": Entry(_of_world(WorldUnanswerable), {**_DRAWN, "n": int}),
    "world-chat": Entry(_of_world(WorldDialogues), {**_DRAWN, "n": int, "style": str}),
    "arithmetic": Entry(
        Arithmetic,
        {"seed": int, "n": int, "digits": int, "terms": int, "operations": str, "tool": int, "part": str},
    ),
    "smoltalk": Entry(SmolTalk, {**_ROWS, "split": str}),
    "mmlu": Entry(MMLU, {**_ROWS, "split": str, "subject": str}),
    "arc": Entry(ARC, {**_ROWS, "split": str, "subset": str}),
    "gsm8k": Entry(GSM8K, {**_ROWS, "split": str, "subset": str}),
    "humaneval": Entry(HumanEval, _ROWS),
    "conversations": Entry(own_conversations, _ROWS, ("path",)),
}


def open_task(spec: str) -> Task:
    """The task that a spec names: `gsm8k:split=train,path=FILE`, `world-qa:known=200,split=new,part=heldout`, ...

    Raises UsageError for unknown names (with the nearest one) and options, NanochatError when the data cannot be had.
    """
    name, given = split_spec(spec)
    if name not in TASKS:
        raise UsageError(f"task {spec!r}: unknown task {name!r}; {nearest(name, TASKS)}")
    entry = TASKS[name]
    if "weight" in given:
        raise UsageError(f"task {spec!r}: only the mixtures of mid_train and chat_sft have weights; leave it out here")
    options = read_options(spec, given, entry.options)
    for key in entry.required:
        if key not in options:
            raise UsageError(f"task {spec!r}: needs {key}=...")
    return entry.build(**options)


def open_mixture(specs: Sequence[str], seed: int = 0) -> Mixture:
    """A mixture of tasks; `weight=2` in a spec means two passes over that task in each over the mixture, and so does
    the same spec given twice. Raises UsageError as `open_task`, and for a weight that is no number above 0."""
    if not specs:
        raise UsageError("tasks: the list is empty")
    weights: dict[str, float] = {}
    for spec in specs:
        name, given = split_spec(spec)
        weight = read_options(spec, {"weight": given.pop("weight", "1")}, {"weight": float})["weight"]
        if not 0 < weight < math.inf:
            raise UsageError(f"task {spec!r}: the weight must be a number above 0")
        plain = f"{name}:" + ",".join(f"{k}={v}" for k, v in given.items())
        weights[plain] = weights.get(plain, 0.0) + weight
    return Mixture([open_task(spec) for spec in weights], list(weights.values()), seed)
