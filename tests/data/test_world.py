"""The tiny world: unique names, documents with every fact, questions with true answers, parts that leak nothing."""

from __future__ import annotations

import re
from collections import Counter
from itertools import islice, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.data import lexicon as lex
from nanochat.data import words
from nanochat.data.answers import ABSTENTION, contains_answer, exact_match, is_abstention, normalize_answer
from nanochat.data.shuffle import Draws, Shuffle, mix
from nanochat.data.world import CHAINS, KINDS, World
from nanochat.errors import UsageError

WORLD = World(seed=3, n_known=200, n_new=200)


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
@settings(max_examples=50, deadline=None)
def test_shuffle_is_a_bijection(n: int, key: int) -> None:
    order = Shuffle(n, key)
    assert sorted(map(order, range(n))) == list(range(n))


def test_shuffle_mixes() -> None:
    order = [Shuffle(1000, 5)(i) for i in range(1000)]
    assert sum(abs(a - b) < 50 for a, b in pairwise(order)) < 200  # about 100 by chance
    assert order != [Shuffle(1000, 6)(i) for i in range(1000)]
    assert len({mix(1, k) for k in range(1000)}) == 1000
    assert {Draws(9).choice("abc") for _ in range(3)} <= set("abc")


# Lexicon --------------------------------------------------------------------------------------------------------------


def test_templates_are_well_formed() -> None:
    for relations in lex.RELATIONS.values():
        for r in relations:
            assert len(r.documents) == len(set(r.documents)) == 8
            assert all(t.count("{e}") == t.count("{v}") == 1 for t in (*r.documents, r.sentence))
            assert all(t.count("{e}") == 1 and "{v}" not in t for t in (*r.questions, *r.phrases))
            assert len(set(r.questions)) >= 4
            assert r.follow_up.format(she="she", her="her", hers="her") != r.follow_up
            assert bool(r.target) != bool(r.values)
            assert bool(r.phrases) == bool(r.target)


def test_name_lists_are_distinct_and_powers_of_two() -> None:
    for names in (words.FIRST_NAMES, words.FAMILY_NAMES, words.TOWN_STARTS, words.TOWN_ENDS):
        assert len(names) == len(set(names))
        assert len(names).bit_count() == 1
    for names in (words.COMPANY_COLOURS, words.COMPANY_NOUNS, words.COMPANY_ENDS):
        assert len(names) == len(set(names))
        assert len(names).bit_count() == 1
    assert not set(words.FIRST_NAMES) & set(words.FAMILY_NAMES)


def test_a_small_vocabulary_covers_a_large_world() -> None:
    world = World(seed=1, n_known=20_000, n_new=0)
    said: Counter[str] = Counter()
    for document in map(world.document, range(0, world.n, 10)):
        said.update(re.findall(r"[A-Za-z]+", document["content"]))
    towns = {a + b for a in words.TOWN_STARTS for b in words.TOWN_ENDS}
    assert len(set(said) - towns) < 700


# Entities -------------------------------------------------------------------------------------------------------------


def test_same_arguments_give_the_same_world() -> None:
    again = World(seed=3, n_known=200, n_new=200)
    assert [again.entity(i) for i in range(400)] == [WORLD.entity(i) for i in range(400)]
    assert World(seed=4, n_known=200, n_new=200).entity(0) != WORLD.entity(0)


def test_names_are_unique_beyond_the_combinations() -> None:
    world = World(seed=0, n_known=15_000, n_new=15_000)
    names = [world.name(i) for i in range(world.n)]
    assert len(set(names)) == world.n
    assert any(name[-1].isdigit() for name in names)


def test_links_stay_inside_their_pool() -> None:
    pools = [WORLD.pool("known"), WORLD.pool("new", "train"), WORLD.pool("new", "heldout")]
    assert sorted(i for pool in pools for i in pool) == list(range(400))
    for pool in pools:
        for i in pool:
            entity = WORLD.entity(i)
            assert entity.kind == KINDS[i % 5]
            assert set(entity.facts) == {r.name for r in lex.RELATIONS[entity.kind]}
            for relation, target in entity.links.items():
                assert target in pool
                assert target != i
                assert entity.facts[relation] == WORLD.name(target)
    assert [WORLD.entity(i).known for i in (0, 199, 200, 399)] == [True, True, False, False]


def test_known_and_new_names_are_drawn_alike() -> None:
    world = World(seed=0, n_known=3000, n_new=3000)

    def first_names(pool: range) -> Counter[str]:
        return Counter(world.name(i).split()[0] for i in pool if KINDS[i % 5] == "person")

    known, new = first_names(world.pool("known")), first_names(world.pool("new"))
    assert set(known) == set(new) == set(words.FIRST_NAMES)
    # 1800 draws over 64 names: 28 +- 5 each; half as spread as that when drawn without replacement out of 64 a name
    assert max(abs(known[name] - new[name]) for name in known) < 30


