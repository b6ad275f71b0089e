"""TF-IDF in numpy against a plain float64 computation of SMART's lnc.ltc."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from nanochat.errors import NanochatError, UsageError
from nanochat.retrieval import simple
from nanochat.retrieval.analysis import Analyser
from nanochat.retrieval.document import Batch
from nanochat.retrieval.simple import SimpleIndex

WORDS = ["moon", "star", "rocket", "wing", "orbit", "comet", "engine", "crater", "dust", "tide"]


def texts(n: int, seed: int = 0) -> list[str]:
    chance = np.random.default_rng(seed)
    return [" ".join(chance.choice(WORDS, size=chance.integers(0, 12))) for _ in range(n)]


def batch(documents: dict[int, str]) -> Batch:
    return Batch(np.array(sorted(documents), np.int64), [documents[row] for row in sorted(documents)])


def oracle(documents: dict[int, str], query: str, n: int | None = None) -> dict[int, float]:
    """Row -> cosine of lnc.ltc vectors, for the rows that share a word with the query."""
    analyser = Analyser()
    counts = {row: Counter(analyser.terms(text)) for row, text in documents.items()}
    found = Counter(term for terms in counts.values() for term in terms)
    asked = {
        term: (1 + math.log(times)) * math.log(1 + len(documents) / found[term])
        for term, times in Counter(analyser.query_terms(query)).items()
        if term in found
    }
    length = math.sqrt(sum(weight**2 for weight in asked.values()))
    scores = {}
    for row, terms in counts.items():
        weights = {term: 1 + math.log(times) for term, times in terms.items()}
        norm = math.sqrt(sum(weight**2 for weight in weights.values()))
        if asked.keys() & terms.keys():
            scores[row] = sum(asked[t] * weights.get(t, 0) for t in asked) / length / norm
    return scores


def check(index: SimpleIndex, documents: dict[int, str], query: str, k: int, allowed: np.ndarray | None = None) -> None:
    scores = oracle(documents, query)
    if allowed is not None:
        scores = {row: score for row, score in scores.items() if row in set(allowed.tolist())}
    found = index.search([query], k, allowed)[0]
    assert found.rows.dtype == np.int64
    assert found.scores.dtype == np.float32
    np.testing.assert_allclose(found.scores, [scores[row] for row in found.rows.tolist()], rtol=1e-5)
    assert len(found.rows) == len(set(found.rows.tolist())) == min(k, len(scores))
    np.testing.assert_allclose(found.scores, sorted(scores.values(), reverse=True)[:k], rtol=1e-5)
    order = list(zip((-found.scores).tolist(), found.rows.tolist()))
    assert order == sorted(order), "best first; of equal scores the lower row first"


@pytest.mark.parametrize("run", [40, 300, 10**6])
def test_scores_and_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: int):
    monkeypatch.setattr(simple, "RUN_POSTINGS", run)  # many segments, merged in every way, or one
    monkeypatch.setattr(simple, "MERGE_POSTINGS", 100)
    documents = dict(zip(range(5, 1000, 3), texts(400)))
    rows = sorted(documents)
    parts = [batch({row: documents[row] for row in rows[i : i + 7]}) for i in range(0, len(rows), 7)]
    SimpleIndex.write(tmp_path / "a", {}, parts)
    index = SimpleIndex.open(tmp_path / "a", {})
    assert index.n_rows == len(documents)
    some = np.array(rows[::4], np.int64)
    for query in ("moon", "moon moon rocket", "comet dust unknownword tide", "the moon", *texts(10, seed=1)):
        for k in (1, 7, 50, 10_000):
            check(index, documents, query, k)
            check(index, documents, query, k, some)
            check(index, documents, query, k, np.array([1, 5, 6, 8, 11, 2000]))


def test_adding_and_dropping_equals_building_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(simple, "RUN_POSTINGS", 200)
    monkeypatch.setattr(simple, "MERGE_POSTINGS", 150)
    chance = np.random.default_rng(3)
    documents: dict[int, str] = {}
    base, last = None, -1
    for step in range(25):
        new = dict(enumerate(texts(int(chance.integers(0, 60)), seed=step), last + 1))
        last += len(new)
        gone = [row for row in documents if step % 3 == 2 and chance.random() < 0.1]
        if step == 17:
            gone = list(documents)
        documents = {row: text for row, text in documents.items() if row not in gone} | new
        target = tmp_path / str(step)
        SimpleIndex.write(target, {}, [batch(new)] if new else [], base, np.array(gone, np.int64))
        base = target
        index = SimpleIndex.open(target, {})
        assert index.n_rows == len(documents)
        for query in ("moon", "wing orbit engine", "dust"):
            check(index, documents, query, 10)
            check(index, documents, query, 10_000)
        assert len(index._segments) <= 6


def test_segments_stay_few_while_documents_come_one_by_one(tmp_path: Path):
    base = None
    for row, text in enumerate(texts(40)):
        SimpleIndex.write(tmp_path / str(row), {}, [batch({row: text})], base)
        base = tmp_path / str(row)
    index = SimpleIndex.open(base, {})
    assert len(index._segments) <= 1 + math.log(40, 4)
    check(index, dict(enumerate(texts(40))), "moon dust", 10)


def test_a_truncated_or_foreign_file_is_named(tmp_path: Path):
    SimpleIndex.write(tmp_path / "a", {}, [batch(dict(enumerate(texts(50))))])
    for part in ("keys", "starts", "docs", "weights", "rows"):
        file = tmp_path / "a" / f"0.{part}.npy"
        whole = file.read_bytes()
        for damage in (whole[:-8], whole[:20], b"", b"PK\x03\x04" + whole[4:]):
            file.unlink()
            file.write_bytes(damage)
            with pytest.raises(NanochatError, match="damaged"):
                SimpleIndex.open(tmp_path / "a", {})
        file.unlink()
        with pytest.raises(NanochatError, match=f"0.{part}.npy"):
            SimpleIndex.open(tmp_path / "a", {})
        file.write_bytes(whole)


def test_no_tantivy_is_needed_in_english(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "tantivy", None)
    SimpleIndex.write(tmp_path / "a", {"analyser": {"language": "none"}}, [batch({0: "Moon"})])
    SimpleIndex.write(tmp_path / "b", {}, [batch({0: "The Moons"})])
    assert SimpleIndex.open(tmp_path / "b", {}).search(["a moon"], 1)[0].rows.tolist() == [0]
    with pytest.raises(UsageError, match=r"pip install 'nanochat\[rag\]'"):
        SimpleIndex.write(tmp_path / "c", {"analyser": "finnish"}, [batch({0: "Kuu"})])
