import json
from pathlib import Path

import pytest

from nanochat.errors import NanochatError
from nanochat.rag.questions import load_questions

HOTPOT = {
    "_id": "h1",
    "question": "Who?",
    "answer": "Rush",
    "supporting_facts": [["A", 0], ["B", 1], ["A", 2]],
    "context": [["A", ["One.", " Two."]], ["B", ["Three."]]],
}


def write(path: Path, *records: object) -> Path:
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records) + "\n", encoding="utf-8")
    return path


def test_records_of_every_form(tmp_path: Path) -> None:
    path = write(
        tmp_path / "q.jsonl",
        {"question": "Where?", "answer": "Torwick", "gold": ["d1"], "sentence": "In Torwick."},
        {"id": "x", "query": "None?"},
        {"question": "Two?", "answers": ["a", "b"], "gold": "d2", "documents": [{"content": "text", "title": "T"}]},
        HOTPOT,
    )
    first, none, two, hotpot = load_questions(path)
    assert (first.id, first.answers, first.sentence, first.gold) == ("q1", ("Torwick",), "In Torwick.", ("d1",))
    assert (none.id, none.answerable) == ("x", False)
    assert (two.sentence, two.gold, two.documents[0].id) == ("a", ("d2",), "1")
    assert (hotpot.gold, hotpot.documents[0].content) == (("A", "B"), "One. Two.")


def test_all_bad_lines_are_listed(tmp_path: Path) -> None:
    good = {"question": "a", "answer": "b"}
    bad = [[1], {"question": " "}, {"question": "q", "answer": 3}, {**good, "id": "q2"}]
    path = write(tmp_path / "q.jsonl", "{", good, *bad)
    with pytest.raises(NanochatError) as error:
        load_questions(path)
    text = str(error.value)
    assert str(path) in text
    assert all(f"line {n}:" in text for n in (1, 3, 4, 5, 6))
    assert "stands at line 2" in text


def test_files_that_hold_nothing(tmp_path: Path) -> None:
    with pytest.raises(NanochatError, match="No such file"):
        load_questions(tmp_path / "none.jsonl")
    with pytest.raises(NanochatError, match="holds no question"):
        load_questions(write(tmp_path / "e.jsonl"))
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe{")
    with pytest.raises(NanochatError, match="UTF-8"):
        load_questions(tmp_path / "b.jsonl")