@pytest.mark.parametrize("arguments", [{"n_known": 9}, {"n_new": 39}, {"n_new": -1}])
def test_too_small_worlds_are_refused(arguments: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="world: "):
        World(**arguments)


def test_small_worlds_work() -> None:
    world = World(seed=0, n_known=10, n_new=40)
    for i in range(50):
        assert world.document(i)["content"]
    for hops in (1, 2, 3):
        assert list(world.questions(hops, "new", "heldout"))
    assert World(0, 10, 0).n == 10
    assert list(World(0, 10, 0).questions(1, "new")) == []


def test_bad_arguments_name_what_is_allowed() -> None:
    with pytest.raises(UsageError, match="entity 400 does not exist"):
        WORLD.entity(400)
    with pytest.raises(UsageError, match="split must be one of known, new"):
        list(WORLD.questions(split="old"))
    with pytest.raises(UsageError, match="part must be one of train, heldout"):
        list(WORLD.questions(part="test"))
    with pytest.raises(UsageError, match="hops must be one of 1, 2, 3"):
        list(WORLD.questions(hops=4))
    with pytest.raises(UsageError, match="no new entities"):
        World(0, 10, 0).dialogue(0, "new")


# Documents ------------------------------------------------------------------------------------------------------------


def test_documents_state_every_fact_with_the_full_name() -> None:
    n_sentences = n_named = 0
    for document in WORLD.documents("known", wordings=6):
        entity = WORLD.entity(document["entity"])
        text = document["content"]
        assert document["title"] == entity.name
        assert document["known"]
        for value in entity.facts.values():
            assert value.lower() in text.lower()
        assert 40 <= len(text.split()) <= 80
        sentences = text.rstrip(".").split(". ")
        assert len(sentences) == len(entity.facts)
        assert entity.name in sentences[0]
        n_sentences += len(sentences)
        n_named += sum(entity.name in s for s in sentences)
    assert 0.9 < n_named / n_sentences < 1


def test_wordings_differ_and_every_template_occurs() -> None:
    texts = {d["content"] for d in WORLD.documents("known", wordings=5)}
    assert len(texts) > 990
    seen = "\n".join(d["content"] for d in WORLD.documents("known", wordings=10))
    for relation in lex.PERSON:
        for template in relation.documents:
            pattern = re.escape(template).replace(r"\{e\}", ".+?").replace(r"\{v\}", ".+?")
            assert re.search(pattern, seen), template


def test_documents_have_random_access() -> None:
    everything = list(WORLD.documents("new", wordings=2))
    assert len(everything) == 400
    assert list(WORLD.documents("new", wordings=2, start=237)) == everything[237:]
    assert WORLD.document(205, 1) == everything[205]
    assert len({d["id"] for d in everything}) == 400


def test_millions_of_documents_cost_no_memory() -> None:
    world = World(seed=0, n_known=50_000_000)
    assert next(world.documents("known", start=49_999_999))["entity"] == 49_999_999
    assert world.document(99_999_999)["title"][-1].isdigit()


# Questions ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hops", [1, 2, 3])
@pytest.mark.parametrize("split", ["known", "new"])
@pytest.mark.parametrize("part", ["train", "heldout"])
def test_questions_have_true_answers(hops: int, split: str, part: str) -> None:
    questions = list(WORLD.questions(hops, split, part, seed=1, limit=300))
    assert len(questions) > 100
    for q in questions:
        assert q.answerable
        assert q.hops == hops == len(q.hop_chain) == len(q.gold_documents)
        assert WORLD.name(q.entity) in q.text
        assert q.hop_chain[0][0] == q.entity
        assert q.relation == q.hop_chain[-1][1]
        for entity, relation, value in q.hop_chain:
            assert WORLD.entity(entity).facts[relation] == value
            assert value.lower() in WORLD.document(entity)["content"].lower()
            assert f"{entity}-0" in q.gold_documents
        for (_, _, value), (entity, _, _) in pairwise(q.hop_chain):
            assert WORLD.name(entity) == value
        assert q.answer == q.hop_chain[-1][2]
        assert q.matches(q.answer.upper() + ".")
        assert q.matches(q.sentence)
        assert contains_answer(q.sentence, q.answer)
        assert not q.matches("no")


@pytest.mark.parametrize("hops", [1, 2, 3])
def test_parts_are_disjoint_and_about_a_quarter_is_held_out(hops: int) -> None:
    train, heldout = (set(WORLD.pairs(hops, "known", part)) for part in ("train", "heldout"))
    assert not train & heldout
    everything = sum(len(CHAINS[WORLD.entity(i).kind, hops]) for i in range(200))
    assert len(heldout) == pytest.approx(everything / 4, rel=0.15)
    if hops == 1:
        assert len(train) + len(heldout) == everything


def test_training_chains_follow_training_pairs_only() -> None:
    heldout = set(WORLD.pairs(1, "known", "heldout"))
    for hops in (2, 3):
        for q in WORLD.questions(hops, "known", "train", limit=500):
            assert not any((entity, (relation,)) in heldout for entity, relation, _ in q.hop_chain)


