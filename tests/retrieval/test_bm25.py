"""BM25 over tantivy against a plain float64 computation, and beside bm25s."""

import contextlib
import math
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from benchmarks.retrieval_data import zipf_documents, zipf_queries
from nanochat.errors import NanochatError, UsageError
from nanochat.retrieval import bm25
from nanochat.retrieval.analysis import Analyser
from nanochat.retrieval.bm25 import BM25Index
from nanochat.retrieval.document import Batch

pytest.importorskip("tantivy")
K1, B = 1.2, 0.75


def length_byte_to_length(byte: int) -> int:
    """Lucene's SmallFloat.byte4ToInt: lengths below 40 are exact, longer ones keep four bits."""
    if byte < 24:
        return byte
    low, shift = (byte - 24) & 7, ((byte - 24) >> 3) - 1
    return 24 + (low if shift < 0 else (low | 8) << shift)


LENGTHS = np.array([length_byte_to_length(byte) for byte in range(256)])


class Oracle:
    """BM25 in float64; `exact` does without rounding lengths."""

    def __init__(self, texts: list[str], exact: bool = False, analyser: Analyser | None = None) -> None:
        self.analyser = analyser or Analyser()
        counts = [Counter(self.analyser.terms(text)) for text in texts]
        self.n = len(texts)
        lengths = np.array([sum(count.values()) for count in counts], np.float64)
        rounded = lengths if exact else LENGTHS[np.searchsorted(LENGTHS, lengths, "right") - 1]
        self.norms = K1 * (1 - B + B * rounded / (lengths.mean() or 1))
        self.postings: dict[str, list[tuple[int, int]]] = {}
        for row, count in enumerate(counts):
            for term, times in count.items():
                self.postings.setdefault(term, []).append((row, times))

    def scores(self, query: str) -> np.ndarray:
        scores = np.zeros(self.n)
        for term, repeated in Counter(self.analyser.query_terms(query)).items():
            for row, times in self.postings.get(term, ()):
                found = len(self.postings[term])
                rarity = math.log(1 + (self.n - found + 0.5) / (found + 0.5))
                scores[row] += repeated * rarity * (K1 + 1) * times / (times + self.norms[row])
        return scores


