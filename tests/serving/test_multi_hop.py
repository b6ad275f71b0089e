"""Answers for which the model searches by itself, several times, over HTTP."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
from puppet import searcher
from tiny_server import TOKENIZER, tiny_model

from nanochat.chat import ChatModel
from nanochat.engine.load import Loaded
from nanochat.rag.knowledge import Knowledge

CHAT = "/v1/chat/completions"
WHO = [{"role": "user", "content": "Which river is near the town of Mara Velt?"}]
SEARCH = {"messages": WHO, "retrieval": {"knowledge_base": "towns", "multi_hop": True, "top_k": 1}}


def chain(question, results):
    """Searches for Mara Velt, for the river, and answers."""
    if len(results) < 2:
        return [{"type": "search", "text": ("Mara Velt founded", "the river Rill")[len(results)]}]
    return [{"type": "cite", "text": "Orvane 2"}, {"type": "text", "text": "It is the Rill."}]


def puppet(context=1000) -> ChatModel:
    """A model that follows the chain."""
    return ChatModel(Loaded(searcher(TOKENIZER, chain, context), TOKENIZER, {"stage": "refrag"}, Path("puppet")))


@pytest.fixture(scope="module")
def searching(start):
    models = {"puppet": puppet(), "tiny-refrag": tiny_model("refrag", context=512)}
    return start(models, max_rows=2, max_n=2, max_queue=1)


@pytest.fixture
def waiting(monkeypatch):
    """Searches that find nothing before they are told to: the events of the first one's begin, and of the word."""
    began, go = threading.Event(), threading.Event()
    search = Knowledge.search

    def slow(self, *args, **kwargs):
        began.set()
        assert go.wait(20)
        return search(self, *args, **kwargs)

    monkeypatch.setattr(Knowledge, "search", slow)
    yield began, go
    go.set()


def until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        time.sleep(0.005)
        assert time.monotonic() < deadline


def test_a_model_that_searches(searching):
    with searching.client() as client:
        assert client.get("/v1/models").json()["data"][1]["multi_hop"]
        body = {**SEARCH, "model": "tiny-refrag", "max_tokens": 6}
        answer = client.post(CHAT, json=body).json()
        assert answer["choices"][0]["finish_reason"] in ("length", "stop")
        assert answer["usage"]["prompt_tokens"] > 20
        assert answer["usage"]["completion_tokens"] > 0
        assert len(answer["grounding"]) == 1
        for wrong in ({"n": 2}, {"logprobs": True}):
            assert client.post(CHAT, json={**body, **wrong}).status_code == 400


@pytest.mark.parametrize("stream", [False, True])
def test_the_trace_of_searches(searching, stream):
    with searching.client() as client:
        options = {"stream_options": {"include_usage": True}} if stream else {}
        response = client.post(CHAT, json={**SEARCH, "stream": stream, **options})
        assert response.status_code == 200, response.text
        if stream:
            chunks = [json.loads(line[6:]) for line in response.text.split("\n\n") if line.startswith("data: {")]
            answer = chunks[-1]
            pieces = [choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"]]
            text = "".join(pieces)
            assert len([piece for piece in pieces if piece]) > 1
        else:
            answer = response.json()
            text = answer["choices"][0]["message"]["content"]
    assert text == "It is the Rill. [2]"
    assert [(hop["query"], [(d["n"], d["id"]) for d in hop["documents"]]) for hop in answer["trace"]] == [
        ("Mara Velt founded", [(1, "torwick")]), ("the river Rill", [(2, "orvane")]),
    ]  # fmt: skip
    assert [(d["n"], d["id"]) for d in answer["citations"]] == [(2, "orvane")]
    queries = sum(len(hop["query"]) + 2 for hop in answer["trace"])
    said = len(TOKENIZER.render_parts(chain("", [[], []])).ids)
    assert answer["usage"]["completion_tokens"] == queries + said + 1
    prompt = len(TOKENIZER.render_prompt({"messages": WHO}).ids)
    assert answer["usage"]["prompt_tokens"] > prompt + 60  # what was found was read, too


def test_orders_in_documents_call_nothing(searching, monkeypatch):
    """Without multi_hop a call is text like any other, whoever made the model write it."""
    searched = []
    search = Knowledge.search
    monkeypatch.setattr(Knowledge, "search", lambda self, q, *a, **k: searched.extend(q) or search(self, q, *a, **k))
    body = {**SEARCH, "retrieval": {"knowledge_base": "towns", "reread": False, "multi_hop": False}, "max_tokens": 40}
    with searching.client() as client:
        answer = client.post(CHAT, json=body).json()
    assert searched == [WHO[0]["content"]]
    assert answer["choices"][0]["message"]["content"] == "Mara Velt founded"
    assert len(answer["trace"]) == 1


def test_others_are_answered_while_a_search_waits(searching, waiting):
    began, go = waiting
    found = []
    with searching.client() as client, searching.client() as other:
        thread = threading.Thread(target=lambda: found.append(client.post(CHAT, json=SEARCH)))
        thread.start()
        assert began.wait(20)
        for _ in range(3):
            said = other.post(CHAT, json={"messages": WHO, "max_tokens": 5, "model": "puppet"})
            assert said.status_code == 200
        assert other.get("/health").status_code == 200
        assert not found
        go.set()
        thread.join(20)
    assert found[0].json()["choices"][0]["message"]["content"] == "It is the Rill. [2]"


def test_who_leaves_during_a_search_frees_the_place(searching, waiting):
    began, _ = waiting
    scheduler = searching.service.models["puppet"].scheduler
    before = scheduler.stats().cancelled
    with searching.client() as client, client.stream("POST", CHAT, json={**SEARCH, "stream": True}):
        assert began.wait(20)
        assert scheduler.stats().active == 1
    until(lambda: scheduler.stats().active == 0)
    assert scheduler.stats().cancelled == before + 1


def test_searches_are_bounded_like_other_requests(searching, waiting):
    """Two rows and one that waits; the fourth is refused. Those who leave make room, wherever they stood."""
    _, go = waiting
    scheduler = searching.service.models["puppet"].scheduler
    with searching.client() as client:
        streams = [client.stream("POST", CHAT, json={**SEARCH, "stream": True}) for _ in range(3)]
        for stream, counts in zip(streams, [(1, 0), (2, 0), (2, 1)]):
            stream.__enter__()
            # one that came while the one before still waits to be admitted would be refused
            until(lambda counts=counts: (scheduler.stats().active, scheduler.stats().queued) == counts)
        refused = client.post(CHAT, json=SEARCH)
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) > 0
        for stream in reversed(streams):
            stream.__exit__(None, None, None)
        until(lambda: (scheduler.stats().active, scheduler.stats().queued) == (0, 0))
        go.set()
        assert client.post(CHAT, json=SEARCH).json()["choices"][0]["message"]["content"] == "It is the Rill. [2]"


def test_a_model_that_was_trained_to_search_does_so_unless_it_cannot(searching):
    asked = {"knowledge_base": "towns", "top_k": 1}
    with searching.client() as client:
        found = [
            client.post(CHAT, json={**SEARCH, "retrieval": asked, **more}).json()
            for more in ({}, {"n": 2, "max_tokens": 5}, {"logprobs": True, "max_tokens": 5})
        ]
    assert [len(answer["trace"]) for answer in found] == [2, 1, 1]
