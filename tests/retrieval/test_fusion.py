"""Fusion: against a plain dictionary, symmetric, bounded, and scores stay with their documents."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.errors import NanochatError, UsageError
from nanochat.retrieval.document import Document, Found, Hit
from nanochat.retrieval.fusion import NORMALIZATIONS, normalize, rrf, unit_scores, weighted

score = st.floats(-(2.0**99), 2.0**99, width=32)
found = st.dictionaries(st.integers(0, 30), score, max_size=12).map(
    lambda d: Found(
        np.array(sorted(d, key=lambda row: (-d[row], row)), np.int64),
        np.array(sorted(d.values(), reverse=True), np.float32),
    )
)
several = st.lists(found, min_size=1, max_size=4)
kinds = st.sampled_from(NORMALIZATIONS)


def rows_of(fused: Found) -> dict[int, float]:
    return dict(zip(fused.rows.tolist(), fused.scores.tolist()))


def assert_sorted(fused: Found, k: int) -> None:
    assert len(fused.rows) == len(fused.scores) <= k
    assert fused.rows.dtype == np.int64
    assert fused.scores.dtype == np.float32
    pairs = list(zip((-fused.scores).tolist(), fused.rows.tolist()))
    assert pairs == sorted(set(pairs))


@given(several, st.integers(1, 40), st.floats(0, 100))
def test_rrf_is_the_formula(founds, k, constant):
    expected: dict[int, list[float]] = {}
    for one in founds:
        for rank, row in enumerate(one.rows.tolist(), 1):
            expected.setdefault(row, []).append(1 / (constant + rank))
    fused = rrf(founds, k, constant)
    assert_sorted(fused, k)
    assert len(fused.rows) == min(k, len(expected))
    for row, value in rows_of(fused).items():
        assert value == pytest.approx(math.fsum(expected[row]), rel=1e-6)


@given(several, st.integers(1, 40), kinds, st.randoms(use_true_random=False))
def test_fusion_is_symmetric(founds, k, kind, random):
    weights = [random.random() + 0.1 for _ in founds]
    order = list(range(len(founds)))
    random.shuffle(order)
    turned = [founds[i] for i in order]
    for one, other in (
        (rrf(founds, k), rrf(turned, k)),
        (weighted(founds, None, k, kind), weighted(turned, None, k, kind)),
    ):
        assert one.rows.tolist() == other.rows.tolist()
        assert one.scores.tolist() == other.scores.tolist()
    heavy = weighted(founds, weights, 40, kind)
    same = weighted(turned, [weights[i] for i in order], 40, kind)
    assert rows_of(heavy) == pytest.approx(rows_of(same), abs=1e-6)


@given(several, kinds)
def test_weighted_stays_in_bounds_and_is_the_mean(founds, kind):
    fused = weighted(founds, None, 100, kind)
    assert_sorted(fused, 100)
    expected: dict[int, float] = {}
    for one in founds:
        for row, value in rows_of(normalize(one, kind)).items():
            expected[row] = expected.get(row, 0.0) + value / len(founds)
    assert rows_of(fused) == pytest.approx(expected, abs=1e-5)
    assert all(0 <= value <= 1.000001 for value in fused.scores)


@given(found, st.floats(0.5, 100), st.floats(-100, 100))
def test_minmax_ignores_scale_and_shift(one, scale, shift):
    small = Found(one.rows, (np.arange(len(one.rows))[::-1] ** 2).astype(np.float32))
    other = Found(small.rows, (small.scores * scale + shift).astype(np.float32))
    assert weighted([small], None, 50).scores == pytest.approx(weighted([other], None, 50).scores, abs=1e-3)


@given(st.lists(score, max_size=20), kinds)
def test_unit_scores_keep_the_order(scores, kind):
    x = np.array(scores, np.float32)
    unit = unit_scores(x, kind)
    assert unit.shape == x.shape
    assert ((unit >= 0) & (unit <= 1)).all()
    for i in range(len(x)):
        assert (unit[i] >= unit[x <= x[i]]).all()
        assert (unit[i] == unit[x == x[i]]).all()
    if len(x):
        assert unit[x.argmax()] == 1


@pytest.mark.parametrize("kind", NORMALIZATIONS)
@pytest.mark.parametrize("scores", [[3.0], [0.0], [-2.0], [0.5, 0.5], [1e300, -1e300], [5e-324, 1e-323], [-1.0, -2.0]])
def test_unit_scores_of_awkward_lists(kind, scores):
    unit = unit_scores(np.array(scores), kind)
    assert unit.max() == 1
    assert unit.min() >= 0
    if len(set(scores)) == 1:
        assert (unit == 1).all()


def test_a_lone_hit_and_equal_scores_count_in_full():
    lone = Found(np.array([7]), np.array([0.2], np.float32))
    equal = Found(np.array([3, 9]), np.array([4.0, 4.0], np.float32))
    assert rows_of(weighted([lone, equal], [1, 3], 5)) == pytest.approx({3: 0.75, 9: 0.75, 7: 0.25})


def test_a_repeated_row_counts_once_at_its_best_place():
    twice = Found(np.array([5, 1, 5]), np.array([3.0, 2.0, 1.0], np.float32))
    assert rows_of(rrf([twice], 5)) == pytest.approx({5: 1 / 61, 1: 1 / 62})
    assert rows_of(weighted([twice], None, 5)) == pytest.approx({5: 1.0, 1: 0.5})


def test_normalised_hits_keep_their_documents():
    hits = [Hit(str(i), 9.0 - i, i, Document(str(i), f"text {i}")) for i in range(1, 5)]
    scaled = normalize(hits)
    assert [(h.id, h.rank, h.document) for h in scaled] == [(h.id, h.rank, h.document) for h in hits]
    assert [h.score for h in scaled] == pytest.approx([1, 2 / 3, 1 / 3, 0])
    assert [h.score for h in normalize(hits, "rank")] == pytest.approx([1, 0.75, 0.5, 0.25])
    assert [h.score for h in normalize(hits, "max")] == pytest.approx([1, 7 / 8, 6 / 8, 5 / 8])


def test_nothing_found():
    assert rrf([], 5).rows.size == weighted([], None, 5).rows.size == rrf([Found.none()] * 2, 5).rows.size == 0
    assert normalize([]) == []
    assert normalize(Found.none()).scores.size == 0


@pytest.mark.parametrize("weights", [[1], [1, 2, 3], [0, 0], [-1, 2], [float("nan"), 1], [float("inf"), 1]])
def test_bad_weights(weights):
    with pytest.raises(UsageError, match="weights"):
        weighted([Found.none()] * 2, weights, 5)
    with pytest.raises(UsageError, match="weights"):
        rrf([Found.none()] * 2, 5, weights=weights)


def test_bad_scores_and_kinds():
    bad = Found(np.array([1, 2]), np.array([np.nan, 1], np.float32))
    with pytest.raises(NanochatError, match="finite"):
        weighted([bad], None, 5)
    with pytest.raises(UsageError, match="minmax"):
        normalize(bad, "softmax")
