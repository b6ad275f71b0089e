"""The retrieval benchmark on a few hundred documents: its data, its parts, its report, its peers' answers."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import retrieval, retrieval_parts, retrieval_peers

pytest.importorskip("tantivy")
pytest.importorskip("faiss")
DOCS = 300
CONFIG = {"docs": DOCS, "queries": 5, "vectors": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("retrieval")
    retrieval_parts.prepare(made, CONFIG, "prepare")
    return made


def test_prepared_data(folder: Path) -> None:
    n = DOCS + 2 * 30
    assert len(list(retrieval_parts.texts(folder, 0, 10**6))) == n
    vectors = np.fromfile(folder / "vectors.f32", np.float32).reshape(n, retrieval_parts.WIDTH)
    queries, truth = np.load(folder / "queries.npy"), np.load(folder / "truth.npy")
    exact = np.argsort(-(queries[retrieval_parts.WARM_UP :] @ vectors[:DOCS].T), axis=1)[:, : retrieval_parts.K]
    assert [set(row) for row in exact.tolist()] == [set(row) for row in truth.tolist()]


@pytest.mark.parametrize("kind", retrieval.KINDS)
def test_parts(folder: Path, kind: str) -> None:
    built = retrieval_parts.build(folder, CONFIG, kind)
    assert set(built) == {"build s", "cpu s", "build MB", "disk MB"}
    found = retrieval_parts.query(folder, CONFIG, kind)
    assert 0 < found["content p50"] <= found["content p99"]
    if kind == "dense":
        assert found["recall"] == 1
        assert [row["recall"] for row in found["settings"]] == [1] * 4
    else:
        assert len(found["top"]) == CONFIG["queries"]
        assert found["raw p50"] > 0
    changed = retrieval_parts.changes(folder, CONFIG, kind)
    assert set(changed) == {"add_1000_s", "update_1000_s", "delete_1000_s", "old_vs_newest"}


def test_embedder_hands_out_vectors_in_order(folder: Path) -> None:
    vectors = np.fromfile(folder / "vectors.f32", np.float32).reshape(-1, retrieval_parts.WIDTH)
    embedder = retrieval_parts.Prepared(folder, start=3)
    np.testing.assert_array_equal(np.concatenate([embedder.embed(["a"] * 2), embedder.embed(["b"] * 5)]), vectors[3:10])


def test_tantivy_alone_searches_the_same_words(folder: Path, tmp_path: Path) -> None:
    retrieval_peers.build(folder, CONFIG, "tantivy")
    theirs = retrieval_peers.query(folder, CONFIG, "tantivy")["top"]
    for name in ("texts.txt", "queries.json", "stop_words.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    retrieval_parts.build(tmp_path, CONFIG, "bm25")
    ours = retrieval_parts.query(tmp_path, CONFIG, "bm25")["top"]
    assert retrieval.overlap(ours, theirs) > 0.9


def test_run_in_processes_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    arguments = ["--docs", str(DOCS), "--queries", "3", "--peers", "--skip", "dense", "hybrid"]
    monkeypatch.setattr("sys.argv", ["retrieval", *arguments])
    retrieval.main()
    out = capsys.readouterr().out
    record = json.loads(out.splitlines()[-1])
    assert record["benchmark"] == "retrieval"
    assert [row["side"] for row in record["rows"]] == ["ours bm25"]
    assert record["ratios"]["bm25_add_1000_s"] > 0
    assert not list(tmp_path.iterdir())


def test_a_peer_that_is_missing_or_fails_is_left_out_with_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(part: str, _: Path) -> dict[str, float]:
        if part == "tantivy-build":
            raise RuntimeError("tantivy-build failed with 1")
        if part == "bm25s_numpy-query":
            raise RuntimeError("bm25s_numpy-query failed with 1")
        return {"build s": 2.0, "content p50": 3.0, "raw p50": 4.0}

    monkeypatch.setattr(retrieval, "run", run)
    monkeypatch.setattr(retrieval, "find_spec", lambda name: None if name == "lancedb" else name)
    args = SimpleNamespace(docs=DOCS, queries=3, peers=["lancedb", "tantivy", "bm25s"])
    results = retrieval.run_all(tmp_path, args, ["bm25"], changes=False)
    out = capsys.readouterr().out
    assert "no lancedb: not installed" in out
    assert "no tantivy: tantivy-build failed" in out
    ratios = {"bm25_p50_vs_bm25s": 1.0, "bm25_raw_p50_vs_bm25s": 1.0, "build_vs_bm25s": 1.0}
    assert retrieval.ratios(results) == ratios


def test_ratios_are_above_one_when_ours_is_faster() -> None:
    results = {
        "bm25-build": {"build s": 2.0},
        "bm25-query": {"content p50": 0.5, "raw p50": 4.0},
        "bm25s-build": {"build s": 8.0},
        "bm25s-query": {"content p50": 10.0, "raw p50": 12.0},
        "dense-query": {"recall": 0.97},
    }
    found = retrieval.ratios(results)
    assert found == {
        "bm25_p50_vs_bm25s": 20.0,
        "bm25_raw_p50_vs_bm25s": 3.0,
        "build_vs_bm25s": 4.0,
        "dense_recall_at_10": 0.97,
    }


def test_overlap() -> None:
    assert retrieval.overlap([["1", "2"], ["3"], []], [["2", "4"], ["3"], []]) == 0.75
