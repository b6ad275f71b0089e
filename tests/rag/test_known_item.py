"""Questions that ask for an object by the first sentence that is said of it."""

import pytest

from nanochat.data.docstring_sources import Record
from nanochat.rag.known_item import first_sentence, question_text, questions
from nanochat.rag.questions import parse_question


def record(name: str, text: str, kind: str = "function") -> Record:
    return Record(name, kind, "m", f"m:{name}", "", text)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("Return it.  Then more.", "Return it."),
        ("Serialize ``obj`` to\na *JSON* :class:`str`.\n\nMore.", "Serialize obj to a JSON str."),
        ("range(stop) -> range object\nrange(a, b)\n\nReturn an object.", "Return an object."),
        ("sleep(seconds)\n\nDelay it, e.g. a while.", "Delay it, e.g. a while."),
        ("D.items() -> a view", ""),
        ("No end", "No end"),
        ("", ""),
    ],
)
def test_first_sentences(text: str, sentence: str) -> None:
    assert first_sentence(text) == sentence


def test_the_name_is_taken_out() -> None:
    assert question_text(record("a.join", "Use os.path.join() or Join to join, not joined, paths.")) == (
        "Use or to, not joined, paths."
    )
    assert question_text(record("a.b", "Too few words.")) == ""
    assert question_text(record("a.b", "word " * 41)) == ""


def test_questions_are_those_of_rag_and_never_ambiguous() -> None:
    same = "Return the number of items that it holds."
    made = questions(
        [
            record("m.dumps", "Serialize an object to a formatted string. And so on."),
            record("m.a", same),
            record("m.b", f"{same}\n\nUnlike m.a it counts twice."),
            record("m.c#comments", "Comments ask for nothing, since nobody calls them.", "comment"),
        ]
    )
    (one,) = map(parse_question, made, ["q"])
    assert (one.question, one.gold) == ("Serialize an object to a formatted string.", ("m.dumps",))
    assert one.answers == ("m.dumps", "dumps")
    assert one.sentence == "m.dumps: Serialize an object to a formatted string."
