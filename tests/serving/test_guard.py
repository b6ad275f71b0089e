"""Keys, rates and paths in messages: the small parts that attacks meet first."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.engine.batching import Overloaded
from nanochat.errors import NanochatError, UsageError
from nanochat.serving import security
from nanochat.serving.errors import from_exception, without_paths
from nanochat.serving.metrics import Metrics
from nanochat.serving.security import Keys, Rate


def test_keys_have_names_that_do_not_tell_them():
    keys = Keys(["a" * 20, "b" * 20])
    one, two = keys.find("a" * 20), keys.find("b" * 20)
    assert one
    assert two
    assert one != two
    assert "aaa" not in one
    for wrong in ("", "a" * 19, "a" * 21, "\udcff", "é" * 20):
        assert keys.find(wrong) is None
    assert keys
    assert not Keys([])


def test_rates_refill():
    now = [0.0]
    rate = Rate(6, clock=lambda: now[0])
    assert [rate.take("a") > 0 for _ in range(8)] == [False] * 6 + [True] * 2
    assert rate.take("a") == pytest.approx(10)
    now[0] += 10
    assert rate.take("a") == 0
    assert rate.take("a") > 0
    assert rate.take("b") == 0
    now[0] += 1e6
    assert [rate.take("a") > 0 for _ in range(7)] == [False] * 6 + [True]  # no more than a minute's worth


@given(st.lists(st.floats(0, 30), min_size=1, max_size=60), st.integers(1, 100))
def test_rates_are_kept_whatever_the_moments(gaps, per_minute):
    now, taken = 0.0, 0
    rate = Rate(per_minute, clock=lambda: now)
    for gap in gaps:
        now += gap
        taken += rate.take("a") == 0
    assert taken <= per_minute * (1 + now / 60) + 1e-6


def test_strangers_cannot_fill_the_memory(monkeypatch):
    monkeypatch.setattr(security, "MAX_CLIENTS", 10)
    rate = Rate(5)
    for i in range(100):
        rate.take(str(i))
    assert len(rate._buckets) == 10
    unlimited = Rate(0)
    assert not any(unlimited.take("a") for _ in range(1000))


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("cannot read /home/x/kb/manifest.json: no", "cannot read manifest.json: no"),
        ("'/tmp/a' is damaged", "'a' is damaged"),
        ("C:\\Users\\me\\kb is not empty", "kb is not empty"),
        ("3/4 of 10/min and a/b stay", "3/4 of 10/min and a/b stay"),
    ],
)
def test_paths_leave_messages(message, shown):
    assert without_paths(message) == shown


def test_failures_become_answers():
    assert from_exception(UsageError("--mode dense: not here, in /srv/kb")).detail == "mode dense: not here, in kb"
    overloaded = from_exception(Overloaded("full", 2.2))
    assert (overloaded.status_code, overloaded.headers) == (429, {"Retry-After": "3"})
    for error in (NanochatError("disk /dev/sda full"), ZeroDivisionError("secret")):
        failure = from_exception(error)
        assert failure.status_code == 500
        assert "secret" not in str(failure.body)
        assert "sda" not in str(failure.body)


def test_metrics_hold_nothing_that_clients_chose(server):
    with server.client() as client:
        for path in ("/v1/models/<evil>", "/nowhere-else", "/v1/knowledge_bases/secret-name"):
            client.get(path)
        client.request("BREW", "/health")
        client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3})
        text = client.get("/metrics").text
    for word in ("evil", "nowhere", "secret", "BREW"):
        assert word not in text
    assert 'nanochat_http_requests_total{method="GET",route="/v1/models/{name:path}",status="404"} 1.0' in text
    assert 'nanochat_completion_tokens_total{model="tiny-sft"} 3.0' in text
    assert 'nanochat_scheduler_active{model="tiny-sft"}' in text
    assert 'nanochat_first_token_seconds_count{model="tiny-sft"} 1.0' in text


def test_models_without_figures_make_metrics_too():
    assert b"nanochat_uploads" in Metrics(dict).text()
