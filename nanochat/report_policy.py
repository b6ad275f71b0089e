"""What the report shows of reinforcement learning: curves of the reward and its parts, of entropy, form and length, of
the evaluation, and where a run was rolled back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from nanochat.report_chart import Mark, Series, curve, line_chart, points
from nanochat.report_style import text

Records = Sequence[dict[str, Any]]


class Plot(NamedTuple):
    """A chart: a curve of the rounds and one of the evaluations, by their keys in the log."""

    title: str
    key: str
    unit: str
    evaluated: str = ""
    idle: float | None = None  # not drawn where all values are this one


PLOTS = (
    Plot("Right answers", "right", "share of the answers", "val_accuracy"),
    Plot("Entropy", "entropy", "nats per token"),
    Plot("Length of answers", "answer_tokens", "tokens of the model's own", "val_tokens"),
    Plot("Calls of an answer", "calls", "calls", "val_calls", idle=0.0),
    Plot("Answers cut off at the limit", "truncated", "share of the answers", idle=0.0),
    Plot("Divergence from where the stage began", "kl", "nats per token", idle=0.0),
    Plot("Tokens whose ratio was clipped", "clipped", "share of the tokens", idle=0.0),
    Plot("Groups that say nothing", "flat_groups", "share of the groups", idle=0.0),
    Plot("Level of the curriculum", "level", "level", idle=1.0),
)


def is_policy(records: Records) -> bool:
    """Whether a log is one of reinforcement learning."""
    return any("entropy" in record for record in records)


def policy_charts(name: str, records: Records, facts: Mapping[str, Any]) -> list[str]:
    """The charts of a stage. facts: what report.json says of it, its rollbacks among them."""
    marks = marks_of(facts)
    parts = sorted({key for record in records for key in record if key.startswith("reward_")})
    wanted = [
        Plot("Reward", "reward", "mean of the answers", "val_reward"),
        *(Plot(f"Reward: {part.removeprefix('reward_')}", part, part_unit(part), f"val_{part}") for part in parts),
        *PLOTS,
    ]
    charts = [chart(plot, name, records, marks) for plot in wanted]
    norm = curve("gradient norm", points(records, "grad_norm"), 2)
    return [
        *charts,
        tasks(name, records, marks),
        line_chart(f"Gradient norm of {name}", norm, "steps", "norm before clipping", marks=marks),
    ]


def part_unit(part: str) -> str:
    """What the axis of a reward says; that of form is the rate of well-formed answers."""
    return "share of well-formed answers" if part == "reward_format" else "mean of the answers"


def chart(plot: Plot, name: str, records: Records, marks: Sequence[Mark]) -> str:
    sampled, evaluated = points(records, plot.key), points(records, plot.evaluated)
    if all(value == plot.idle for _, value in (*sampled, *evaluated)):
        return ""
    title = plot.title[0].lower() + plot.title[1:]
    series = [*curve(title, sampled, 0), Series("evaluation", evaluated, 1, dots=True)]
    return line_chart(f"{plot.title}, {name}", series, "steps", plot.unit, log_y=False, marks=marks)


def tasks(name: str, records: Records, marks: Sequence[Mark]) -> str:
    """How well each validation task went, where there are several."""
    keys = sorted({key for record in records for key in record if key.startswith("val_accuracy_")})
    series = [
        Series(key.removeprefix("val_accuracy_"), points(records, key), i % 3, dots=True) for i, key in enumerate(keys)
    ]
    return line_chart(f"Right answers by task, {name}", series, "steps", "share", log_y=False, marks=marks)


def marks_of(facts: Mapping[str, Any]) -> list[Mark]:
    """Where the run collapsed, and the step whose weights it kept."""
    rollbacks = facts.get("rollbacks", [])
    kept = {float(rollback["to"]) for rollback in rollbacks}
    if facts.get("best_step", facts["step"]) != facts["step"]:
        kept.add(float(facts["best_step"]))
    return [
        *(Mark(float(rollback["step"]), "collapsed") for rollback in rollbacks),
        *(Mark(step, "kept") for step in sorted(kept)),
    ]


def outcome(facts: Mapping[str, Any]) -> str:
    """One sentence where the weights are not those of the last step."""
    said = [
        f"Collapsed at step {rollback['step']:,}: {rollback['reason']}. Rolled back to step {rollback['to']:,}."
        for rollback in facts.get("rollbacks", [])
    ]
    best = facts.get("best_step", facts["step"])
    if not said and best != facts["step"]:
        said.append(f"The weights are those of step {best:,}, the best evaluation.")
    return "".join(f'<p class="{"bad" if "Collapsed" in one else "meta"}">{text(one)}</p>' for one in said)
