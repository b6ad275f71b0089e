"""Evaluation: the figures of the metrics, over any searcher; latency and memory that were measured."""

import json

import pytest

from nanochat.errors import NanochatError, UsageError
from nanochat.retrieval import evaluate as module
from nanochat.retrieval.document import Document, Hit
from nanochat.retrieval.evaluate import evaluate, latencies, peak_memory_mb
from nanochat.retrieval.metrics import per_query

ANSWERS = {"first": ["a", "b", "c"], "second": ["c", "a"], "third": []}
QUERIES = {"1": "first", "2": "second", "3": "third", "4": "unjudged"}
QRELS = {"1": {"b": 1}, "2": {"c": 2, "b": 1}, "3": {"a": 1}}


class Searcher:
    def __init__(self):
        self.asked = []

    def search(self, queries, k=5):
        self.asked.append((queries, k))
        return [Hit(name, 1.0, i, Document(name, "")) for i, name in enumerate(ANSWERS[queries][:k], 1)]


def test_figures_are_the_metrics():
    searcher = Searcher()
    found = evaluate(searcher, QUERIES, QRELS, metrics=["recall@1", "ndcg@3", "mrr"])
    run = {query: ANSWERS[QUERIES[query]] for query in QRELS}
    assert found.run == run
    assert found.per_query == per_query(QRELS, run, ["recall@1", "ndcg@3", "mrr"])
    assert found.metrics["mrr"].value == pytest.approx((0.5 + 1 + 0) / 3)
    assert (found.n_queries, found.n_empty) == (3, 1)
    assert searcher.asked == [("first", 100), *((QUERIES[query], 100) for query in QRELS)]
    assert evaluate(searcher.search, QUERIES, QRELS, metrics=["recall@2"]).run["1"] == ["a", "b"]


def test_passages_count_as_their_document():
    def search(query, k):
        return [Hit(name, 1.0, i, Document(name, "", span=(i, i + 1))) for i, name in enumerate("aab", 1)]

    found = evaluate(search, {"1": "x"}, {"1": {"b": 1}}, metrics=["mrr"])
    assert found.run == {"1": ["a", "b"]}
    assert found.metrics["mrr"].value == 0.5


def test_latency_percentiles():
    found = latencies([i / 1000 for i in range(1, 101)])
    assert found == pytest.approx({"p50": 50, "p90": 90, "p99": 99, "mean": 50.5})
    assert latencies([0.002]) == pytest.approx({"p50": 2, "p90": 2, "p99": 2, "mean": 2})


def test_record_and_table():
    found = evaluate(Searcher(), QUERIES, QRELS)
    record = json.loads(json.dumps(found.record(), allow_nan=False))
    assert record["metrics"]["recall@5"]["n"] == record["queries"] == 3
    assert record["metrics"]["recall@5"]["low"] <= record["metrics"]["recall@5"]["value"]
    assert set(record["latency_ms"]) == {"p50", "p90", "p99", "mean"}
    assert record["queries_per_s"] > 0
    table = found.table()
    for part in ("all_gold@10", "latency in ms: p50", "queries/s", "peak memory", "1 of 3 queries found nothing"):
        assert part in table
    assert f"{found.metrics['mrr'].value:.4f}" in table


@pytest.mark.parametrize(
    ("queries", "qrels", "says"),
    [
        ({"001": "first"}, {"1": {"b": 1}}, r"none of the 1 queries has .* \['001'\]…, the judged ones \['1'\]"),
        ({"1": "first"}, {}, "none of the 1 queries"),
        ({"1": "first"}, {"1": {"b": 1}, "9": {"b": 1}}, "1 judged queries are not among the queries, such as '9'"),
    ],
)
def test_queries_and_judgements_that_do_not_belong_together(queries, qrels, says):
    with pytest.raises(NanochatError, match=says):
        evaluate(Searcher(), queries, qrels)


def test_bad_metrics():
    with pytest.raises(UsageError, match="no metric"):
        evaluate(Searcher(), QUERIES, QRELS, metrics=[])
    with pytest.raises(UsageError, match="unknown metric"):
        evaluate(Searcher(), QUERIES, QRELS, metrics=["f1@3"])


def test_memory_is_seen():
    before = peak_memory_mb()
    if before is None:
        pytest.skip("this system does not tell")
    block = bytearray(64 << 20)
    block[::4096] = b"x" * len(block[::4096])
    assert peak_memory_mb() > before or peak_memory_mb() > 64
    del block


def test_where_no_system_tells(monkeypatch):
    class Nowhere:
        def __init__(self, *parts): ...

        def read_text(self):
            raise FileNotFoundError

        def write_text(self, text):
            raise PermissionError

    monkeypatch.setattr(module, "Path", Nowhere)
    found = evaluate(Searcher(), QUERIES, QRELS)
    assert found.peak_memory_mb is None or found.peak_memory_mb > 1
