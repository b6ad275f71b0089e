"""Real clients, unmodified, against the real server: OpenAI's own, and LiteLLM."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from tiny_server import slowed

openai = pytest.importorskip("openai")

ASK = [{"role": "user", "content": "Who founded Torwick?"}]


@pytest.fixture
def client(server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=30) as made:
        yield made


def test_chat(client):
    answer = client.chat.completions.create(model="tiny-sft", messages=ASK, max_tokens=7, temperature=0)
    assert answer.object == "chat.completion"
    assert answer.model == "tiny-sft"
    assert answer.choices[0].finish_reason == "length"
    assert len(answer.choices[0].message.content) == 7
    assert answer.usage.completion_tokens == 7
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 7
    again = client.chat.completions.create(model="tiny-sft", messages=ASK, max_tokens=7, temperature=0)
    assert again.choices[0].message.content == answer.choices[0].message.content
    history = [*ASK, answer.choices[0].message, {"role": "user", "content": "Why?"}]  # as users write loops
    second = client.chat.completions.create(model="tiny-sft", messages=history, max_tokens=2)
    assert second.usage.prompt_tokens_details.cached_tokens >= answer.usage.prompt_tokens


def test_the_server_says_what_the_engine_says(client, server):
    model = server.service.models["tiny-sft"].chat
    answer = client.chat.completions.create(model="tiny-sft", messages=ASK, max_tokens=12, temperature=0)
    assert answer.choices[0].message.content == model.chat(ASK, max_tokens=12, temperature=0)
    text = client.completions.create(model="tiny-sft", prompt="Once", max_tokens=12, temperature=0.7, seed=4, n=2)
    assert [c.text for c in text.choices] == model.generate("Once", 2, max_tokens=12, temperature=0.7, seed=4)


def test_streaming(client):
    options = {"model": "tiny-sft", "messages": ASK, "max_tokens": 9, "temperature": 0}
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert said == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].usage.completion_tokens == 9
    assert chunks[-1].timings["tokens_per_second"] > 0
    last = list(client.chat.completions.create(**options, stream=True))[-1]
    assert last.choices[0].finish_reason == "length"  # without usage there is no chunk without a choice


def test_stop_seed_and_n(client):
    options = {"model": "tiny-sft", "messages": ASK, "max_tokens": 20, "temperature": 1.0, "seed": 7, "n": 2}
    one, two = (choice.message.content for choice in client.chat.completions.create(**options).choices)
    assert one != two
    again = client.chat.completions.create(**options)
    assert [choice.message.content for choice in again.choices] == [one, two]
    stopped = client.chat.completions.create(**options, stop=one[5:8])
    assert stopped.choices[0].message.content == one[: one.index(one[5:8])]
    assert stopped.choices[0].finish_reason == "stop"
    streamed: dict[int, str] = {0: "", 1: ""}
    for chunk in client.chat.completions.create(**options, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert list(streamed.values()) == [one, two]


def test_logprobs(client):
    options = {"model": "tiny-sft", "messages": ASK, "max_tokens": 5, "logprobs": True, "top_logprobs": 3}
    answer = client.chat.completions.create(**options, temperature=0)
    content = answer.choices[0].logprobs.content
    assert "".join(token.token for token in content) == answer.choices[0].message.content
    for token in content:
        assert token.logprob <= 0
        assert bytes(token.bytes).decode() == token.token
        assert len(token.top_logprobs) == 3
        best = max(other.logprob for other in token.top_logprobs)
        assert token.logprob == pytest.approx(best, abs=1e-4)
    chunks = client.chat.completions.create(**options, temperature=0, stream=True)
    streamed = [token for chunk in chunks if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.content]
    assert [token.token for token in streamed] == [token.token for token in content]
    text = client.completions.create(model="tiny-sft", prompt="Hi", max_tokens=4, logprobs=2)
    assert text.choices[0].logprobs.tokens == list(text.choices[0].text)
    assert text.choices[0].logprobs.text_offset == [0, 1, 2, 3]


def test_errors(client):
    with pytest.raises(openai.NotFoundError, match="tiny-sft"):
        client.chat.completions.create(model="gpt-none", messages=ASK)
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model="tiny-sft", messages=ASK, temperature=5)
    assert error.value.param == "temperature"
    long = [{"role": "user", "content": "x" * 500}]
    with pytest.raises(openai.BadRequestError, match="context of 256 tokens") as error:
        client.chat.completions.create(model="tiny-sft", messages=long, extra_body={"truncation": "disabled"})
    assert error.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="256"):
        client.completions.create(model="tiny-sft", prompt="x" * 500)
    with pytest.raises(openai.BadRequestError, match="Unrecognized request argument supplied: colour"):
        client.chat.completions.create(model="tiny-sft", messages=ASK, extra_body={"colour": 1})


def test_models_and_embeddings(client):
    assert [model.id for model in client.models.list()] == ["tiny-sft", "tiny-rag"]
    assert client.models.retrieve("tiny-rag").context == 512
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    found = client.embeddings.create(model="hashed-64", input=["a river", "the river"])  # base64, as the client asks
    assert [len(item.embedding) for item in found.data] == [64, 64]
    plain = client.embeddings.create(model="hashed-64", input="a river", encoding_format="float")
    assert plain.data[0].embedding == pytest.approx(found.data[0].embedding)


def test_a_stream_that_is_closed_frees_its_slot(client, server, monkeypatch):
    served = server.service.models["tiny-sft"]
    slowed(served.chat, monkeypatch, 0.02)  # 200 tokens take four seconds
    before = served.scheduler.stats().cancelled
    with client.chat.completions.create(model="tiny-sft", messages=ASK, max_tokens=200, stream=True) as stream:
        assert next(chunk for chunk in stream if chunk.choices[0].delta.content)
    deadline = time.monotonic() + 3
    while served.scheduler.stats().cancelled == before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert served.scheduler.stats().cancelled == before + 1


def test_retrieval_as_an_extension(client):
    body = {"retrieval": {"knowledge_base": "towns", "top_k": 2}}
    answer = client.chat.completions.create(model="tiny-rag", messages=ASK, max_tokens=4, extra_body=body)
    assert answer.trace[0]["query"] == "Who founded Torwick?"
    assert answer.trace[0]["documents"][0]["passage"].startswith("Torwick was founded")
    assert answer.citations == []
    assert len(answer.grounding) == 1


LITELLM = """
import sys, litellm
litellm.telemetry = False
options = dict(model="openai/tiny-sft", api_base=sys.argv[1], api_key="none", max_tokens=6, temperature=0,
               messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}])
whole = litellm.completion(**options).choices[0].message.content
pieces = [chunk.choices[0].delta.content or "" for chunk in litellm.completion(**options, stream=True)]
assert "".join(pieces) == whole and len(whole) == 6, (whole, pieces)
try:
    litellm.completion(**{**options, "model": "openai/none"})
except litellm.NotFoundError as error:
    print("not found")
print(len(pieces) > 1)
"""


@pytest.mark.slow
def test_litellm(server):
    """In a process of its own: importing it changes much, and takes long."""
    pytest.importorskip("litellm")
    environment = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "PATH": "", "HOME": "/tmp", "NO_PROXY": "*"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LITELLM, f"{server.url}/v1"],
        env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split("\n")[-3:] == ["not found", "True", ""]
