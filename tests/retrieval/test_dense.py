"""The dense index against float64 brute force over the stored float16 vectors, in every layout."""

import json
from hashlib import sha256

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanochat.errors import NanochatError, UsageError
from nanochat.retrieval.document import Batch

pytest.importorskip("faiss")

from nanochat.retrieval.dense import DenseIndex

D = 32
SMALL = {"scan_from": 200, "ivf_from": 2000}  # the layouts of large collections at the size of a test
quick = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def unit(n, seed=0, d=D, centres=40):
    rng = np.random.default_rng(seed)
    middle = rng.standard_normal((centres, d))
    vectors = middle[rng.integers(0, centres, n)] + 0.7 * rng.standard_normal((n, d))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def batches(rows, vectors, size=1000):
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        yield Batch(rows[part], [""] * len(rows[part]), vectors[part])


def write(path, rows, vectors, base=None, drop=None, **options):
    DenseIndex.write(path, {"dense": {**SMALL, **options}}, batches(np.asarray(rows), vectors), base, drop)
    return path


def brute(rows, vectors, query, k):
    """Rows and scores in float64, ties to the lower row."""
    scores = (vectors.astype(np.float16).astype(np.float64) @ query.astype(np.float64)).astype(np.float32)
    order = np.lexsort((rows, -scores))[:k]
    return rows[order], scores[order]


def assert_exact(index, rows, vectors, queries, k, allowed=None):
    mask = np.ones(len(rows), bool) if allowed is None else np.isin(rows, allowed)
    for query, found in zip(queries, index.search(queries, k, allowed)):
        expected, scores = brute(rows[mask], vectors[mask], query, k)
        np.testing.assert_array_equal(found.rows, expected)
        np.testing.assert_array_equal(found.scores, scores)
        assert found.rows.dtype == np.int64
        assert found.scores.dtype == np.float32


def recall(index, rows, vectors, queries, k=10, allowed=None):
    mask = np.ones(len(rows), bool) if allowed is None else np.isin(rows, allowed)
    hits = [
        len(np.intersect1d(found.rows, brute(rows[mask], vectors[mask], query, k)[0]))
        for query, found in zip(queries, index.search(queries, k, allowed))
    ]
    return sum(hits) / (k * len(queries))


def layouts(path):
    return [one["kind"] for one in json.loads((path / "dense.json").read_text())["segments"]]


def contents(path):
    return {file.name: sha256(file.read_bytes()).hexdigest() for file in path.iterdir()}


def test_flat_is_exact_with_ties_and_any_k(tmp_path):
    vectors = unit(150)
    vectors[30:60] = vectors[30]
    vectors[7] = 0
    rows = np.arange(150) * 3 + 5
    index = DenseIndex.open(write(tmp_path / "a", rows, vectors), {})
    for k in (1, 10, 40, 150, 1000):
        assert_exact(index, rows, vectors, np.concatenate([unit(5, 1), vectors[30:31]]), k)
    assert index.n_rows == 150


def test_many_equal_vectors_come_in_the_order_of_their_rows(tmp_path):
    vectors = np.repeat(unit(1), 5000, axis=0)
    index = DenseIndex.open(write(tmp_path / "a", np.arange(5000), vectors, scan_from=10_000), {})
    np.testing.assert_array_equal(index.search(vectors[:1], 7)[0].rows, np.arange(7))


@pytest.mark.parametrize(
    ("n", "options", "kind"),
    [
        (1999, {}, "scan"),
        (6000, {}, "ivf"),
        (6000, {"layout": "ivf-sq8"}, "ivf-sq8"),
        (2500, {"layout": "hnsw"}, "hnsw"),
    ],
)
def test_approximate_layouts_find_the_nearest_with_exact_scores(tmp_path, n, options, kind):
    vectors, rows, queries = unit(n), np.arange(n), unit(50, 0)[::-1] + 0.01
    path = write(tmp_path / "a", rows, vectors, **options)
    assert layouts(path) == [kind]
    index = DenseIndex.open(path, {"dense": {"probe": 60, "fetch": 100}})
    assert recall(index, rows, vectors, queries) >= 0.98
    found = index.search(queries[:1], 10)[0]
    expected = brute(rows, vectors, queries[0], n)
    scores = dict(zip(expected[0].tolist(), expected[1].tolist()))
    assert [scores[row] for row in found.rows.tolist()] == found.scores.tolist()
    single = [index.search(query[None], 10)[0] for query in queries[:6]]
    for one, several in zip(single, index.search(queries[:6], 10)):
        np.testing.assert_array_equal(one.rows, several.rows)


