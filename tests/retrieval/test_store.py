"""Segments: what was written comes back, merged ones hold the same, damage is an error."""

import sqlite3
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.errors import NanochatError
from nanochat.retrieval.chunk import spans
from nanochat.retrieval.document import Document, document_hash, metadata_json
from nanochat.retrieval.filters import check, matches
from nanochat.retrieval.generation import problems
from nanochat.retrieval.prepare import pieces
from nanochat.retrieval.store import DATABASE, PLACES, Segment, SegmentWriter, hash_id, merge, numbers

TEXTS = st.text(st.sampled_from("ab é日\U0001f600\n\x00 "), max_size=40)
VALUES = st.integers() | st.text(max_size=3) | st.booleans() | st.lists(st.integers(0, 3), max_size=2) | st.none()
METADATA = st.dictionaries(st.sampled_from("xy"), VALUES)
DOCUMENTS = st.lists(
    st.builds(Document, st.sampled_from("abcdef/"), TEXTS, TEXTS, TEXTS, METADATA), min_size=1, max_size=8
)


def fill(directory: Path, documents: list[Document], first: int = 0, chunk: int = 3, overlap: int = 1) -> SegmentWriter:
    """Write a segment in steps of two documents, with a gap of one row between documents."""
    writer, row = SegmentWriter(directory), first
    for start in range(0, len(documents), 2):
        rows, passages, fields = [], [], []
        part = documents[start : start + 2]
        for d in part:
            cuts = spans(d.content, chunk, overlap)
            content = d.content if len(cuts) == 1 else None
            hash = document_hash(d)
            rows.append((row, len(cuts), d.id, hash, d.title, d.source, metadata_json(d.metadata), content))
            passages += pieces(row, d.content, cuts) if len(cuts) > 1 else []
            fields.append((row, d.metadata))
            row += len(cuts) + 1
        writer.add(rows, [hash_id(d.id) for d in part], passages, fields)
    writer.finish()
    return writer


def check_segment(segment: Segment, documents: list[Document]) -> None:
    firsts = segment.rows[0].tolist()
    assert len(firsts) == len(documents)
    for first, n, document in zip(firsts, segment.rows[1].tolist(), documents):
        assert segment.whole(first) == document
        cuts = spans(document.content, 3, 1)
        found = segment.fetch(range(first, first + n + 1))
        assert sorted(found) == list(range(first, first + n))
        for cut, passage in zip(cuts, [found[row] for row in sorted(found)]):
            assert passage.content == document.content[slice(*cut)]
            assert passage.span == (None if n == 1 else cut)
            assert (passage.id, passage.title, passage.metadata) == (document.id, document.title, document.metadata)
        hashes = numbers([bytes(8), hash_id(document.id)])
        assert (1, first) in segment.with_ids(hashes)
        assert (0, first) in segment.with_hashes(numbers([document_hash(document)]))
        id, known = segment.known([first])[first]
        assert (id, known.row, known.n, known.source) == (document.id, first, n, document.source)
    for filter in ({"x": 1}, {"x": {"ne": 1}}, {"y": {"gte": 0}}, {"id": ["a", "/"]}, {"title": {"gt": "a"}}, {}):
        expected = [row for row, d in zip(firsts, documents) if matches(d, check(filter))]
        assert segment.matching(check(filter)).tolist() == expected


@settings(max_examples=40, deadline=None)
@given(DOCUMENTS)
def test_documents_come_back(tmp_path_factory: pytest.TempPathFactory, documents: list[Document]) -> None:
    directory = tmp_path_factory.mktemp("store") / "seg"
    info = fill(directory, documents, first=5).describe()
    segment = Segment(directory)
    check_segment(segment, documents)
    assert (info.documents, info.first_row) == (len(documents), 5)
    assert segment.places(np.array([0, 4, info.last_row + 1, 10**12])).tolist() == [-1] * 4
    assert segment.expand(np.asarray(segment.rows[0])).tolist() == sorted(
        row + i for row, n in zip(*segment.rows.tolist()) for i in range(n)
    )
    assert not list(problems(directory, info.files))
    segment.close()


@settings(max_examples=20, deadline=None)
@given(DOCUMENTS, DOCUMENTS, st.data())
def test_a_merge_holds_what_is_alive(
    tmp_path_factory: pytest.TempPathFactory, first: list[Document], second: list[Document], data: st.DataObject
) -> None:
    root = tmp_path_factory.mktemp("store")
    end = fill(root / "one", first).describe().last_row
    fill(root / "two", second, first=end + 2)
    rows = [row for name in ("one", "two") for row in np.load(root / name / PLACES)[0].tolist()]
    dead = data.draw(st.sets(st.sampled_from(rows)))
    info = merge(root, root / "both", ["one", "two"], np.array(sorted(dead), np.int64))
    alive = [d for row, d in zip(rows, first + second) if row not in dead]
    if not alive:
        assert info is None
        return
    segment = Segment(root / "both")
    assert segment.rows[0].tolist() == [row for row in rows if row not in dead]
    check_segment(segment, alive)
    segment.close()


def test_damage_and_missing_files_are_errors(tmp_path: Path) -> None:
    documents = [Document(str(i), "word " * 50) for i in range(300)]
    info = fill(tmp_path / "seg", documents, chunk=0, overlap=0).describe()
    database = tmp_path / "seg" / DATABASE
    whole = database.read_bytes()
    database.write_bytes(whole[:4096] + b"\xff" * 4096 + whole[8192:])
    with pytest.raises(NanochatError, match="verify"):
        Segment(tmp_path / "seg").fetch(range(600))
    assert [p for p in problems(tmp_path / "seg", info.files) if DATABASE in p]
    database.unlink()
    with pytest.raises(FileNotFoundError):
        Segment(tmp_path / "seg")
    (tmp_path / "seg" / PLACES).write_bytes(b"\x93NUMPY")
    with pytest.raises(NanochatError, match="damaged"):
        Segment(tmp_path / "seg")
    (tmp_path / "seg" / PLACES).unlink()
    with pytest.raises(FileNotFoundError, match=f"seg/{PLACES}$"):
        Segment(tmp_path / "seg")


def test_an_open_segment_outlives_its_files(tmp_path: Path) -> None:
    documents = [Document(str(i), f"text {i}") for i in range(1000)]
    fill(tmp_path / "seg", documents)
    segment = Segment(tmp_path / "seg")
    for path in (tmp_path / "seg").iterdir():
        path.unlink()
    check_segment(segment, documents)
    segment.close()
    with pytest.raises(sqlite3.ProgrammingError):
        segment._connection.execute("SELECT 1")