@pytest.fixture(scope="module")
def zipf(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """3,000 documents of 1 to 300 words, in one directory of several segments and in unequal steps."""
    texts = list(zipf_documents(3000, seed=5))
    texts[::7] = [" ".join([a, b, *a.split(), a, a])[:1800] for a, b in zip(texts[::7], texts[1::7])]
    texts[::11] = [text[: 5 + i % 40] for i, text in enumerate(texts[::11])]
    texts[100:140] = ["bak bek bik"] * 40  # ties
    base, start = None, 0
    for i, end in enumerate((2000, 2900, 2901, 3000)):
        directory = tmp_path_factory.mktemp("zipf") / str(i)
        BM25Index.write(directory, {}, [Batch(np.arange(start, end), texts[start:end])], base)
        base, start = directory, end
    return texts, directory


def test_scores_equal_an_independent_bm25(zipf: tuple[list[str], Path]):
    texts, directory = zipf
    index, oracle = BM25Index.open(directory, {}), Oracle(texts)
    assert index.n_rows == 3000
    queries = zipf_queries(40, seed=2, words=3) + zipf_queries(40, seed=3, stop_words=True)
    queries += ["bak", "bak bak bek", "bik bek bak bik", texts[0], texts[14]]
    allowed = np.arange(0, 3000, 7)
    for query in queries:
        scores = oracle.scores(query)
        for k in (1, 10, 5000):
            check(index.search([query], k)[0], scores, np.arange(3000), k)
            check(index.search([query], k, allowed)[0], scores, allowed, k)


def check(found, scores: np.ndarray, allowed: np.ndarray, k: int) -> None:
    rows = found.rows.tolist()
    assert len(set(rows)) == len(rows)
    assert set(rows) <= set(allowed.tolist())
    np.testing.assert_allclose(found.scores, scores[rows], rtol=1e-5)
    best = np.sort(scores[allowed])[::-1]
    np.testing.assert_allclose(found.scores, best[: min(k, np.count_nonzero(best))], rtol=1e-5)
    order = list(zip((-found.scores).tolist(), rows))
    assert order == sorted(order), "best first; of equal scores the lower row first"


def test_of_equal_scores_the_lowest_rows_are_found(zipf: tuple[list[str], Path]):
    texts, directory = zipf
    index = BM25Index.open(directory, {})
    for query in ("bak bek bik", "bik bak", "bek"):
        scores = Oracle(texts).scores(query)
        expected = np.lexsort((np.arange(3000), -scores.round(5)))
        for k in (1, 3, 17, 39, 60):
            assert index.search([query], k)[0].rows.tolist() == expected[:k].tolist()


def test_filters_are_exact_either_way(zipf: tuple[list[str], Path], monkeypatch: pytest.MonkeyPatch):
    texts, directory = zipf
    index, oracle = BM25Index.open(directory, {}), Oracle(texts)
    chance = np.random.default_rng(0)
    for cost in (0, 1, 10**9):
        monkeypatch.setattr(bm25, "ROW_COST", cost)
        for n in (1, 5, 300, 2500, 3000):
            allowed = np.sort(chance.choice(3000, n, replace=False)).astype(np.int64)
            for query in zipf_queries(3, seed=n, words=2, stop_words=True):
                for k in (1, 10, 3000):
                    check(index.search([query], k, allowed)[0], oracle.scores(query), allowed, k)


@pytest.mark.parametrize("guess", [None, 0.0, 4.0, 1e9])
def test_common_terms_may_be_skipped_but_never_change_the_answer(
    zipf: tuple[list[str], Path], monkeypatch: pytest.MonkeyPatch, guess: float | None
):
    texts, directory = zipf
    index, oracle = BM25Index.open(directory, {}), Oracle(texts)
    monkeypatch.setattr(bm25, "RARE_COST", 0.0)
    if guess is not None:  # of what the last hit scores: wrong ones cost time, nothing else
        monkeypatch.setattr(index, "_likely_lowest", lambda numbers, limit: guess)
    answers = []
    search_rare = index._search_rare
    monkeypatch.setattr(index, "_search_rare", lambda *args: answers.append(search_rare(*args)) or answers[-1])
    queries = [*zipf_queries(60, seed=4, stop_words=True), "bak bak bek zuk", "bik bek bak bik"]
    for query in queries:
        for k in (1, 10, 200):
            check(index.search([query], k)[0], oracle.scores(query), np.arange(3000), k)
    taken = sum(one is not None for one in answers)
    assert len(answers) == 3 * len(queries)
    assert (taken == 0) if guess == 0.0 else (0 < taken < len(answers)), taken


def test_common_terms_are_judged_by_the_statistics_of_all_texts(
    zipf: tuple[list[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Dropped texts still count for tantivy: what a common term adds at most is more than the living ones tell."""
    _, base = zipf
    drop = np.flatnonzero(np.random.default_rng(1).random(3000) < 0.6)
    BM25Index.write(tmp_path / "less", {}, [], base, drop)
    index = BM25Index.open(tmp_path / "less", {})
    assert index.n_rows == 3000 - len(drop) < index._n_texts
    monkeypatch.setattr(bm25, "RARE_COST", 0.0)
    queries = zipf_queries(100, seed=6, stop_words=True)
    answers = index.search(queries, 10)
    monkeypatch.setattr(index, "_search_rare", lambda *_: None)
    for answer, expected in zip(answers, index.search(queries, 10)):
        assert answer.rows.tolist() == expected.rows.tolist()
        np.testing.assert_allclose(answer.scores, expected.scores, rtol=1e-5)


def test_rankings_agree_with_bm25s(tmp_path: Path):
    """Lengths are exact there, so scores differ by a few percent; a hit within 0.5% of the tenth counts as the same."""
    bm25s = pytest.importorskip("bm25s")
    texts = list(zipf_documents(3000, seed=5))
    analyser = Analyser()
    BM25Index.write(tmp_path / "a", {}, [Batch(np.arange(3000), texts)])
    index = BM25Index.open(tmp_path / "a", {})
    peer = bm25s.BM25(method="lucene", k1=K1, b=B)
    peer.index([analyser.terms(text) for text in texts], show_progress=False)
    shared = total = 0
    for query in zipf_queries(200, seed=9, words=3, stop_words=True):
        scores = peer.get_scores(analyser.query_terms(query))
        rows = index.search([query], 10)[0].rows
        shared += int(np.sum(scores[rows] >= np.sort(scores)[-10] * (1 - 0.005)))
        total += len(rows)
    assert shared / total >= 0.97


@pytest.mark.parametrize(
    "query",
    ["bak +bek", "bak^2 bek", '"bak bek', "(bak -bek", "bak~ [bek", "bak* \\ bek?", "{bak: bek}", "\ud800bak bek"],
)
def test_no_query_is_a_syntax_error(zipf: tuple[list[str], Path], query: str):
    index = BM25Index.open(zipf[1], {})
    assert set(index.search(["bak bek"], 10)[0].rows) == set(index.search([query.replace("2", "")], 10)[0].rows)


def test_repeated_and_stop_words(tmp_path: Path):
    texts = ["The Who played", "who knows", "the moon", "Moon base", ""]
    BM25Index.write(tmp_path / "a", {}, [Batch(np.arange(5), texts)])
    index = BM25Index.open(tmp_path / "a", {})
    found = index.search(["the who", "the moon", "of", "", "zzz", "the zzz"], 5)
    assert [result.rows.tolist() for result in found] == [[0, 1, 2], [2, 3], [], [], [], []]


def test_a_directory_that_may_not_be_written_can_be_read(zipf: tuple[list[str], Path], monkeypatch: pytest.MonkeyPatch):
    """As on a read-only mount, where tantivy cannot make its lock file."""
    import tantivy

    directory, real = zipf[1], tantivy.Index.open

    class ReadOnly:
        @staticmethod
        def open(path: str):
            if path == str(directory):
                raise ValueError("Failed to acquire Lockfile: LockError")
            return real(path)

    monkeypatch.setattr(tantivy, "Index", ReadOnly)
    monkeypatch.setattr(os, "access", lambda *_: False)
    index = BM25Index.open(directory, {})
    assert len(index.search(["bak bek"], 10)[0].rows) == 10


def test_damage_gives_no_other_error_than_ours(tmp_path: Path):
    BM25Index.write(tmp_path / "a", {}, [Batch(np.arange(200), list(zipf_documents(200)))])
    for file in sorted((tmp_path / "a").iterdir()):
        whole = file.read_bytes()
        if file.name.endswith(("lock", ".managed.json")) or not whole:
            continue
        for damage in (None, b"", whole[: len(whole) // 2], b"\xff" * len(whole)):
            file.unlink(missing_ok=True)
            if damage is not None:
                file.write_bytes(damage)
            with contextlib.suppress(NanochatError):  # any other error fails, panics included
                BM25Index.open(tmp_path / "a", {}).search(["bak bek", "zagik"], 10)
        file.unlink(missing_ok=True)
        file.write_bytes(whole)
    assert len(BM25Index.open(tmp_path / "a", {}).search(["bak"], 10)[0].rows) == 10


def test_another_analyser_is_refused(tmp_path: Path):
    BM25Index.write(tmp_path / "a", {"analyser": "french"}, [Batch(np.arange(1), ["les maisons"])])
    assert BM25Index.open(tmp_path / "a", {}).search(["la maison"], 3)[0].rows.tolist() == [0]
    assert BM25Index.open(tmp_path / "a", {"analyser": {"language": "french"}}).n_rows == 1
    with pytest.raises(UsageError, match="french"):
        BM25Index.open(tmp_path / "a", {"analyser": "english"})
    with pytest.raises(UsageError, match="french"):
        BM25Index.write(tmp_path / "b", {"analyser": "english"}, [], tmp_path / "a")
