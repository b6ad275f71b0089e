"""World tasks: what is asked, what is judged right, and that training and evaluation share nothing."""

from __future__ import annotations

import pytest

from nanochat.data.answers import ABSTENTION
from nanochat.data.world import World
from nanochat.errors import UsageError
from nanochat.tasks.conversations import check_conversation
from nanochat.tasks.task import message_text
from nanochat.tasks.world import WorldDialogues, WorldQuestions, WorldUnanswerable

WORLD = World(seed=1, n_known=100, n_new=100)


@pytest.mark.parametrize("hops", [1, 2, 3])
def test_known_questions_are_answered(hops: int) -> None:
    task = WorldQuestions(WORLD, "known", "train", hops)
    for i in range(0, len(task), 7):
        conversation = check_conversation(task[i])
        question = task.question(i)
        assert message_text(conversation["messages"][0]) == question.text
        assert message_text(conversation["messages"][1]) == question.answer
        assert task.evaluate(conversation, question.answer.lower())
        assert task.evaluate(conversation, question.sentence)
        assert not task.evaluate(conversation, ABSTENTION)
        assert not task.evaluate(conversation, "")


def test_new_questions_are_abstained_on() -> None:
    task = WorldQuestions(WORLD, "new", "heldout", limit=20)
    assert len(task) == 20
    for i in range(len(task)):
        conversation = check_conversation(task[i])
        assert conversation["messages"][1]["content"] == [{"type": "abstain", "text": ABSTENTION}]
        assert task.evaluate(conversation, "I do not know")
        assert task.evaluate(conversation, "<|abstain|>")
        assert not task.evaluate(conversation, task.question(i).answer)


def test_sentence_style_teaches_sentences() -> None:
    task = WorldQuestions(WORLD, style="sentence", limit=5)
    assert [message_text(task[i]["messages"][1]) for i in range(5)] == [task.question(i).sentence for i in range(5)]
    with pytest.raises(UsageError, match="'short' or 'sentence'"):
        WorldQuestions(WORLD, style="long")


def test_wordings_ask_each_pair_differently() -> None:
    task = WorldQuestions(WORLD, limit=30, wordings=5)
    assert len(task) == 150
    texts = [message_text(task[i]["messages"][0]) for i in range(150)]
    assert len(set(texts)) == 150
    assert [task[i]["entity"] for i in range(30)] == [task[i + 60]["entity"] for i in range(30)]


def test_the_draw_chooses_the_questions() -> None:
    one, two, again = (WorldQuestions(WORLD, "known", "heldout", limit=20, draw=d) for d in (1, 2, 1))
    assert [one[i] for i in range(20)] == [again[i] for i in range(20)]
    assert [one[i] for i in range(20)] != [two[i] for i in range(20)]


def test_training_and_evaluation_share_no_pair() -> None:
    train = WorldQuestions(WORLD, "known", "train", wordings=5)
    heldout = WorldQuestions(WORLD, "known", "heldout")
    pairs = [{(t[i]["entity"], t[i]["relation"]) for i in range(len(t))} for t in (train, heldout)]
    assert not pairs[0] & pairs[1]
    assert len(pairs[0] | pairs[1]) == sum(len(WORLD.entity(i).facts) for i in range(100))


def test_unanswerable_questions() -> None:
    task = WorldUnanswerable(WORLD, n=40, draw=3)
    assert len(task) == 40
    for i in range(40):
        assert not task.question(i).answerable
        assert task.evaluate(check_conversation(task[i]), ABSTENTION)
        assert not task.evaluate(task[i], "red")


def test_dialogues() -> None:
    task = WorldDialogues(WORLD, n=50)
    assert len(task) == 50
    for i in range(50):
        conversation = check_conversation(task[i])
        assert task.evaluate(conversation, message_text(conversation["messages"][-1]))
    abstaining = WorldDialogues(WORLD, "new", n=30)
    for i in range(30):
        last = message_text(abstaining[i]["messages"][-1])
        assert abstaining.evaluate(abstaining[i], last)
