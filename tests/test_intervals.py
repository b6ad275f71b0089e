import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.errors import NanochatError
from nanochat.intervals import Z95, Metric, exact, mean, ratio, share, wilson


def wilson_by_roots(n_right, n, z=Z95):
    """Independent of the closed form: the shares p for which (right/n - p)^2 = z^2 p (1-p) / n, by bisection."""
    found = n_right / n

    def excess(p):
        return (found - p) ** 2 - z * z * p * (1 - p) / n

    def root(inside, outside):
        for _ in range(200):
            middle = (inside + outside) / 2
            if excess(middle) <= 0:
                inside = middle
            else:
                outside = middle
        return inside

    return root(found, 0.0), root(found, 1.0)


@settings(deadline=None)
@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_solves_the_score_equation(case):
    n_right, n = case
    low, high = wilson(n_right, n)
    expected_low, expected_high = wilson_by_roots(n_right, n)
    assert low == pytest.approx(expected_low, abs=1e-9)
    assert high == pytest.approx(expected_high, abs=1e-9)
    assert 0 <= low <= n_right / n <= high <= 1


def test_wilson_known_values():
    # Newcombe 1998, table I: 81/263, 15/148, 0/20, 1/29 (score method without continuity correction)
    for (r, n), expected in {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0.0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }.items():
        assert wilson(r, n) == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize(("right", "n"), [(0, 0), (-1, 3), (4, 3)])
def test_wilson_of_nothing_is_an_error(right, n):
    with pytest.raises(NanochatError, match="nothing to evaluate"):
        wilson(right, n)


@settings(deadline=None)
@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_is_symmetric(case):
    right, n = case
    low, high = wilson(right, n)
    assert wilson(n - right, n) == pytest.approx((1 - high, 1 - low), abs=1e-12)


def test_share_is_the_value_in_its_interval():
    metric = share(3, 4)
    assert metric.value == float(Fraction(3, 4))
    assert metric.n == 4
    assert metric.low < 0.75 < metric.high


def test_mean_interval_is_near_the_normal_one():
    values = np.random.default_rng(3).normal(5.0, 2.0, size=400)
    metric = mean(values.tolist())
    half = Z95 * values.std() / math.sqrt(len(values))
    assert metric.value == pytest.approx(values.mean())
    assert metric.low == pytest.approx(values.mean() - half, abs=0.25 * half)
    assert metric.high == pytest.approx(values.mean() + half, abs=0.25 * half)


def test_ratio_interval_covers_about_95_percent():
    random = np.random.default_rng(0)
    covered = 0
    for trial in range(100):
        below = random.integers(50, 150, size=60)
        above = random.poisson(below * 0.5)
        metric = ratio(above, below, seed=trial)
        covered += metric.low <= 0.5 <= metric.high
    assert covered >= 87  # binomial(100, 0.95): fewer happens once in 1,000 times; the bootstrap is a little narrow


def test_ratio_weights_rows_by_their_size():
    assert ratio([1, 9], [1, 3]).value == 2.5
    assert ratio([2, 4], [1, 2]) == Metric(2.0, 2, 2.0, 2.0)


def test_ratio_does_not_depend_on_the_call():
    above, below = list(range(1, 40)), [2.0] * 39
    assert ratio(above, below, 7) == ratio(above, below, 7)
    assert ratio(above, below, 7) != ratio(above, below, 8)


def test_ratio_in_chunks_keeps_every_resample():
    n = 5000  # 800 resamples at once
    metric = mean(np.random.default_rng(1).exponential(size=n).tolist())
    assert metric.low < metric.value < metric.high
    assert metric.high - metric.low == pytest.approx(2 * Z95 / math.sqrt(n), rel=0.2)


def test_ratio_survives_resamples_without_a_denominator():
    metric = ratio([1.0, 0.0, 0.0], [2.0, 0.0, 0.0])
    assert metric == Metric(0.5, 3, 0.5, 0.5)


def test_ratio_of_one_row_has_no_interval_and_of_none_is_an_error():
    assert ratio([3.0], [2.0]) == exact(1.5)
    with pytest.raises(NanochatError, match="nothing"):
        ratio([], [])
    with pytest.raises(NanochatError, match="nothing"):
        ratio([0.0], [0.0])
