"""Follow-up questions made whole: rules one by one, and the dialogues of the tiny world as an oracle."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.data.world import World
from nanochat.errors import UsageError
from nanochat.rag.rewrite import MAX_CHARS, analyse, find_names, standalone


def conversation(*turns: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


FOUNDER = ("Who founded Torwick?", "Mara Velt founded Torwick. [2]")
KEYS = ("How does json.dumps sort keys?", "It sorts them with sort_keys.")


@pytest.mark.parametrize(
    ("turns", "query"),
    [
        (("Who founded Torwick?",), "Who founded Torwick?"),
        ((*FOUNDER, "Where was she born?"), "Where was she born? Mara Velt Torwick"),
        ((*FOUNDER, "Where was Dirk Amsel born?"), "Where was Dirk Amsel born?"),
        ((*FOUNDER, "And Orvane?"), "And Orvane? founded"),
        ((*FOUNDER, "What about Orvane?"), "What about Orvane? founded"),
        ((*FOUNDER, "Who is Dirk Amsel?"), "Who is Dirk Amsel?"),
        ((*FOUNDER, "Why?"), "Why? Mara Velt Torwick founded"),
        ((*FOUNDER, "Did she work with Dirk Amsel?"), "Did she work with Dirk Amsel? Mara Velt Torwick"),
        ((*FOUNDER, "Where did Dirk Amsel meet his wife?"), "Where did Dirk Amsel meet his wife?"),
        ((*FOUNDER, "In which year was the founder born?"), "In which year was the founder born? Mara Velt Torwick"),
        # pronouns of pronouns: the topic is carried on
        ((*FOUNDER, "Where was she born?", "In Fairfield.", "What does she play?"), "Fairfield"),
        ((*FOUNDER, "Where was she born?", "In Fairfield.", "What does she play?"), "Mara Velt"),
        # a new name ends the topic
        ((*FOUNDER, "Who is Dirk Amsel?", "A baker.", "Where does he live?"), "Where does he live? Dirk Amsel"),
        # thanks in between do not
        ((*FOUNDER, "Thank you!", "You are welcome!", "Where was she born?"), "Mara Velt"),
        ((*KEYS, "Does it take bytes?"), "Does it take bytes? json.dumps sort_keys"),
        ((*KEYS, "How do I parse dates from strings?"), "How do I parse dates from strings?"),
        ((*KEYS, "thanks a lot!"), ""),
        (("Hello!",), ""),
        ((*KEYS, "   "), ""),
        ((*KEYS, "日本の首都は?"), "日本の首都は?"),
        # names that nobody wrote with a capital: the words of the question before
        (("who is mara velt", "a baker", "where was she born"), "where was she born mara velt"),
    ],
)
def test_what_is_searched_for(turns, query):
    found = standalone(conversation(*turns))
    assert set(query.split()) <= set(found.split())
    if len(query.split()) > 2 or not query:
        assert sorted(found.split()) == sorted(query.split())
        assert found.startswith(turns[-1].strip() if query else "")


def test_dialogues_of_the_tiny_world():
    """A question that names its entity stays as it is; a follow-up gets the name."""
    world = World(5, 200, 60)
    n_whole = n_follow_ups = 0
    for i in range(120):
        dialogue = world.dialogue(i, "known", "train", 0, ("short", "sentence")[i % 2])
        messages, current = dialogue["messages"], None
        names = [world.name(e) for e in dialogue["entities"]]
        for j, message in enumerate(messages):
            if message["role"] != "user":
                continue
            query, text = standalone(messages[: j + 1]), message["content"]
            named = [name for name in names if name in text]
            if named:
                current, n_whole = named[0], n_whole + 1
                assert query == text
            elif current is not None and query:
                n_follow_ups += 1
                assert current in query
                assert len(query) < len(text) + 80
    assert n_whole > 100
    assert n_follow_ups > 50


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("Where was Mara Velt born?", ["Mara Velt"]),
        ("Mara Velt was born there.", ["Mara Velt"]),
        ("Is the Bank of Orvane older than Torwick?", ["Bank of Orvane", "Torwick"]),
        ("Explain Torwick's wall. In Orvane it rains.", ["Torwick", "Orvane"]),
        ("I think that I know HTTPServer, os.path and max_len", ["HTTPServer", "os.path", "max_len"]),
        ("Does Python 3 run on iPhone or x86?", ["Python", "iPhone", "x86"]),
        ("Elke, Ivo and Élise sing", ["Elke", "Ivo", "Élise"]),
        ("what is the capital?", []),
        ("", []),
    ],
)
def test_names(text, names):
    assert find_names(text) == names


def test_content_and_parts():
    assert analyse("When did Mara Velt found the harbour?").content == ("found", "harbour")
    parts = [{"type": "text", "text": "Mara Velt founded it."}, {"type": "cite", "text": "1"}]
    messages = [*conversation("Who founded Torwick?"), {"role": "assistant", "content": parts}]
    assert "Mara Velt" in standalone([*messages, *conversation("Where was she born?")])


def test_long_questions_keep_both_ends():
    query = standalone(conversation(f"First {'word ' * 5000} last?"))
    assert query.startswith("First")
    assert query.endswith("last?")
    assert len(query) <= MAX_CHARS + 1


def test_no_question_is_an_error():
    with pytest.raises(UsageError, match="nothing to search for"):
        standalone([{"role": "system", "content": "x"}])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(max_size=60), min_size=1, max_size=7))
def test_any_text_gives_a_query_that_begins_with_the_question(texts):
    messages = conversation(*texts)
    last = [m["content"] for m in messages if m["role"] == "user"][-1].strip()
    query = standalone(messages)
    assert query == "" or query.startswith(last)