def test_more_visited_lists_find_more(tmp_path):
    vectors, rows, queries = unit(6000, d=64), np.arange(6000), unit(40, 5, 64)
    path = write(tmp_path / "a", rows, vectors)
    few, many = (
        recall(DenseIndex.open(path, {"dense": {"probe": probe}}), rows, vectors, queries) for probe in (1, 10_000)
    )
    assert few < many
    assert many >= 0.99


@pytest.mark.parametrize("layout", ["auto", "ivf-sq8", "hnsw"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 1.0])
def test_allowed_rows(tmp_path, layout, share):
    n = 3000
    vectors, rows, queries = unit(n), np.arange(n) * 2, unit(10, 3)
    index = DenseIndex.open(write(tmp_path / "a", rows, vectors, layout=layout), {"dense": {"probe": 30}})
    chosen = np.sort(np.random.default_rng(0).choice(rows, int(share * n), replace=False))
    allowed = np.union1d(chosen, chosen + 1)  # odd rows do not exist
    if share < 1:
        assert_exact(index, rows, vectors, queries, 10, allowed)  # few enough to be compared one by one
    else:
        assert recall(index, rows, vectors, queries, 10, allowed) >= 0.9
    assert set(index.search(queries[:1], n, allowed)[0].rows.tolist()) == set(chosen.tolist())


def test_allowed_rows_by_selector(tmp_path, monkeypatch):
    from nanochat.retrieval import segment

    monkeypatch.setattr(segment, "EXACT_BELOW", 0)
    n = 4000
    vectors, rows, queries = unit(n), np.arange(n), unit(20, 3)
    for name, options in {"ivf": {}, "sq8": {"layout": "ivf-sq8"}, "hnsw": {"layout": "hnsw"}}.items():
        path = write(tmp_path / name, rows, vectors, **options)
        index = DenseIndex.open(path, {"dense": {"probe": 20, "fetch": 100}})
        for step in (2, 5):
            allowed = rows[::step]
            assert all((found.rows % step == 0).all() for found in index.search(queries, 20, allowed))
            assert recall(index, rows, vectors, queries, 10, allowed) >= 0.95
    flat = DenseIndex.open(write(tmp_path / "flat", rows, vectors, scan_from=n + 1), {})
    assert_exact(flat, rows, vectors, queries, 20, rows[1::3])


def test_a_base_stays_as_it_is_and_is_shared(tmp_path):
    vectors, rows = unit(2600), np.arange(2600)
    base = write(tmp_path / "a", rows[:2500], vectors[:2500])
    before = contents(base)
    after = write(tmp_path / "b", rows[2500:], vectors[2500:], base, drop=rows[10:20])
    assert contents(base) == before
    assert layouts(after) == ["ivf", "flat"]
    shared = [name for name in before if (after / name).exists() and (after / name).samefile(base / name)]
    assert len(shared) == 3
    alive = np.delete(rows, np.s_[10:20])
    index = DenseIndex.open(after, {"dense": {"probe": 1000}})
    assert index.n_rows == 2590
    assert recall(index, alive, vectors[alive], unit(20, 9)) >= 0.99
    assert not np.isin(rows[10:20], index.search(vectors[10:20], 2590)[0].rows).any()
    assert DenseIndex.open(base, {}).n_rows == 2500


def test_an_index_that_is_shared_is_loaded_once(tmp_path, monkeypatch):
    vectors, rows = unit(2000), np.arange(2000)
    base = write(tmp_path / "a", rows, vectors)
    old = DenseIndex.open(base, {"dense": {"fetch": 20}})
    old.search(vectors[:1], 3)
    after = write(tmp_path / "b", [2000], unit(1, 5), base)
    monkeypatch.setattr("faiss.read_index", None)
    new = DenseIndex.open(after, {"dense": {"fetch": 20}})
    assert new.search(vectors[:1], 1)[0].rows.tolist() == [0]
    old.close()
    assert new.search(vectors[:1], 1)[0].rows.tolist() == [0]


