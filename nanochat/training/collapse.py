"""Whether a run of reinforcement learning has collapsed, seen from what its rollouts look like.

Policies collapse in known ways: the reward falls and does not come back, answers lose their form, entropy vanishes or
explodes, answers grow to the limit. A fall of the reward alone says enough; the others are signs, and two of them
together, or one with a reward that does not rise, are a collapse. All are means over the last rounds, and a verdict
takes several rounds in a row: a few unlucky prompts are none.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LEAST = 2  # rounds before a comparison means anything
MEMORY = 30  # rounds that tell how noisy a round is
WATCHED = ("reward", "format", "entropy", "truncated")


@dataclass(frozen=True)
class Limits:
    """When rounds look like a collapse. `window`: rounds averaged, fewer at first: with a learning rate that is far too
    high all is lost before it is full. `patience`: bad rounds in a row."""

    window: int = 8
    patience: int = 3
    reward_drop: float = 0.2  # below the best window, in units of reward...
    reward_share: float = 0.5  # ...or this share of the best window lost, when that is more than half of reward_drop
    noise: float = 3.5  # and in any case more standard errors of the difference of two windows than this
    format_share: float = 0.5  # of the best window
    entropy_rise: float = 3.0  # times the first window's, and at least 0.5 nats more
    entropy_floor: float = 0.02  # times the first window's
    truncated: float = 0.5  # share of rollouts that were cut off, when it was less than half of that at first


class Detector:
    """Takes the means of each round and says what is wrong, once it has been wrong for long enough."""

    def __init__(self, limits: Limits = Limits()) -> None:
        self.limits = limits
        self.forget()

    def forget(self) -> None:
        """Begin anew: the problems have changed, and what was normal before is none now."""
        self.recent: deque[dict[str, float]] = deque(maxlen=self.limits.window)
        self.first: dict[str, float] = {}
        self.best: dict[str, float] = {}
        self.bad = 0
        self.spread, self.n_spread = 0.0, 0  # mean change of the reward from round to round

    def update(self, means: Mapping[str, float]) -> str:
        """After a round with means of `WATCHED`: the reason for a collapse, or an empty text."""
        values = {name: float(means[name]) for name in WATCHED}
        if not all(map(math.isfinite, values.values())):
            return "a mean of the rollouts is not finite: " + ", ".join(f"{k} {v}" for k, v in values.items())
        if self.recent:
            self.n_spread += 1
            change = abs(values["reward"] - self.recent[-1]["reward"])
            self.spread += (change - self.spread) / min(self.n_spread, MEMORY)
        self.recent.append(values)
        if len(self.recent) < LEAST:
            return ""
        now = {name: sum(one[name] for one in self.recent) / len(self.recent) for name in WATCHED}
        if not self.first:
            self.first, self.best = dict(now), dict(now)
        for name in ("reward", "format"):
            self.best[name] = max(self.best[name], now[name])
        reason = self.reason(now)
        self.bad = self.bad + 1 if reason else 0
        return reason if self.bad >= self.limits.patience else ""

    def reason(self, now: Mapping[str, float]) -> str:
        """What speaks for a collapse in one window, empty when it does not suffice."""
        limits, best = self.limits, self.best
        lost = best["reward"] - now["reward"]
        enough = lost > limits.reward_drop
        enough |= lost > limits.reward_drop / 2 and lost > limits.reward_share * abs(best["reward"])
        # the mean change of independent normal rounds is 2 / sqrt(pi) of their standard deviation
        error = self.spread * math.sqrt(math.pi) / 2 * math.sqrt(2 / len(self.recent))
        if enough and lost > limits.noise * error:
            return f"the reward fell from {best['reward']:.3f} to {now['reward']:.3f}"
        signs = self.signs(now)
        stalled = now["reward"] <= self.first["reward"]
        return "; ".join(signs) if len(signs) >= 2 or (signs and stalled) else ""

    def signs(self, now: Mapping[str, float]) -> list[str]:
        limits, first, found = self.limits, self.first, []
        if now["format"] < limits.format_share * self.best["format"]:
            found.append(f"well-formed answers fell from {self.best['format']:.2f} to {now['format']:.2f}")
        if now["entropy"] > max(limits.entropy_rise * first["entropy"], first["entropy"] + 0.5):
            found.append(f"the entropy rose from {first['entropy']:.3f} to {now['entropy']:.3f} nats")
        if now["entropy"] < limits.entropy_floor * first["entropy"]:
            found.append(f"the entropy vanished: {now['entropy']:.5f} nats, {first['entropy']:.3f} at first")
        if now["truncated"] > limits.truncated and first["truncated"] < limits.truncated / 2:
            found.append(f"{now['truncated']:.0%} of the answers run into the limit, {first['truncated']:.0%} at first")
        return found

    def state_dict(self) -> dict[str, Any]:
        names = ("first", "best", "bad", "spread", "n_spread")
        return {"recent": list(self.recent), **{name: getattr(self, name) for name in names}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.forget()
        self.recent.extend(state["recent"])
        for name in ("first", "best", "bad", "spread", "n_spread"):
            setattr(self, name, state[name])
