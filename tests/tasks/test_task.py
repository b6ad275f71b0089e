"""Mixtures and curricula: what they hold, and in which order."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.errors import UsageError
from nanochat.tasks.task import Curriculum, Mixture, Task, chat, check_index, message_text, short_questions


class Numbers:
    """A task whose conversation i asks for i."""

    eval_type = "generative"

    def __init__(self, name: str, n: int) -> None:
        self.name, self.n = name, n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> dict[str, Any]:
        return chat(f"{self.name}{check_index(i, self.n)}", "yes")

    def evaluate(self, conversation: dict[str, Any], completion: str) -> bool:
        return completion == "yes"


def prompts(task: Task) -> list[str]:
    return [message_text(task[i]["messages"][0]) for i in range(len(task))]


def test_a_mixture_holds_everything_once_in_one_shuffled_order() -> None:
    tasks = [Numbers("a", 50), Numbers("b", 30), Numbers("c", 1)]
    order = prompts(Mixture(tasks, seed=1))
    assert sorted(order) == sorted(p for t in tasks for p in prompts(t))
    assert order != sorted(order)
    assert order == prompts(Mixture(tasks, seed=1))
    assert order != prompts(Mixture(tasks, seed=2))
    assert {p[0] for p in order[:20]} >= {"a", "b"}


def test_weights_are_passes() -> None:
    mixture = Mixture([Numbers("a", 40), Numbers("b", 40), Numbers("c", 40)], [2, 0.5, 0])
    counts = Counter(prompts(mixture))
    assert len(mixture) == 100
    assert all(counts[f"a{i}"] == 2 for i in range(40))
    assert sum(counts[f"b{i}"] for i in range(40)) == 20 == sum(f"b{i}" in counts for i in range(40))
    assert {f"b{i}" for i in range(20)} != {p for p in counts if p[0] == "b"}  # half of it, and not the first half
    assert not any(p.startswith("c") for p in counts)


@given(st.lists(st.tuples(st.integers(1, 20), st.floats(0.1, 3)), min_size=1, max_size=5), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_no_conversation_is_taken_twice_before_all_are_taken_once(parts: list[tuple[int, float]], seed: int) -> None:
    tasks = [Numbers(f"{k}:", n) for k, (n, _) in enumerate(parts)]
    weights = [w for _, w in parts]
    if not any(round(w * n) for n, w in parts):
        return
    mixture = Mixture(tasks, weights, seed)
    counts = Counter(mixture.locate(i) for i in range(len(mixture)))
    for k, (n, weight) in enumerate(parts):
        taken = [counts[k, i] for i in range(n)]
        assert sum(taken) == round(weight * n)
        assert max(taken) - min(taken) <= 1


def test_mixtures_of_mixtures() -> None:
    inner = Mixture([Numbers("a", 3), Numbers("b", 4)])
    assert sorted(prompts(Mixture([inner, Numbers("c", 2)]))) == ["a0", "a1", "a2", "b0", "b1", "b2", "b3", "c0", "c1"]


def test_a_curriculum_changes_the_mixture_with_progress() -> None:
    easy, hard = Numbers("easy", 10), Numbers("hard", 100)
    course = Curriculum([(0.25, easy), (0.5, Mixture([easy, hard], [1, 0.1])), (1.0, hard)], n=80)
    order = prompts(course)
    assert len(order) == 80
    assert order[:20] == [f"easy{i % 10}" for i in range(20)]
    assert {p[:4] for p in order[20:40]} == {"easy", "hard"}
    assert Counter(p[:4] for p in order[20:40])["easy"] == 10
    assert order[40:] == [f"hard{i}" for i in range(40)]


def test_a_curriculum_without_length_holds_all() -> None:
    assert len(Curriculum([(0.5, Numbers("a", 10)), (1.0, Numbers("b", 20))])) == 30


@pytest.mark.parametrize("i", [7, -8, 100])
def test_indices_beyond_the_end(i: int) -> None:
    for task in (Mixture([Numbers("a", 7)]), Curriculum([(1.0, Numbers("a", 7))])):
        with pytest.raises(IndexError):
            task[i]
        assert len(list(iter(task))) == 7  # type: ignore[call-overload]
        assert task[-1] == task[6]


def test_bad_mixtures_and_courses() -> None:
    a = Numbers("a", 3)
    for tasks, weights in (([], None), ([a], [1, 2])):
        with pytest.raises(UsageError, match="one weight for each"):
            Mixture(tasks, weights)
    with pytest.raises(UsageError, match="'a' has 3 conversations and the weight -1"):
        Mixture([a], [-1])
    with pytest.raises(UsageError, match="'b' has 0"):
        Mixture([a, Numbers("b", 0)])
    with pytest.raises(UsageError, match="leave no conversation"):
        Mixture([a], [0])
    for untils in ([], [0.5], [0.6, 0.4, 1.0], [0, 1.0], [0.5, 0.5, 1.0]):
        with pytest.raises(UsageError, match=r"fractions must rise and end with 1\.0"):
            Curriculum([(u, a) for u in untils])
    with pytest.raises(UsageError, match="'b' is empty"):
        Curriculum([(1.0, Numbers("b", 0))])
    for task in (Mixture([a]), Curriculum([(1.0, a)])):
        with pytest.raises(UsageError, match="one by one"):
            task.evaluate(a[0], "yes")


class Listed:
    """A task of these conversations."""

    name, eval_type = "listed", "generative"

    def __init__(self, *conversations: dict[str, Any]) -> None:
        self.conversations = conversations

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.conversations[i]

    def evaluate(self, conversation: dict[str, Any], completion: str) -> bool:
        return False


def test_short_questions_fit_on_a_button_are_answered_and_begin_differently() -> None:
    system = {"messages": [{"role": "system", "content": "Be brief."}, *chat("How?", "So.")["messages"]]}
    task = Listed(
        chat("Who is it?", "Mara."),
        chat("Who was it?", "Velt."),
        chat("Where is Torwick?", "I do not know."),
        chat("x" * 81, "Long."),
        chat("Two\nlines", "No."),
        chat("  ", "Nothing."),
        system,
        {"messages": [{"role": "user", "content": "Unanswered?"}]},
        chat("What is it?", [{"type": "text", "text": "A town."}]),
        chat("Who is it?", "Mara."),
    )
    assert short_questions(task) == ["Who is it?", "What is it?", "Who was it?"]
    assert short_questions(task, n=1) == ["Who is it?"]
    assert short_questions(Listed()) == []