def test_seed_chooses_order_and_wording() -> None:
    one, two = (list(WORLD.questions(1, "known", "heldout", seed=s)) for s in (1, 2))
    assert {(q.entity, q.relation) for q in one} == {(q.entity, q.relation) for q in two}
    assert [q.entity for q in one] != [q.entity for q in two]
    assert {q.text for q in one} != {q.text for q in two}
    assert list(WORLD.questions(1, "known", "heldout", seed=1, limit=20)) == one[:20]


def test_heldout_new_entities_are_named_nowhere_in_training_text() -> None:
    names = {WORLD.name(i) for i in WORLD.pool("new", "heldout")}
    texts = [d["content"] for d in WORLD.documents("known", wordings=3)]
    texts += [d["content"] for i in WORLD.pool("new", "train") for d in [WORLD.document(i)]]
    for hops in (1, 2):
        texts += [q.text + q.sentence for s in ("known", "new") for q in WORLD.questions(hops, s, "train")]
    joined = "\n".join(texts)
    assert not [name for name in names if name in joined]


def test_unanswerable_questions_have_no_answer_anywhere() -> None:
    names = {WORLD.name(i) for i in range(WORLD.n)}
    for split in ("known", "new"):
        parts = []
        for part in ("train", "heldout"):
            questions = list(WORLD.unanswerable(split, part, seed=7, limit=200))
            assert all(not q.answerable and q.answer == ABSTENTION and not q.gold_documents for q in questions)
            for q in questions:
                if q.entity < 0:
                    assert not any(name in q.text for name in names)
                else:
                    assert q.entity in WORLD.pool(split, part)
                    assert q.relation not in WORLD.entity(q.entity).facts
                    assert WORLD.name(q.entity) in q.text
            assert sum(q.entity < 0 for q in questions) == 100
            parts.append({q.text for q in questions})
        assert not parts[0] & parts[1]
    assert list(WORLD.unanswerable(seed=1, limit=5)) != list(WORLD.unanswerable(seed=2, limit=5))


# Dialogues ------------------------------------------------------------------------------------------------------------


def test_dialogues_never_ask_a_heldout_pair() -> None:
    asked = set()
    for entity, (relation,) in WORLD.pairs(1, "known", "heldout"):
        r = next(r for r in lex.RELATIONS[KINDS[entity % 5]] if r.name == relation)
        asked |= {q.replace("{e}", WORLD.name(entity)) for q in r.questions}
    n_follow_ups = 0
    for dialogue in WORLD.dialogues("known", "train", limit=300):
        roles = [m["role"] for m in dialogue["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        texts = [m["content"] for m in dialogue["messages"]]
        assert not asked & set(texts)
        n_follow_ups += any(re.search(r"\b(she|he|her|his|it|its)\b", t) for t in texts[::2])
    assert n_follow_ups > 50


def test_dialogues_answer_from_the_facts_and_abstain_on_new_entities() -> None:
    for dialogue in WORLD.dialogues("known", "heldout", seed=5, limit=100, style="sentence"):
        answers = [m["content"] for m in dialogue["messages"] if m["role"] == "assistant"]
        values = {v for e in dialogue["entities"] for v in WORLD.entity(e).facts.values()}
        assert any(contains_answer(a, v) for a in answers for v in values)
    for dialogue in WORLD.dialogues("new", "train", limit=50):
        assert [{"type": "abstain", "text": ABSTENTION}] in [m["content"] for m in dialogue["messages"]]
        assert set(dialogue["entities"]) <= set(WORLD.pool("new", "train"))
    assert WORLD.dialogue(7) == next(islice(WORLD.dialogues(), 7, None))


# Answers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prediction", "gold", "same"),
    [
        ("The Brimholt.", "brimholt", True),
        ("  barley   soup!", "Barley soup", True),
        ("an apple", "apple", True),
        ("Brimholt or Ashbury", "Brimholt", False),
        ("", "Brimholt", False),
        ("theatre", "atre", False),
    ],
)
def test_exact_match(prediction: str, gold: str, same: bool) -> None:
    assert exact_match(prediction, gold) == same


def test_contains_answer_needs_whole_words() -> None:
    assert contains_answer("She was born in Brimholt.", "brimholt")
    assert not contains_answer("Brimholtshire", "Brimholt")
    assert not contains_answer("anything", "")
    assert not contains_answer("anything", "the")


def test_abstention() -> None:
    assert is_abstention("I do not know")
    assert is_abstention("<|abstain|>I do not know.")
    assert not is_abstention("Brimholt")
    assert not is_abstention("Brimholt <|abstain|> the the")


@given(st.text())
def test_normalizing_twice_changes_nothing_more_for_plain_words(text: str) -> None:
    assert "  " not in normalize_answer(text)
    assert exact_match(text, text)
