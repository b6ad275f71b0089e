"""What a task is, and how tasks combine: mixtures and curricula. All have random access and hold at most an index."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Protocol

from nanochat.data.answers import is_abstention
from nanochat.data.shuffle import Shuffle, mix
from nanochat.errors import UsageError


class Task(Protocol):
    """A numbered set of conversations, and the judge of a completion."""

    name: str
    eval_type: str  # "generative" (free text) or "categorical" (one of conversation["letters"])

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> dict[str, Any]:
        """Conversation i: {"messages": [...], ...}; what else it holds, `evaluate` needs."""

    def evaluate(self, conversation: dict[str, Any], completion: str) -> bool:
        """Whether the completion of the last turn is right."""


def message_text(message: dict[str, Any]) -> str:
    """The text of a message, whatever parts it has."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def chat(question: str, answer: Any, /, **more: Any) -> dict[str, Any]:
    """A conversation of one question and one answer (text or parts)."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **more}


def short_questions(task: Task, n: int = 4, longest: int = 80, look_at: int = 400) -> list[str]:
    """Questions of the task that fit on a button and have an answer, each beginning in another way where they can."""
    by_beginning: dict[str, str] = {}
    others: list[str] = []
    for i in range(min(look_at, len(task))):
        asked, said = (*task[i]["messages"], {}, {})[:2]
        text = message_text(asked) if asked.get("role") == "user" else ""
        if not text.strip() or len(text) > longest or "\n" in text or not said or is_abstention(message_text(said)):
            continue
        if by_beginning.setdefault(text.split()[0].lower(), text) != text:
            others.append(text)
        if len(by_beginning) == n:
            break
    return list(dict.fromkeys([*by_beginning.values(), *others]))[:n]


def check_index(i: int, n: int) -> int:
    """The index as 0 <= i < n (negative ones count from the end). Raises IndexError: that ends a `for` loop."""
    if not -n <= i < n:
        raise IndexError(f"conversation {i} of {n}")
    return i % n


class Mixture:
    """Several tasks in one shuffled order. `weights[k]` is the number of passes over task k; 0.5 draws half of it.

    The same arguments give the same order, and conversation i costs the same for every i.
    """

    eval_type = "generative"

    def __init__(self, tasks: Sequence[Task], weights: Sequence[float] | None = None, seed: int = 0) -> None:
        weights = [1.0] * len(tasks) if weights is None else list(weights)
        if not tasks or len(weights) != len(tasks):
            raise UsageError(f"a mixture needs tasks and one weight for each; got {len(tasks)} and {len(weights)}")
        for task, weight in zip(tasks, weights, strict=True):
            if weight < 0 or not len(task):
                raise UsageError(f"mixture: task {task.name!r} has {len(task)} conversations and the weight {weight:g}")
        self.tasks, self.seed = list(tasks), seed
        self.name = "+".join(task.name for task in tasks)
        counts = [round(weight * len(task)) for task, weight in zip(tasks, weights, strict=True)]
        self.repeats = any(count > len(task) for count, task in zip(counts, tasks, strict=True))
        self._ends = list(accumulate(counts))
        self._order = Shuffle(self._ends[-1], mix(0x317, seed))
        if not self._ends[-1]:
            raise UsageError(f"mixture {self.name!r}: its weights leave no conversation")

    def __len__(self) -> int:
        return self._ends[-1]

    def locate(self, i: int) -> tuple[int, int]:
        """(number of the task, index of the conversation in it) at place i."""
        at = self._order(check_index(i, len(self)))
        k = bisect_right(self._ends, at)
        turn, inner = divmod(at - (self._ends[k - 1] if k else 0), len(self.tasks[k]))
        return k, Shuffle(len(self.tasks[k]), mix(mix(self.seed, k), turn))(inner)

    def __getitem__(self, i: int) -> dict[str, Any]:
        k, inner = self.locate(i)
        return self.tasks[k][inner]

    def evaluate(self, conversation: dict[str, Any], completion: str) -> bool:
        """Raises UsageError: each task has its own judge."""
        raise UsageError(f"{self.name}: evaluate the tasks of a mixture one by one")


class Curriculum:
    """Order and mixture that change with progress: `[(0.3, easy), (1.0, mixed)]` is `easy` for the first 30%.

    `n` is the number of conversations of the whole course (all of all tasks when None). A task that is shorter than its
    share starts over. Take the conversations in order: shuffled, it is no curriculum.
    """

    eval_type = "generative"

    def __init__(self, steps: Sequence[tuple[float, Task]], n: int | None = None) -> None:
        untils = [until for until, _ in steps]
        if not steps or untils != sorted(set(untils)) or untils[0] <= 0 or untils[-1] != 1.0:
            raise UsageError(f"curriculum: the fractions must rise and end with 1.0, got {untils}")
        for _, task in steps:
            if not len(task):
                raise UsageError(f"curriculum: task {task.name!r} is empty")
        self.tasks = [task for _, task in steps]
        self.name = ">".join(f"{task.name}<{until:g}" for until, task in steps)
        self._n = sum(len(task) for task in self.tasks) if n is None else n
        self._ends = [round(until * self._n) for until in untils]

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, i: int) -> dict[str, Any]:
        i = check_index(i, self._n)
        k = bisect_right(self._ends, i)
        return self.tasks[k][(i - (self._ends[k - 1] if k else 0)) % len(self.tasks[k])]

    def evaluate(self, conversation: dict[str, Any], completion: str) -> bool:
        """Raises UsageError: each task has its own judge."""
        raise UsageError(f"{self.name}: evaluate the tasks of a curriculum one by one")