def test_files_are_copied_where_links_are_refused(tmp_path, monkeypatch):
    from nanochat.retrieval import index_files

    def refuse(*_):
        raise OSError("no links here")

    base = write(tmp_path / "a", np.arange(300), unit(300))
    monkeypatch.setattr(index_files.os, "link", refuse)
    after = write(tmp_path / "b", np.arange(300, 310), unit(10, 2), base)
    assert DenseIndex.open(after, {}).n_rows == 310
    assert not (after / "000001.faiss").samefile(base / "000001.faiss")


def test_small_segments_are_merged(tmp_path):
    vectors, rows, base = unit(1600), np.arange(1600), None
    counts = []
    for i in range(20):
        part = slice(i * 80, i * 80 + 80)
        base = write(tmp_path / str(i), rows[part], vectors[part], base, drop=rows[i * 80 - 5 : i * 80] if i else None)
        counts.append(len(layouts(base)))
    assert max(counts) <= 6
    alive = rows[(rows % 80 < 75) | (rows >= 1520)]
    index = DenseIndex.open(base, {})
    assert index.n_rows == len(alive)
    assert_exact(index, alive, vectors[alive], unit(5, 4), 400)  # k so large that every segment is read


def test_a_segment_that_lost_a_quarter_is_written_anew(tmp_path):
    vectors, rows = unit(1000), np.arange(1000)
    base = write(tmp_path / "a", rows, vectors)
    after = write(tmp_path / "b", [], vectors[:0], base, drop=rows[::3])
    assert json.loads((after / "dense.json").read_text())["dropped"] == 0
    alive = rows[rows % 3 > 0]
    index = DenseIndex.open(after, {})
    assert_exact(index, alive, vectors[alive], unit(3, 4), 700)
    nothing = write(tmp_path / "c", [], vectors[:0], after, drop=rows)
    assert DenseIndex.open(nothing, {}).n_rows == 0
    assert sorted(contents(nothing)) == ["dense.json", "dropped.npy"]


def test_empty_single_and_zero(tmp_path):
    empty = DenseIndex.open(write(tmp_path / "a", [], unit(0)), {})
    assert empty.n_rows == 0
    assert [len(found.rows) for found in empty.search(unit(3), 5)] == [0, 0, 0]
    index = DenseIndex.open(write(tmp_path / "b", [4], unit(1), tmp_path / "a"), {})
    found = index.search(np.concatenate([unit(1), np.zeros((1, D), np.float32)]), 5)
    assert found[0].rows.tolist() == [4]
    assert found[0].scores[0] == pytest.approx(1, abs=1e-3)
    assert found[1].rows.tolist() == []  # a query of zeros: a text without any word
    assert index.search(np.zeros((0, D), np.float32), 5) == []


@quick
@given(data=st.data())
def test_any_history_answers_as_brute_force(tmp_path_factory, data):
    directory = tmp_path_factory.mktemp("kb")
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    rows, vectors, base, nxt = np.empty(0, np.int64), np.empty((0, 8), np.float32), None, 0
    for step in range(data.draw(st.integers(1, 6))):
        n = data.draw(st.integers(0, 30))
        fresh = nxt + np.cumsum(rng.integers(1, 4, n)) if n else np.empty(0, np.int64)
        new = np.round(rng.standard_normal((n, 8)), 1).astype(np.float32)  # coarse: ties happen
        drop = rng.choice(rows, min(len(rows), data.draw(st.integers(0, 10))), replace=False) if len(rows) else None
        target = directory / str(step)
        DenseIndex.write(target, {"dense": {"merge": 3}}, batches(fresh, new, 7), base, drop)
        kept = ~np.isin(rows, drop if drop is not None else [])
        rows, vectors = np.append(rows[kept], fresh), np.concatenate([vectors[kept], new])
        nxt, base = (int(fresh[-1]) + 1 if n else nxt), target
    index = DenseIndex.open(base, {})
    assert index.n_rows == len(rows)
    queries = np.round(rng.standard_normal((3, 8)), 1).astype(np.float32) + 0.05
    allowed = np.sort(rng.choice(nxt + 5, data.draw(st.integers(0, nxt)), replace=False)) if nxt else None
    k = data.draw(st.integers(1, 40))
    for restricted in (None, allowed):
        assert_exact(index, rows, vectors, queries, k, restricted)


