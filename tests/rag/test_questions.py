import json
import re
from pathlib import Path

import pytest

from nanochat.errors import NanochatError, UsageError
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


def test_lines_of_jsonl_and_lists_are_read_alike(tmp_path: Path) -> None:
    rows = [HOTPOT, {"question": "Who?", "answer": "Mara", "gold": ["d1"]}, {"question": "Why?", "answers": []}]
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, rows)), encoding="utf-8-sig")
    (tmp_path / "a.json").write_text(json.dumps(rows))
    lines, items = load_questions(tmp_path / "a.jsonl"), load_questions(tmp_path / "a.json")
    assert [q.question for q in lines] == [q.question for q in items]
    assert [q.gold for q in lines] == [("A", "B"), ("d1",), ()]
    assert [q.answerable for q in lines] == [True, True, False]
    assert [q.id for q in lines] == ["h1", "q3", "q5"]


def test_everything_wrong_with_a_file_is_said_at_once(tmp_path: Path) -> None:
    broken = {k: v for k, v in HOTPOT.items() if k != "answer"}
    rows = ['{"question": "A?", "answer": "a", "id": 1}', "{oops", "[1]", '{"answer": "x"}', json.dumps(broken),
            '{"question": "B?", "answer": 3}', '{"question": "C?", "gold": ["d"]}',
            '{"question": "D?", "answer": "d", "id": 1}']  # fmt: skip
    (tmp_path / "bad.jsonl").write_text("\n".join(rows))
    with pytest.raises(UsageError) as error:
        load_questions(tmp_path / "bad.jsonl")
    text = str(error.value)
    assert "bad.jsonl" in text
    assert [int(n) for n in re.findall(r"^ +line (\d+):", text, re.M)] == [2, 3, 4, 5, 6, 7, 8]
    assert "stands at line 1 too" in text


def test_where_json_ends_to_be_json(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", '{"question": "A?"}', '{"question": "B\t?"}')
    with pytest.raises(UsageError, match=r"  line 2: not JSON: Invalid control character at column 16$"):
        load_questions(path)
    path = write(tmp_path / "q.json", "[", '{"question": "A?"},', '{"question" "B?"}]')
    with pytest.raises(UsageError, match=r"  the list: not JSON: Expecting ':' delimiter at line 3, column 13$"):
        load_questions(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "holds no question"), (b"[]", "holds no question"), (b"[{]", "the list: not JSON"),
     (b"[3]", "item 1: must be an object"), (b"{}\n\xff", "line 2: not UTF-8"),
     (b"[" * 100_000, "the list: not JSON")],
)  # fmt: skip
def test_files_that_hold_no_questions(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(NanochatError, match=message):
        load_questions(tmp_path / "x.jsonl")
    with pytest.raises(NanochatError, match="cannot read"):
        load_questions(tmp_path / "nowhere.jsonl")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context": [["t"]]}, r'line 1: needs "context": \[\[title, \[sentence'),
        ({"context": [["t", "text"]]}, 'line 1: document 1 of "context": expected'),
        ({"context": None}, 'line 1: needs "context"'),
        ({"supporting_facts": None, "context": ["One."]}, 'line 1: needs "context"'),
        ({"supporting_facts": None}, 'line 1: needs "supporting_facts"'),
        ({"answer": None}, 'line 1: needs "answer"'),
        ({"question": " "}, 'line 1: needs "question"'),
    ],
)
def test_records_of_hotpotqa_that_lack_something(tmp_path: Path, change: dict[str, object], message: str) -> None:
    record = {name: value for name, value in {**HOTPOT, **change}.items() if value is not None}
    with pytest.raises(UsageError, match=message):
        load_questions(write(tmp_path / "h.jsonl", record))


def test_an_answer_that_is_null(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('{"question": "Who?", "answer": null}')
    with pytest.raises(UsageError, match='line 1: "answer" is null: leave it out'):
        load_questions(tmp_path / "q.jsonl")


def test_a_context_that_is_a_text_is_none_of_ours(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", {"question": "Who?", "answer": "A", "context": "A did it.", "gold": ["a"]})
    assert load_questions(path)[0].gold == ("a",)
