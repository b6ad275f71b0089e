"""Reading documents: field names, metadata, and the line that is to blame."""

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.errors import NanochatError, UsageError
from nanochat.retrieval.document import Document
from nanochat.retrieval.jsonl import from_record, parse, read_documents


def write(path: Path, *lines: str | bytes) -> Path:
    path.write_bytes(b"\n".join(line.encode() if isinstance(line, str) else line for line in lines) + b"\n")
    return path


def test_all_names_of_fields() -> None:
    whole = Document("1", "c", "t", "s", {"k": [1]})
    assert parse('{"id": "1", "content": "c", "title": "t", "source": "s", "metadata": {"k": [1]}}') == whole
    assert parse('{"_id": 1, "text": "c", "title": "t", "url": "s", "k": [1]}') == whole
    assert parse('{"docid": "1", "contents": "c", "title": null, "metadata": null}') == Document("1", "c")


def test_what_else_a_line_holds_joins_the_metadata_which_wins() -> None:
    assert parse('{"id": "1", "text": "c", "a": 1, "b": 2, "metadata": {"b": 3}}').metadata == {"a": 1, "b": 3}
    assert parse('{"id": "1", "content": "c", "text": "other"}').metadata == {"text": "other"}


def test_without_an_id_the_content_gives_it() -> None:
    one, same, other = parse('{"text": "c"}'), parse('{"text": "c", "title": ""}'), parse('{"text": "d"}')
    assert one.id == same.id != other.id
    assert len(parse('{"text": "half \\ud800"}').id) == 32


@given(
    st.dictionaries(st.text(max_size=3), st.none() | st.booleans() | st.integers() | st.text(max_size=5), max_size=3),
    st.text(),
)
def test_any_record_gives_a_document_or_a_value_error(record: dict, content: str) -> None:
    try:
        document = from_record({"content": content, **record})
    except ValueError:
        return
    assert document.id
    assert parse(json.dumps({"id": "x", "content": content})).content == content


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "not JSON .*column"),
        ("[1]", "must be a JSON object, not list"),
        ('{"id": "a"}', "no content or text.*it has id"),
        ("{}", "it has nothing"),
        ('{"text": 1}', "text must be a text, not 1"),
        ('{"id": true, "text": ""}', "id must be a text"),
        ('{"id": ["a"], "text": ""}', "id must be a text"),
        ('{"text": "", "metadata": 3}', "metadata must be an object"),
        ('{"text": "", "metadata": {"a": NaN}}', "NaN is not JSON"),
        (b'{"text": "\xff"}', "not UTF-8"),
        ('{"text": "abc"', "at column 15"),
        ('{"text": "a\tb"}', r"not JSON \(Invalid control character at column 12\)"),
        ('{"text": "abc', r"not JSON \(Unterminated string at column 14\)"),
        (r'{"text": "\x"}', r"not JSON \(Invalid \\escape at column 11\)"),
        ("[" * 100_000, "recursion|nested"),
    ],
)
def test_bad_lines_name_file_and_line(tmp_path: Path, line: str | bytes, why: str) -> None:
    path = write(tmp_path / "docs.jsonl", '{"id": "a", "text": "x"}', "", line, '{"id": "b", "text": "y"}')
    with pytest.raises(UsageError, match=rf"(?s)docs\.jsonl, line 3: .*({why})"):
        list(read_documents(path))
    skipped: list[str] = []
    assert [d.id for d in read_documents(path, "skip", skipped.append)] == ["a", "b"]
    assert len(skipped) == 1
    assert "line 3" in skipped[0]


def test_several_files_directories_gzip_and_a_byte_order_mark(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", b'\xef\xbb\xbf{"id": "b", "text": "y"}\r')
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write('{"id": "a", "text": "x"}\n' * 2)
    read: list[int] = []
    assert [d.id for d in read_documents(tmp_path, progress=read.append)] == ["a", "a", "b"]
    assert sum(read) == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert [d.id for d in read_documents([tmp_path / "b.jsonl", tmp_path / "b.jsonl"])] == ["b", "b"]


def test_text_files_are_documents(tmp_path: Path) -> None:
    folder = tmp_path / "letters"
    (folder / "old").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / "a.md").write_bytes(b"\xef\xbb\xbfAn opening.\n# The bridge\nIt stands.")
    (folder / "old" / "b.txt").write_text("# no heading here", encoding="utf-8")
    (folder / "old" / "empty.txt").write_text("\n")
    (folder / "c.pdf").write_bytes(b"%PDF")
    (folder / ".git" / "d.txt").write_text("hidden")
    a, b = ((folder / name).as_posix() for name in ("a.md", "old/b.txt"))
    read: list[int] = []
    found = list(read_documents(folder, progress=read.append))
    assert found == [
        Document(a, "An opening.\n# The bridge\nIt stands.", "The bridge", a),
        Document(b, "# no heading here", "b", b),
    ]
    assert sum(read) == sum((folder / name).stat().st_size for name in ("a.md", "old/b.txt", "old/empty.txt"))
    assert list(read_documents(folder / "old" / "b.txt")) == found[1:]
    (folder / "z.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match=r"z\.txt: this is no text in UTF-8 .*--on-error skip"):
        list(read_documents(folder))
    skipped: list[str] = []
    assert list(read_documents(folder, "skip", skipped.append)) == found
    assert "empty.txt: there is no text in it" in skipped[0]
    assert "z.txt: this is no text" in skipped[1]
    write(folder / "documents.jsonl", '{"id": "j", "text": "x"}')
    assert [d.id for d in read_documents(folder)] == ["j"]  # then the folder is one of JSONL


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        list(read_documents(tmp_path / "missing.jsonl"))
    with pytest.raises(UsageError, match=r"no \.jsonl files in .* no \.txt, \.md, \.markdown, \.rst files below it"):
        list(read_documents(tmp_path))
    with pytest.raises(UsageError, match="no files"):
        list(read_documents([]))
    with pytest.raises(UsageError, match="on_error"):
        list(read_documents(tmp_path, "ignore"))
    (tmp_path / "torn.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' * 9999)[:-20])
    with pytest.raises(NanochatError, match=r"cannot read .*torn\.jsonl\.gz"):
        list(read_documents(tmp_path / "torn.jsonl.gz"))