def test_wrong_calls(tmp_path):
    path = write(tmp_path / "a", np.arange(5), unit(5))
    index = DenseIndex.open(path, {"dimension": D})
    with pytest.raises(UsageError, match=r"dimension 32.*another embedder"):
        index.search(unit(1, d=16), 3)
    with pytest.raises(UsageError, match="k = 0"):
        index.search(unit(1), 0)
    with pytest.raises(UsageError, match="not finite"):
        index.search(np.full((1, D), np.nan, np.float32), 3)
    with pytest.raises(UsageError, match="not 16"):
        DenseIndex.open(path, {"dimension": 16})
    with pytest.raises(UsageError, match=r"\(5, 16\).*\(5, 32\)"):
        write(tmp_path / "b", np.arange(5, 10), unit(5, d=16), path)
    with pytest.raises(UsageError, match="embedder"):
        DenseIndex.write(tmp_path / "c", {}, [Batch(np.arange(1), ["x"], None)])
    with pytest.raises(UsageError, match="row 1 "):
        write(tmp_path / "d", np.arange(2), np.array([[1, 0], [1e9, 0]], np.float32))
    with pytest.raises(UsageError, match="ascend"):
        write(tmp_path / "e", [3], unit(1), path)
    for options in ({"layout": "tree"}, {"colour": 1}, {"fetch": "many"}, {"merge": 1}):
        with pytest.raises(UsageError, match=f"{next(iter(options))}|tree"):
            DenseIndex.open(path, {"analyser": "of another index", "dense": options})


@pytest.mark.parametrize("name", ["000001.vectors.npy", "000001.rows.npy", "000001.faiss", "dense.json", "dropped.npy"])
def test_damaged_files_are_errors(tmp_path, name):
    path = write(tmp_path / "a", np.arange(300), unit(300))
    file = path / name
    data = file.read_bytes()
    file.write_bytes(data[:-1])
    with pytest.raises(NanochatError, match=name):
        DenseIndex.open(path, {}).search(unit(1), 5)
    file.unlink()
    with pytest.raises(NanochatError, match=name):
        DenseIndex.open(path, {})


def test_a_faiss_file_of_other_rows_is_an_error(tmp_path):
    a, b = write(tmp_path / "a", np.arange(1000), unit(1000)), write(tmp_path / "b", np.arange(1024), unit(1024))
    size = (a / "000001.faiss").stat().st_size
    (a / "000001.faiss").write_bytes((b / "000001.faiss").read_bytes()[:size].ljust(size, b"\0"))
    with pytest.raises(NanochatError, match="damaged"):
        DenseIndex.open(a, {"dense": {"fetch": 20}}).search(unit(1), 5)


def test_a_newer_format_is_refused(tmp_path):
    path = write(tmp_path / "a", np.arange(3), unit(3))
    values = json.loads((path / "dense.json").read_text())
    (path / "dense.json").write_text(json.dumps({**values, "format": 2}))
    with pytest.raises(UsageError, match="newer"):
        DenseIndex.open(path, {})


def test_a_full_disk_is_one_error(tmp_path, monkeypatch):
    from nanochat.retrieval.vector_file import ArrayWriter

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ArrayWriter, "append", full)
    with pytest.raises(NanochatError, match="No space left"):
        write(tmp_path / "a", np.arange(3), unit(3))


def test_arrays_are_plain_npy(tmp_path):
    vectors = unit(300)
    path = write(tmp_path / "a", np.arange(300), vectors)
    np.testing.assert_array_equal(np.load(path / "000001.rows.npy", allow_pickle=False), np.arange(300))
    np.testing.assert_array_equal(np.load(path / "000001.vectors.npy"), vectors.astype(np.float16))


def test_a_missing_or_old_faiss_is_named(tmp_path, monkeypatch):
    import sys

    from nanochat.retrieval.segment import import_faiss

    path = write(tmp_path / "a", np.arange(3000), unit(3000))
    import_faiss.cache_clear()
    with monkeypatch.context() as patch:
        patch.delattr("faiss.IndexIVFRaBitQFastScan")
        with pytest.raises(UsageError, match=r"1\.15.*nanochat\[rag\]"):
            DenseIndex.open(path, {}).search(unit(1), 5)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "faiss", None)
        with pytest.raises(UsageError, match=r"nanochat\[rag\]"):
            DenseIndex.open(path, {}).search(unit(1), 5)


def test_several_threads_search_at_once(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    vectors, rows = unit(3000), np.arange(3000)
    index = DenseIndex.open(write(tmp_path / "a", rows, vectors), {})
    queries = unit(40, 8)
    expected = [found.rows.tolist() for found in index.search(queries, 10)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda query: index.search(query[None], 10)[0].rows.tolist(), queries))
    assert found == expected
    index.close()
