"""Sums: solutions are right by Python's own arithmetic, parts share no expression, judges take the number only."""

import pytest

from nanochat.engine.tools import calculate
from nanochat.errors import UsageError
from nanochat.tasks.arithmetic import Arithmetic, evaluate_expression
from nanochat.tasks.registry import open_task


def expressions(task: Arithmetic) -> list[str]:
    return [task[i]["messages"][1]["content"][0]["text"] for i in range(len(task))]


@pytest.mark.parametrize("part", ["train", "heldout"])
def test_solutions_are_right(part: str) -> None:
    task = Arithmetic(seed=3, n=200, digits=3, terms=4, operations="+-*", tool=True, part=part)
    for i, text in enumerate(expressions(task)):
        value = eval(text)  # the oracle
        call, output, said = task[i]["messages"][1]["content"]
        assert evaluate_expression(text) == value
        assert task[i]["answers"] == [output["text"]] == [said["text"]] == [str(value)] == [calculate(call["text"])]
        assert text in task[i]["messages"][0]["content"]


def test_parts_share_no_expression() -> None:
    train, held = (Arithmetic(n=2000, tool=True, part=part) for part in ("train", "heldout"))
    a, b = set(expressions(train)), set(expressions(held))
    assert not a & b
    assert len(a) + len(b) == 200  # two digits, two signs, whole


def test_judge() -> None:
    task = Arithmetic(n=3)
    asked, answer = task[0], task[0]["answers"][0]
    assert task.evaluate(asked, f" {answer}")
    assert task.evaluate(asked, f"<|tool_output_start|>9<|tool_output_end|>{answer}")
    for wrong in ("", f"{answer}0", f"it is {answer}", f"{answer}<|tool_output_end|>"):
        assert not task.evaluate(asked, wrong)


def test_as_a_spec() -> None:
    task = open_task("arithmetic:digits=2,terms=3,operations=+*,tool=1,part=heldout,n=7,seed=2")
    assert len(task) == 7
    assert task[6]["messages"][1]["content"][0]["type"] == "tool_call"
    with pytest.raises(UsageError, match="operations=/"):
        open_task("arithmetic:operations=/")
    for spec in ("digits=0", "terms=1", "n=0", "part=all"):
        with pytest.raises(UsageError, match="arithmetic"):
            open_task(f"arithmetic:{spec}")
