"""Which problems reinforcement learning draws: levels of difficulty, one after the other."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from nanochat.data.shuffle import Draws, mix
from nanochat.errors import UsageError
from nanochat.runtime import log
from nanochat.tasks.task import Task

BY = ("success", "progress", "none", "learnable")
MEMORY = 0.8  # how much of the old success rate a round keeps
LEAST = 0.02  # that a level weighs with by="learnable", where all is right or all is wrong: what is known can be lost


class Problem(NamedTuple):
    """A conversation of a task, to be answered."""

    task: Task
    number: int  # in the task
    conversation: dict[str, Any]
    level: int  # from 1

    @property
    def name(self) -> str:
        return f"{self.task.name} {self.number}"


class Course:
    """Draws problems from the levels reached so far: half from the highest, the others from those below it.

    by="success": the next level opens when the running success rate on the highest one is `rise_at`; by="progress":
    each level has the same share of the run; by="none": all are open from the start, and drawn alike; by="learnable":
    all are open, and drawn in proportion to p (1 - p), with p the level's running success rate: that is how much the
    rewards of a group differ, and nothing can be learnt where they do not (Foster et al. 2025, arXiv 2502.12272). Each
    task is gone through in its own order, again and again.
    """

    def __init__(self, levels: Sequence[Task], seed: int = 0, by: str = "success", rise_at: float = 0.7) -> None:
        if by not in BY:
            raise UsageError(f"--curriculum {by}: must be one of {', '.join(BY)}")
        if not 0 < rise_at <= 1:
            raise UsageError(f"--rise_at {rise_at}: must be above 0 and at most 1")
        self.levels, self.seed, self.by, self.rise_at = list(levels), seed, by, rise_at
        self.level = len(self.levels) if by in ("none", "learnable") else 1
        self.success = 0.0  # running, on the highest open level
        self.rates = [0.5] * len(self.levels)  # running, of each level
        self.taken = [0] * len(self.levels)

    def draw(self, number: int, n: int) -> list[Problem]:
        """`n` problems for round `number`."""
        draws = Draws(mix(mix(0xC0A, self.seed), number))
        return [self.next(self.choose(draws)) for _ in range(n)]

    def choose(self, draws: Draws) -> int:
        if self.by == "none":
            return 1 + draws.below(len(self.levels))
        if self.by == "learnable":
            ends = list(accumulate(round(1000 * max(LEAST, rate * (1 - rate))) for rate in self.rates))
            return 1 + bisect_right(ends, draws.below(ends[-1]))
        if self.level == 1 or draws.below(2):
            return self.level
        return 1 + draws.below(self.level - 1)

    def next(self, level: int) -> Problem:
        task = self.levels[level - 1]
        number = self.taken[level - 1] % len(task)
        self.taken[level - 1] += 1
        return Problem(task, number, task[number], level)

    def update(self, right: Mapping[int, float], progress: float) -> bool:
        """After a round: the share of right answers by level, and the share of the run that is done. Whether the next
        level opened."""
        before = self.level
        for level, rate in right.items():
            self.rates[level - 1] = MEMORY * self.rates[level - 1] + (1 - MEMORY) * rate
        if self.by == "progress":
            self.level = max(self.level, min(len(self.levels), 1 + int(progress * len(self.levels))))
        elif self.by == "success" and self.level < len(self.levels) and self.level in right:
            self.success = MEMORY * self.success + (1 - MEMORY) * right[self.level]
            if self.success >= self.rise_at:
                self.level, self.success = self.level + 1, 0.0
        if self.level > before:
            name = self.levels[self.level - 1].name
            log.info("curriculum: level %d of %d opens (%s)", self.level, len(self.levels), name)
        return self.level > before

    def state_dict(self) -> dict[str, Any]:
        return {"level": self.level, "success": self.success, "rates": list(self.rates), "taken": list(self.taken)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises UsageError when the state is of a course with another number of levels."""
        if len(state["taken"]) != len(self.levels):
            raise UsageError(
                f"the checkpoint's curriculum has {len(state['taken'])} levels, this run's {len(self.levels)}: "
                "give the same settings, another --run, or --no-resume to start again"
            )
        self.level, self.success, self.taken = state["level"], state["success"], list(state["taken"])
        self.rates = list(state.get("rates", self.rates))
