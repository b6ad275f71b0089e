"""The benchmark of serving: its clients see what a server sends, and its figures are what they say."""

import argparse
import asyncio
import json

import pytest

from benchmarks import serve
from benchmarks.serve import measure_engine, quantile, summary
from benchmarks.serve_clients import Seen, load, post
from nanochat.engine.prefix import PrefixCache
from nanochat.tokenizer import Tokenizer

ARGS = argparse.Namespace(
    pattern="hybrid", depth=2, width=32, vocab_size=300, device="cpu", streams=[1, 3], requests=2, tokens=6,
    slo_ttft=60.0, slo_tpot=60.0, pace_ms=0.0,
)  # fmt: skip


def test_the_scheduler_by_itself():
    tokenizer = Tokenizer([bytes([i]) for i in range(256)])
    rows, ratios = measure_engine([f"{i} what?" for i in range(9)], tokenizer, ARGS)
    assert [(row["way"], row["streams"]) for row in rows] == [("engine", 1), ("engine", 3)]
    assert all(row["tokens"] > row["goodput"] > 0 and row["itl_p99"] >= row["itl_p50"] for row in rows)
    assert ratios["tokens_after_cancel"] <= 1


def test_a_second_turn_is_timed_with_and_without_a_cache(monkeypatch):
    tokenizer = Tokenizer([bytes([i]) for i in range(256)])
    made = []
    monkeypatch.setattr(serve, "PrefixCache", lambda: made.append(PrefixCache()) or made[-1])
    monkeypatch.setattr(serve, "TURN", 60)
    ratio = serve.second_turn(serve.build("M", ARGS, tokenizer), tokenizer, ["some text " * 20], repeats=1)
    assert ratio > 0
    assert [prefixes.hits for prefixes in made] == [1]


def test_streams_send_one_request_after_the_other():
    running, most, asked = 0, 0, []

    async def ask(text: str) -> Seen:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1
        asked.append(text)
        return Seen()

    seen, seconds = asyncio.run(load(ask, ["a", "b"], 3, 10))
    assert (len(seen), most, sorted(asked)) == (10, 3, ["a"] * 5 + ["b"] * 5)
    assert seconds > 0


def test_figures():
    seen = [Seen(began=0.0, at=[1.0, 1.5, 3.0], n=5), Seen(began=2.0, at=[2.1, 2.2], n=2)]
    args = argparse.Namespace(slo_ttft=0.5, slo_tpot=0.2)
    row = summary("http", 2, seen, 4.0, args)
    assert row["tokens"] == 7 / 4
    assert row["goodput"] == 1 / 4
    assert row["ttft_p99"] == pytest.approx(1000)
    assert row["tpot_p50"] == pytest.approx(500)  # two seconds for four more tokens; 100 ms in the other
    assert row["itl_p99"] == pytest.approx(1500)
    assert quantile([], 0.5) == 0.0
    with pytest.raises(AssertionError, match="1 of 1 requests failed: no"):
        summary("http", 1, [Seen(failed="no")], 1.0, args)


@pytest.mark.parametrize(
    ("status", "frames", "failed"),
    [
        ("200 OK", [{"choices": [{"delta": {"content": "a"}}]}, {"usage": {"completion_tokens": 2}}], ""),
        ("200 OK", [{"choices": [{"delta": {"content": "a"}}]}, {"usage": {"completion_tokens": 1}}], "1 of 2"),
        ("200 OK", [{"error": {"message": "broken"}}], "broken"),
        ("429 Too Many Requests", [], "429"),
    ],
)
def test_what_a_client_sees(status, frames, failed):
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        assert json.loads(await reader.readexactly(length))["max_tokens"] == 2
        data = b"".join(b"data: " + json.dumps(frame).encode() + b"\n\n" for frame in frames)
        writer.write(f"HTTP/1.1 {status}\r\n\r\n".encode() + data)
        writer.close()
        await writer.wait_closed()

    async def ask() -> Seen:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with server:
            return await post(server.sockets[0].getsockname()[1], "hello", 2)

    seen = asyncio.run(ask())
    seen.read()
    assert failed in seen.failed
    assert bool(seen.failed) == bool(failed)
    assert len(seen.at) == sum("choices" in frame for frame in frames)


def test_a_server_that_is_gone_is_a_failure():
    seen = asyncio.run(post(1, "hello", 2))
    assert seen.failed
