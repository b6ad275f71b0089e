"""Right or wrong, by hand-made cases."""

import pytest

from nanochat.data.world import World
from nanochat.evaluation.grading import answer_f1, is_right, names, token_f1
from nanochat.rag.support import sentences

BORN = "Where was Mara Velt born?"
PLAYS = "Which instrument does Mara Velt play?"


@pytest.mark.parametrize(
    ("text", "gold", "question"),
    [
        ("Torwick", "Torwick", BORN),
        ("torwick.", "Torwick", BORN),
        ("Mara Velt was born in Torwick.", "Torwick", BORN),
        ("She was born in Torwick.", "Torwick", BORN),
        ("Torwick is where Mara Velt was born.", "Torwick", BORN),
        ("Located in Torwick.", "Torwick", BORN),
        ("Answer: Torwick", "Torwick", BORN),
        ("It is the oboe.", "the oboe", PLAYS),
        ("Mara Velt plays the oboe.", "oboe", PLAYS),
        ("Yes, both are towns.", "yes", "Are Torwick and Brimholt towns?"),
        ("Torwick is larger than Brimholt.", "Torwick", "Which is larger, Torwick or Brimholt?"),
        ("It was founded in 1604.", "1604", "When was Torwick founded?"),
        ("The best friend of Mara Velt is Bram Cobb.", "Bram Cobb", "Who is the best friend of Mara Velt?"),
        ("No one was born there but Mara Velt.", "Mara Velt", "Who was born in Torwick? Is it no one?"),
    ],
)
def test_right(text, gold, question):
    assert is_right(text, [gold], question=question)


@pytest.mark.parametrize(
    ("text", "gold", "question"),
    [
        ("Brimholt", "Torwick", BORN),
        ("Mara Velt was born in Brimholt.", "Torwick", BORN),
        ("Bram Cobb was born in Torwick.", "Torwick", BORN),
        ("Mara Velt was born in Torwick or Brimholt.", "Torwick", BORN),
        ("Mara Velt was born in Torwick, Brimholt and Penmere.", "Torwick", BORN),
        ("Mara Velt was not born in Torwick.", "Torwick", BORN),
        ("Mara Velt was born in Torwick. Bram Cobb was born there too.", "Torwick", BORN),
        ("Mara Velt was born in Torwickshire.", "Torwick", BORN),
        ("She plays the oboe and the harp.", "oboe", PLAYS),
        ("She plays the harp, oboe.", "oboe", PLAYS),
        ("harp or the oboe", "oboe", PLAYS),
        ("It was founded in 1604 or 1611.", "1604", "When was Torwick founded?"),
        ("Brimholt is larger than Torwick.", "Torwick", "Which is larger, Torwick or Brimholt?"),
        ("No. Or yes.", "yes", "Are Torwick and Brimholt towns?"),
        ("", "Torwick", BORN),
        ("Torwick", "", BORN),
    ],
)
def test_wrong(text, gold, question):
    assert not is_right(text, [gold], question=question)


def test_any_of_several_answers_will_do():
    assert is_right("In Old Torwick.", ["Torwick", "Old Torwick"], question=BORN)
    assert not is_right("In Torwick.", [], question=BORN)


def test_a_sentence_of_the_evidence_may_name_more():
    text = "Mara Velt came to the world in Torwick and Norland's press reported it."
    assert not is_right(text, ["Torwick"], question=BORN)
    assert is_right(text, ["Torwick"], question=BORN, evidence=[text])
    assert not is_right(text, ["Torwick"], question=BORN, evidence=["Norland's press is in Brimholt."])
    assert is_right("She never left Torwick.", ["Torwick"], question=BORN, evidence=["She never left Torwick."])
    assert is_right("A native of T.", ["Torwick"], question=BORN, sentences=["A native of T."])


def test_every_way_in_which_the_tiny_world_says_a_fact_is_right_and_no_other_fact_is():
    world = World(3, 10, 60)
    for i, wording in zip(world.pool("new"), range(1000)):
        document = world.document(i, wording)
        said = world.statements(i, wording)
        for relation, value in world.entity(i).facts.items():
            q = world.question(i, (relation,), wording)
            evidence = sentences(document["content"])
            assert is_right(q.sentence, [q.answer], question=q.text)
            assert is_right(said[relation], [q.answer], question=q.text, evidence=evidence)
            for other, sentence in said.items():
                if other != relation and world.entity(i).facts[other] != value:
                    assert not is_right(sentence, [q.answer], question=q.text, evidence=evidence)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Mara plays in Torwick.", ["Mara", "Torwick"]),
        ("The town of Torwick.", ["Torwick"]),
        ("Founded in 1604, possibly.", ["1604"]),
        ("Possibly Torwick. Bram left.", ["Torwick", "Bram"]),
        ("Brimholt", []),
        ("yes", []),
    ],
)
def test_names(text, expected):
    assert names(text) == expected


def test_f1_of_hand_made_answers():
    assert answer_f1("Torwick", ["Torwick"], question=BORN) == 1.0
    assert answer_f1("Mara Velt was born in Torwick.", ["Torwick"], question=BORN) == 1.0
    assert answer_f1("Mara Velt was born in Brimholt.", ["Torwick"], question=BORN) == 0.0
    assert answer_f1("Old Torwick", ["Torwick"], question=BORN) == pytest.approx(2 / 3)
    assert answer_f1("She hails from Torwick.", ["Torwick"], question=BORN) == pytest.approx(2 / 3)
    assert answer_f1("Torwick", ["Penmere", "Old Torwick"]) == pytest.approx(2 / 3)
    assert answer_f1("anything", [], question=BORN) == 0.0
    asked = "Which is larger, X or Y?"
    assert answer_f1("X is larger", ["X"], question=asked) == 1.0
    assert answer_f1("Y is larger", ["X"], question=asked) == 0.0


def test_an_answer_that_is_an_article_is_taken_as_it_stands():
    assert is_right("A", ["A"])
    assert is_right("a ", ["A"])
    for text in ("", "the", "B"):
        assert not is_right(text, ["A"])
        assert answer_f1(text, ["A"]) == 0.0
    assert answer_f1("A", ["A"]) == 1.0


def test_token_f1_counts_repetitions():
    assert token_f1(["a", "a", "b"], ["a", "b", "b"]) == pytest.approx(2 / 3)
    assert token_f1([], []) == 1.0
    assert token_f1(["a"], []) == token_f1([], ["a"]) == 0.0
