"""Metrics: equal to trec_eval (through ir-measures) on random runs, and intervals that hold what they promise."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.errors import NanochatError, UsageError
from nanochat.intervals import Z95
from nanochat.retrieval import metrics

documents = st.sampled_from([*"abcdefghijklmnop", "é", "zz", "10", "9"])
qrels = st.dictionaries(
    st.sampled_from(["q1", "q2", "q3", "q10"]),
    st.dictionaries(documents, st.integers(0, 4), min_size=1, max_size=8),
    min_size=1,
)
few_scores = st.sampled_from([0.0, -1.5, 1.0, 2.0, 0.1, 16777216.0, 16777217.0])  # ties, also only as float32
runs = st.dictionaries(
    st.sampled_from(["q1", "q2", "q3", "q10", "unjudged"]),
    st.dictionaries(documents, few_scores | st.floats(-10, 10), max_size=12),
)


@settings(deadline=None, max_examples=150)
@given(qrels, runs)
def test_equal_to_trec_eval(judged, run):
    ir_measures = pytest.importorskip("ir_measures")
    names = {}
    for k in (1, 2, 5, 10, 100):
        names |= {f"ndcg@{k}": f"nDCG@{k}", f"recall@{k}": f"R@{k}", f"precision@{k}": f"P@{k}"}
        names |= {f"any_gold@{k}": f"Success@{k}"}
    names |= {"mrr": "RR", "ndcg": "nDCG"}
    theirs = ir_measures.calc([ir_measures.parse_measure(name) for name in names.values()], judged, run)
    per_query = metrics.per_query(judged, run, names)
    for found in theirs.per_query:
        ours = per_query[next(n for n, name in names.items() if name == str(found.measure))]
        assert ours[found.query_id] == pytest.approx(found.value, abs=1e-9), (found, judged, run)
    measured = metrics.measure(judged, run, names)
    for name, theirs_name in names.items():
        assert measured[name].value == pytest.approx(theirs.aggregated[ir_measures.parse_measure(theirs_name)])


@given(qrels, runs, st.integers(1, 12))
def test_all_gold_is_recall_of_one(judged, run, k):
    values = metrics.per_query(judged, run, [f"all_gold@{k}", f"recall@{k}", f"any_gold@{k}"])
    for query in judged:
        every, share, one = (values[name][query] for name in values)
        assert every == (share == 1)
        assert one == (share > 0)


def test_by_hand():
    grades = {"a": 3, "b": 1, "c": 0, "d": 2, "gone": -1}
    ranking = ["x", "a", "gone", "c", "b"]
    assert metrics.recall(ranking, grades, 2) == pytest.approx(1 / 3)
    assert metrics.precision(ranking, grades, 10) == pytest.approx(0.2)
    assert metrics.reciprocal_rank(ranking, grades, 5) == 0.5
    assert metrics.reciprocal_rank(ranking, grades, 1) == 0
    gained = 3 / math.log2(3) + 1 / math.log2(6)
    assert metrics.ndcg(ranking, grades, 5) == pytest.approx(gained / (3 + 2 / math.log2(3) + 1 / 2))
    assert metrics.all_gold(["d", "b", "a"], grades, 3) == 1
    assert metrics.all_gold(["d", "b", "a"], grades, 2) == 0


def test_a_ranking_without_scores_keeps_its_order_and_counts_a_document_once():
    assert metrics.ranked(["b", "a", "b"]) == ["b", "a"]
    assert metrics.ranked({"b": 1.0, "a": 2.0, "c": 1.0}) == ["a", "c", "b"]
    assert metrics.ranked({"b": 16777216.0, "c": 16777217.0, "a": 16777216.0}) == ["c", "b", "a"]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("ndgc@10", "did you mean ndcg"),
        ("recall", "recall@10"),
        ("recall@0", "whole number"),
        ("recall@-1", "whole number"),
        ("recall@x", "whole number"),
        ("mrr@", "whole number"),
        ("recall@²", "whole number"),
    ],
)
def test_bad_names(name, says):
    with pytest.raises(UsageError, match=says):
        metrics.parse(name)


def test_bad_runs():
    with pytest.raises(NanochatError, match="nothing to measure"):
        metrics.measure({}, {})
    with pytest.raises(NanochatError, match="'b' is not a number"):
        metrics.ranked({"a": 1.0, "b": float("nan")})


def test_wilson_where_all_are_equal():
    low = metrics.estimate([1.0] * 20).low
    assert 0.8 < low < 0.9
    assert metrics.estimate([1.0] * 20).high == 1
    none = metrics.estimate([0.0] * 20)
    assert (none.value, none.n, none.low) == (0, 20, 0)
    one = metrics.estimate([0.3])
    assert (one.low, one.high) == (0.3, 0.3)
    from statistics import NormalDist

    assert pytest.approx(NormalDist().inv_cdf(0.975)) == Z95


def test_intervals_cover_the_truth():
    random = np.random.default_rng(0)
    hits = 0
    for seed in range(200):
        sample = random.beta(0.4, 0.8, size=60)  # true mean 1/3
        interval = metrics.estimate(sample, seed)
        assert interval.low <= interval.value <= interval.high
        hits += interval.low <= 1 / 3 <= interval.high
    assert 178 <= hits <= 200  # 95% of 200, give or take four standard deviations


def test_pairing_sees_what_single_intervals_hide():
    random = np.random.default_rng(1)
    hard = {str(i): float(x) for i, x in enumerate(random.uniform(0, 0.8, 80))}
    better = {q: x + 0.05 + 0.02 * random.uniform() for q, x in hard.items()}
    assert metrics.estimate(list(hard.values())).high > metrics.estimate(list(better.values())).low
    assert metrics.difference(better, hard).low > 0.04
    with pytest.raises(UsageError, match="same queries"):
        metrics.difference(better, {"0": 1.0})
