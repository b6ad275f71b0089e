"""What both indexes of words promise (document.Index): one suite over TF-IDF and BM25."""

import hashlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.errors import NanochatError, UsageError
from nanochat.retrieval.analysis import Analyser
from nanochat.retrieval.bm25 import BM25Index
from nanochat.retrieval.document import Batch
from nanochat.retrieval.simple import SimpleIndex

pytest.importorskip("tantivy")
KINDS = pytest.mark.parametrize("kind", [SimpleIndex, BM25Index], ids=lambda kind: kind.kind)
TEXTS = ["the moon", "moon and sun", "", "the sun sets", "?!", "the the of", "Mond", "月が出た", "moon"]
TEXT = st.lists(st.sampled_from(["moon", "sun", "the", "é", "月", "x1"]) | st.text(st.characters(), max_size=8)).map(
    " ".join
)


def build(kind, directory: Path, texts: list[str], first: int = 0, base: Path | None = None, drop=None) -> Path:
    batches = [Batch(np.arange(first, first + len(texts)), texts)] if texts else []
    kind.write(directory, {}, batches, base, None if drop is None else np.array(drop, np.int64))
    return directory


def hashes(directory: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(directory.iterdir())}


def matching(texts: dict[int, str], query: str) -> set[int]:
    """The rows that share a term with the query."""
    terms = set(Analyser().query_terms(query))
    return {row for row, text in texts.items() if terms & set(Analyser().terms(text))}


@KINDS
def test_what_is_found(kind, tmp_path: Path):
    index = kind.open(build(kind, tmp_path / "a", TEXTS, first=100), {})
    assert index.n_rows == len(TEXTS)
    queries = ["moon", "the moon", "the", "", "...", "unknown", "the unknown", "MOONS", "月", "\ud800 sun"]
    found = [set(result.rows.tolist()) for result in index.search(queries, 50)]
    moon, the = {100, 101, 108}, {100, 103, 105}
    assert found == [moon, moon, the, set(), set(), set(), set(), moon, {107}, {101, 103}]
    assert index.search([], 5) == []
    assert all(len(result.rows) == 0 for result in index.search(["moon"], 0) + index.search(["moon"], -3))
    assert len(index.search(["moon"], 2)[0].rows) == 2
    assert set(index.search(["moon"], 10**12)[0].rows.tolist()) == moon


@KINDS
def test_filters(kind, tmp_path: Path):
    index = kind.open(build(kind, tmp_path / "a", TEXTS * 30), {})
    best = index.search(["moon sun"], 1000)[0]
    for allowed in ([], [3], [5], [0, 1, 7, 8, 9, 10, 200], range(0, 270, 3), range(270), [1, 999, 10**12]):
        rows = np.array(allowed, np.int64)
        kept = np.isin(best.rows, rows)
        for k in (1, 2, 10, 1000):
            found = index.search(["moon sun"], k, rows)[0]
            assert found.rows.tolist() == best.rows[kept][:k].tolist()
            assert found.scores.tolist() == pytest.approx(best.scores[kept][:k].tolist(), rel=1e-5)


@KINDS
def test_an_empty_index(kind, tmp_path: Path):
    index = kind.open(build(kind, tmp_path / "a", []), {})
    assert index.n_rows == 0
    assert len(index.search(["moon"], 5)[0].rows) == 0
    assert len(index.search(["moon"], 5, np.array([1]))[0].rows) == 0
    index = kind.open(build(kind, tmp_path / "b", ["", "?"], 0, tmp_path / "a"), {})
    assert index.n_rows == 2
    assert len(index.search(["moon"], 5)[0].rows) == 0
    index = kind.open(build(kind, tmp_path / "c", ["moon"], 2, tmp_path / "b"), {})
    assert index.search(["moon"], 5)[0].rows.tolist() == [2]


@KINDS
def test_the_base_is_never_touched(kind, tmp_path: Path):
    """Adding merges segments and dropping deletes; what the base holds stays, byte by byte, and open readers go on."""
    base, texts, last = None, {}, 0
    for step in range(12):
        directory = tmp_path / str(step)
        drop = [row for row in texts if row % 7 == step]
        new = TEXTS * (1 + step % 3)
        before = hashes(base) if base else {}
        reader = kind.open(base, {}) if base else None
        expected = reader.search(["moon sun"], 1000)[0] if reader else None
        build(kind, directory, new, last, base, drop)
        if base and reader and expected:
            assert hashes(base) == before
            assert reader.search(["moon sun"], 1000)[0].rows.tolist() == expected.rows.tolist()
            reader.close()
        texts = {row: text for row, text in texts.items() if row not in drop} | dict(enumerate(new, last))
        last += len(new)
        base = directory
        index = kind.open(base, {})
        assert index.n_rows == len(texts)
        assert set(index.search(["moon sun"], 10_000)[0].rows.tolist()) == matching(texts, "moon sun")
        assert len(hashes(base)) < 60, "files of merged segments are gone"


