"""Chat completions beyond what clients of OpenAI know: documents, searches, what is left out, how a stream ends."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_server import DOCUMENTS, slowed, tiny_model

from nanochat.data.answers import ABSTENTION

CHAT = "/v1/chat/completions"
WHO = [{"role": "user", "content": "Who founded Torwick?"}]


def ask(client, messages=WHO, **fields) -> dict:
    response = client.post(CHAT, json={"messages": messages, "max_tokens": 6, "model": "tiny-rag", **fields})
    assert response.status_code == 200, response.text
    return response.json()


def streamed(client, messages=WHO, **fields) -> list[dict]:
    """The chunks; the stream must end with [DONE]."""
    body = {"messages": messages, "max_tokens": 6, "model": "tiny-rag", "stream": True, **fields}
    response = client.post(CHAT, json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line and line[0] != ":"]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def retrieval(**fields) -> dict:
    return {"retrieval": {"knowledge_base": "towns", **fields}}


def test_answers_from_documents(client, server):
    model = server.service.models["tiny-rag"].chat
    expected = model.with_knowledge(server.service.shelf.open("towns"), top_k=2).chat(WHO, max_tokens=6)
    answer = ask(client, **retrieval(top_k=2))
    assert answer["choices"][0]["message"]["content"] == expected.text
    assert [d["id"] for d in answer["trace"][0]["documents"]] == [d.id for d in expected.documents]
    assert answer["trace"][0]["documents"][0]["n"] == 1
    assert answer["trace"][0]["documents"][0]["passage"] == DOCUMENTS[0].content
    [grounding] = answer["grounding"]
    assert grounding["sentences"][0]["support"] == pytest.approx(expected.support[0].score)
    assert not grounding["abstained"]
    chunks = streamed(client, **retrieval(top_k=2))
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == expected.text
    last = chunks[-1]
    assert (last["citations"], last["grounding"], last["trace"]) == (
        answer["citations"], answer["grounding"], answer["trace"],
    )  # fmt: skip
    assert not any("trace" in chunk for chunk in chunks[:-1])


def test_citations_are_those_of_the_answer(client, server, monkeypatch):
    """A model that cites: its logits say what it is told."""
    chat = server.service.models["tiny-rag"].chat
    cite = [chat.tokenizer.special("cite_start"), *chat.tokenizer.encode("1"), chat.tokenizer.special("cite_end")]
    script = iter([*cite, *chat.tokenizer.encode("Mara Velt founded Torwick."), chat.tokenizer.eot])

    def scripted(hidden):
        logits = torch.zeros(len(hidden), chat.tokenizer.vocab_size)
        logits[:, next(script)] = 9.0
        return logits

    monkeypatch.setattr(chat.model, "logits", scripted)
    answer = ask(client, max_tokens=60, **retrieval())
    assert answer["choices"][0]["message"]["content"] == "Mara Velt founded Torwick. [1]"
    assert answer["citations"] == answer["trace"][0]["documents"][:1]
    assert answer["grounding"][0]["sentences"] == [
        {"text": "Mara Velt founded Torwick.", "cited": [1], "support": pytest.approx(1.0, abs=0.2)}
    ]


def test_an_answer_is_written_after_a_draft(client):
    """The draft counts in usage; without it there is one answer less to pay for."""
    twice, once = (ask(client, max_tokens=8, **retrieval(top_k=2, reread=reread)) for reread in (True, False))
    assert once["usage"]["completion_tokens"] <= 8
    assert twice["usage"]["completion_tokens"] >= once["usage"]["completion_tokens"]
    assert twice["choices"][0]["finish_reason"] in ("stop", "length")
    streamed_ = streamed(client, max_tokens=8, stream_options={"include_usage": True}, **retrieval(top_k=2))
    assert streamed_[-1]["usage"]["completion_tokens"] == twice["usage"]["completion_tokens"]
    said = "".join(c["choices"][0]["delta"].get("content") or "" for c in streamed_ if c["choices"])
    assert said == twice["choices"][0]["message"]["content"]


def test_the_newer_name_of_max_tokens_counts(client):
    for fields, n in (({"max_tokens": 3}, 3), ({"max_completion_tokens": 2}, 2)):
        assert ask(client, **{"max_tokens": 6, **fields})["usage"]["completion_tokens"] == n
    body = {"messages": WHO, "max_completion_tokens": 2, "model": "tiny-rag"}
    assert client.post(CHAT, json=body).json()["usage"]["completion_tokens"] == 2


def test_nothing_found_and_nothing_to_search(client):
    nothing = ask(client, [{"role": "user", "content": "Xyzzy plugh?"}], n=2, **retrieval())
    assert [c["message"]["content"] for c in nothing["choices"]] == [ABSTENTION] * 2
    assert nothing["usage"]["total_tokens"] == 0
    assert nothing["grounding"][0]["abstained"]
    assert nothing["trace"] == [{"query": "Xyzzy plugh?", "documents": []}]
    chunks = streamed(client, [{"role": "user", "content": "Xyzzy plugh?"}], n=2, **retrieval())
    assert [c["choices"][0]["finish_reason"] for c in chunks][-2:] == ["stop", "stop"]
    hello = ask(client, [{"role": "user", "content": "Hello!"}], **retrieval())
    assert hello["trace"] == [{"query": "", "documents": []}]
    assert hello["usage"]["completion_tokens"] == 6


def test_long_conversations_lose_their_oldest_turns_and_say_so(client):
    turn = [{"role": "user", "content": "x" * 60}, {"role": "assistant", "content": "y" * 60}]
    short, long = ask(client, turn + WHO, model="tiny-sft"), ask(client, turn * 4 + WHO, model="tiny-sft")
    assert "truncated" not in short
    assert long["truncated"]["turns"] == 3
    assert long["usage"]["prompt_tokens"] < 256
    assert streamed(client, turn * 4 + WHO, model="tiny-sft")[-1]["truncated"] == long["truncated"]
    fits = [{**message, "content": message["content"] + 12 * "z"} for message in turn] * 3 + WHO
    assert "truncated" not in ask(client, fits)
    for messages, more in ((turn * 4 + WHO, {"model": "tiny-sft"}), (turn * 8 + WHO, retrieval()), (fits, retrieval())):
        body = {"messages": messages, "max_tokens": 6, "model": "tiny-rag", "truncation": "disabled", **more}
        assert client.post(CHAT, json=body).json()["error"]["code"] == "context_length_exceeded"
        assert ask(client, messages, **more)["truncated"]["turns"] > 0
    question = [{"role": "user", "content": "Torwick " * 100}]
    assert ask(client, question, **retrieval())["truncated"]["tokens"] > 100


def test_parts_and_developers(client):
    parts = [{"type": "text", "text": "Who founded "}, {"type": "text", "text": "Torwick?"}]
    plain = ask(client, [{"role": "system", "content": "Be brief."}, *WHO], temperature=0)
    other = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    same = ask(client, other, temperature=0)
    assert plain["choices"] == same["choices"]
    assert plain["usage"]["prompt_tokens"] == same["usage"]["prompt_tokens"]


def test_a_base_model_continues_texts_only(start):
    server = start({"tiny-base": tiny_model("base")})
    with server.client() as client:
        refused = client.post(CHAT, json={"messages": WHO})
        assert refused.status_code == 400
        assert "/v1/completions" in refused.json()["error"]["message"]
        assert client.post("/v1/completions", json={"prompt": "A", "max_tokens": 2}).status_code == 200


def test_a_failure_of_the_model_is_an_error_and_the_server_goes_on(client, server, monkeypatch):
    served = server.service.models["tiny-sft"]
    with monkeypatch.context() as patch:
        patch.setattr(served.chat.model, "logits", lambda hidden: 1 / 0)
        whole = client.post(CHAT, json={"messages": WHO, "max_tokens": 4})
        assert whole.status_code == 500
        assert "ZeroDivision" not in whole.text
        assert streamed(client, model="tiny-sft")[-1]["error"]["code"] == "generation_failed"
    assert ask(client, model="tiny-sft")["usage"]["completion_tokens"] == 6


def test_deadlines(start, monkeypatch):
    server = start(max_seconds=0.3, max_rows=1, max_n=1)
    with server.client() as client:
        slowed(server.service.models["tiny-rag"].chat, monkeypatch, 0.05)
        answer = ask(client, max_tokens=200)
        assert answer["choices"][0]["finish_reason"] == "length"
        assert 0 < answer["usage"]["completion_tokens"] < 20