@KINDS
def test_dropping_everything(kind, tmp_path: Path):
    build(kind, tmp_path / "a", TEXTS)
    index = kind.open(build(kind, tmp_path / "b", [], 0, tmp_path / "a", range(len(TEXTS))), {})
    assert index.n_rows == 0
    assert len(index.search(["moon"], 5)[0].rows) == 0


@KINDS
def test_files_are_copied_where_links_do_not_work(kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    build(kind, tmp_path / "a", TEXTS)
    monkeypatch.setattr(os, "link", refuse)
    index = kind.open(build(kind, tmp_path / "b", TEXTS, 100, tmp_path / "a"), {})
    assert index.search(["moon"], 10)[0].rows.tolist()[0] == 8
    assert all(file.stat().st_nlink == 1 for file in (tmp_path / "b").iterdir())


@KINDS
def test_a_killed_writer_harms_nothing(kind, tmp_path: Path):
    base = build(kind, tmp_path / "base", TEXTS * 20)
    before = hashes(base)
    script = textwrap.dedent(f"""
        import sys
        from pathlib import Path
        import numpy as np
        from nanochat.retrieval.document import Batch
        from {kind.__module__} import {kind.__name__} as Kind, __dict__ as names
        names["RUN_POSTINGS"] = 2000
        def batches():
            for start in range(1000, 10**9, 500):
                print(start, flush=True)
                yield Batch(np.arange(start, start + 500), ["moon and sun and stars"] * 500)
        Kind.write(Path(sys.argv[1]), {{"heap_bytes": 15_000_000}}, batches(), Path(sys.argv[2]), np.array([1, 2]))
    """)
    for i, stop in enumerate((1000, 3000, 9000)):
        command = [sys.executable, "-c", script, str(tmp_path / f"new{i}"), str(base)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout
            for line in writer.stdout:
                if int(line) >= stop:
                    time.sleep(0.01 * i)
                    break
            writer.send_signal(signal.SIGKILL)
        assert hashes(base) == before
    index = kind.open(build(kind, tmp_path / "after", ["moon"], 1000, base), {})
    assert index.n_rows == len(TEXTS) * 20 + 1


@KINDS
def test_wrong_calls(kind, tmp_path: Path):
    build(kind, tmp_path / "a", TEXTS)
    with pytest.raises(UsageError, match="exists"):
        build(kind, tmp_path / "a", TEXTS)
    for directory in (tmp_path / "missing", tmp_path):
        with pytest.raises(NanochatError, match=f"no index at {directory}"):
            kind.open(directory, {})
        with pytest.raises(NanochatError, match=f"no index at {directory}"):
            build(kind, tmp_path / "b", TEXTS, 100, directory)
    index = kind.open(tmp_path / "a", {})
    with pytest.raises(UsageError, match="list of queries"):
        index.search("moon", 3)
    index.close()
    with pytest.raises(UsageError, match="closed"):
        index.search(["moon"], 3)


@KINDS
def test_another_kind_or_format_is_no_index_of_ours(kind, tmp_path: Path):
    build(kind, tmp_path / "a", TEXTS)
    header = tmp_path / "a" / "index.json"
    good = header.read_text()
    for old, new in (('"format": 1', '"format": 2'), (f'"{kind.kind}"', '"dense"')):
        header.write_text(good.replace(old, new))
        with pytest.raises(NanochatError, match="build the index anew"):
            kind.open(tmp_path / "a", {})
    for bad in ("", "{}", "[]", good[:-5], good.replace("english", "klingon")):
        header.write_text(bad)
        with pytest.raises(NanochatError, match=r"no index at .*index\.json"):
            kind.open(tmp_path / "a", {})


@KINDS
def test_an_error_while_reading_documents_comes_through(kind, tmp_path: Path):
    def batches():
        yield Batch(np.arange(2), ["moon", "sun"])
        raise NanochatError("documents.jsonl line 3 is no JSON")

    with pytest.raises(NanochatError, match="line 3"):
        kind.write(tmp_path / "a", {}, batches())


@KINDS
def test_threads_share_an_index(kind, tmp_path: Path):
    index = kind.open(build(kind, tmp_path / "a", TEXTS * 100), {})
    expected = index.search(["moon sun"], 50)[0]
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: index.search(["moon sun"], 50)[0], range(60)):
            assert found.rows.tolist() == expected.rows.tolist()


@KINDS
@settings(max_examples=25, deadline=None)
@given(texts=st.lists(TEXT, max_size=12), queries=st.lists(TEXT, min_size=1, max_size=4), k=st.integers(1, 15))
def test_any_text(kind, tmp_path_factory: pytest.TempPathFactory, texts: list[str], queries: list[str], k: int):
    index = kind.open(build(kind, tmp_path_factory.mktemp("any") / "a", texts), {})
    allowed = np.arange(0, len(texts), 2)
    for query in queries:
        expected = matching(dict(enumerate(texts)), query)
        everything = index.search([query], 100)[0]
        assert set(everything.rows.tolist()) == expected
        assert (everything.scores > 0).all()
        assert index.search([query], k)[0].rows.tolist() == everything.rows[:k].tolist()
        kept = np.isin(everything.rows, allowed)
        assert index.search([query], k, allowed)[0].rows.tolist() == everything.rows[kept][:k].tolist()
