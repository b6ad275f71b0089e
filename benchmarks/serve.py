"""Serving: latency and throughput by the number of streams, through HTTP and of the bare scheduler.

    python -m benchmarks.serve [--pattern hybrid] [--streams 1 8 32 64] [--requests 4] [--soak 10000]

Random weights; questions of the tiny world with text before them (--prompt tokens), greedy answers of --tokens tokens.
Each stream sends its next request when its last one has been answered. `http` is the server in a process of its own and
its clients here; `engine` is the same scheduler with its consumers on one event loop and no HTTP. Both hand over what
they have every --pace_ms, as the server does unless it is told otherwise. Clients share the
machine with the server, which real ones do not: they only note when bytes come, and read them when all is over. What
they take all the same stands in `client`. Milliseconds:

    ttft         from the request to the first token (p50, p99)
    tpot         each further token, the mean of a request (p50)
    itl          from one piece of text to the next (p50, p99)
    tokens       a second, all streams together; `goodput`: requests a second with ttft <= --slo_ttft and
                 tpot <= --slo_tpot seconds
    cpu_us       microseconds of all threads of server or engine, user and system, for each token
    client       processor seconds of the clients, a second

Ratios:

    batch<n>_over_1        tokens a second of n streams over those of one (engine)
    http_over_engine_<n>   tokens a second
    http_cpu_<n>           cpu_us of http over engine: it means something on a busy machine too
    health_p99_ms          of /health while the most streams run (in a round of its own)
    turn2_over_cold_<p>    ttft of the second turn of a long conversation, over the same prompt without a cache
    tokens_after_cancel    the most that a cancelled request still got
    soak_rss_growth        by how much the server's memory grows from a fifth of the --soak requests to all (64 streams)
    soak_errors            of those requests; their messages are printed

The soak alone, with a model that answers fast:

    python -m benchmarks.serve --streams --turns --soak 10000 --depth 1 --width 64
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.common import report
from benchmarks.first_token import build
from benchmarks.serve_clients import Ask, Seen, get, load, look, post
from nanochat.data.world import World
from nanochat.engine.batching import Request, Scheduler
from nanochat.engine.prefix import PrefixCache
from nanochat.engine.sampling import Sampling
from nanochat.model.lm import LM
from nanochat.tokenizer import Tokenizer

TURN = 1000  # tokens of the conversation whose second turn is timed


def main() -> None:
    parser = argparse.ArgumentParser(description="Latency and throughput of the server")
    parser.add_argument("--pattern", default="hybrid", help="of the model that is served")
    parser.add_argument("--turns", nargs="*", default=["T", "M", "M2", "hybrid"], help="patterns for second turns")
    parser.add_argument("--streams", nargs="*", type=int, default=[1, 8, 32, 64])
    parser.add_argument("--requests", type=int, default=4, help="of each stream")
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--tokens", type=int, default=128, help="of an answer")
    parser.add_argument("--pace_ms", type=float, default=30.0, help="between two pieces of an answer; 0: every token")
    parser.add_argument("--slo_ttft", type=float, default=2.0)
    parser.add_argument("--slo_tpot", type=float, default=0.2)
    parser.add_argument("--soak", type=int, default=0, help="requests by 64 streams, one token each; 0: none")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocab_size", type=int, default=1024)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--serve", type=int, default=0, help=argparse.SUPPRESS)  # be the server, on this port
    args = parser.parse_args()
    world = World(seed=1, n_known=200, n_new=0)
    documents = [d["content"] for d in world.documents("known", 1)]
    tokenizer = Tokenizer.train(documents, args.vocab_size)
    if args.serve:
        return serve(build(args.pattern, args, tokenizer), tokenizer, args)
    texts = questions(documents, tokenizer, args.prompt)
    rows, ratios = [], {}
    for measure in (measure_engine, measure_http):
        found, compared = measure(texts, tokenizer, args)
        rows += found
        ratios |= compared
    of = {(row["way"], row["streams"]): row["tokens"] for row in rows}
    cpu = {(row["way"], row["streams"]): row["cpu_us"] for row in rows}
    for n in args.streams:
        if n > 1 and ("engine", 1) in of:
            ratios[f"batch{n}_over_1"] = of["engine", n] / of["engine", 1]
        ratios[f"http_over_engine_{n}"] = of["http", n] / of["engine", n]
        ratios[f"http_cpu_{n}"] = cpu["http", n] / cpu["engine", n]
    for pattern in args.turns:
        ratios[f"turn2_over_cold_{pattern}"] = second_turn(build(pattern, args, tokenizer), tokenizer, documents)
    report("serve", rows, ratios)


def questions(documents: Sequence[str], tokenizer: Tokenizer, n_tokens: int) -> list[str]:
    """Texts of about so many tokens that have no beginning in common."""
    rng = random.Random(0)
    texts = []
    for i in range(1000):
        words = " ".join(rng.sample(documents, 3))
        texts.append(f"{i} " + tokenizer.decode(tokenizer.encode(words)[: n_tokens - 8]))
    return texts


# ---- figures


def timed(
    way: str, ask: Ask, texts: Sequence[str], n: int, args: argparse.Namespace, pid: int
) -> dict[str, Any]:
    """--requests of each of n streams, after one of each to warm up. pid: of server or engine."""
    asyncio.run(load(ask, texts[-n:], n, n))
    before, own = cpu_seconds(pid), time.process_time()
    seen, seconds = asyncio.run(load(ask, texts, n, n * args.requests))
    used, own = cpu_seconds(pid) - before, time.process_time() - own
    for one in seen:
        if one.expected:
            one.read()
    row = summary(way, n, seen, seconds, args)
    row["cpu_us"] = 1e6 * used / sum(one.n for one in seen)
    return row | ({"client": own / seconds} if way == "http" else {})


def summary(way: str, n: int, seen: Sequence[Seen], seconds: float, args: argparse.Namespace) -> dict[str, Any]:
    failed = [s.failed for s in seen if s.failed]
    assert not failed, f"{len(failed)} of {len(seen)} requests failed: {failed[0]}"
    gaps = [gap for s in seen for gap in s.gaps]
    good = sum(s.ttft <= args.slo_ttft and s.tpot <= args.slo_tpot for s in seen)
    return {
        "way": way,
        "streams": n,
        "ttft_p50": 1000 * quantile([s.ttft for s in seen], 0.5),
        "ttft_p99": 1000 * quantile([s.ttft for s in seen], 0.99),
        "tpot_p50": 1000 * quantile([s.tpot for s in seen], 0.5),
        "itl_p50": 1000 * quantile(gaps, 0.5),
        "itl_p99": 1000 * quantile(gaps, 0.99),
        "tokens": sum(s.n for s in seen) / seconds,
        "goodput": good / seconds,
    }


def quantile(values: Sequence[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))] if ordered else 0.0


# ---- the scheduler alone


def measure_engine(
    texts: Sequence[str], tokenizer: Tokenizer, args: argparse.Namespace
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    model = build(args.pattern, args, tokenizer)
    sampling = Sampling(max_tokens=args.tokens, temperature=0.0)
    with make_scheduler(model, tokenizer, args) as scheduler:

        async def ask(text: str) -> Seen:
            seen = Seen()
            ids = tokenizer.render_prompt({"messages": [{"role": "user", "content": text}]}).ids
            ticket = scheduler.submit(Request(ids, sampling))
            while some := await ticket.take():
                seen.n += sum(len(event.ids) for event in some)
                seen.at += [time.perf_counter()] if any(event.text for event in some) else []
                seen.failed = some[-1].finish_reason if some[-1].finish_reason not in ("", "length") else ""
            return seen

        rows = [timed("engine", ask, texts, n, args, os.getpid()) for n in args.streams]
        return rows, {"tokens_after_cancel": tokens_after_cancel(scheduler)}


def make_scheduler(model: LM, tokenizer: Tokenizer, args: argparse.Namespace) -> Scheduler:
    """That never ends an answer early, with a prefix cache that is full soon."""
    return Scheduler(
        model, tokenizer, max_rows=max([64, *args.streams]), max_queue=1024, prefix_cache=PrefixCache(16 << 20),
        eos=(), pace=args.pace_ms / 1000,
    )  # fmt: skip


def tokens_after_cancel(scheduler: Scheduler, n: int = 20) -> float:
    """The most tokens that a request got after it was cancelled, of n requests: at most that of the step then under
    way."""
    most = 0
    for i in range(n):
        ticket = scheduler.submit(Request([i + 1], Sampling(max_tokens=1000)))
        next(iter(ticket))
        ticket.cancel()
        before = ticket.usage.completion
        for _ in ticket:
            pass
        most = max(most, ticket.usage.completion - before)
    return float(most)


def second_turn(model: LM, tokenizer: Tokenizer, documents: Sequence[str], repeats: int = 3) -> float:
    """Time to the first token of a second turn after a long first one, over the time without a cache."""
    long = tokenizer.decode(tokenizer.encode(" ".join(documents[:60]))[:TURN])
    times: dict[bool, list[float]] = {True: [], False: []}
    for i in range(repeats):
        for cached in times:
            with Scheduler(model, tokenizer, prefix_cache=PrefixCache() if cached else None, eos=()) as scheduler:
                first = [*render(tokenizer, f"{i} {long}")]
                said = [token for e in scheduler.submit(Request(first, Sampling(16, 0.0))) for token in e.ids]
                second = [*first, *said, tokenizer.eot, *render(tokenizer, "And what else?")[1:]]
                ticket = scheduler.submit(Request(second, Sampling(1, 0.0)))
                list(ticket)
                times[cached].append(ticket.timings.first_token or 0.0)
    return min(times[True]) / min(times[False])


def render(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.render_prompt({"messages": [{"role": "user", "content": text}]}).ids


# ---- HTTP


def serve(model: LM, tokenizer: Tokenizer, args: argparse.Namespace) -> None:
    """Be the server."""
    from nanochat.chat import ChatModel
    from nanochat.engine.load import Loaded
    from nanochat.serving.server import listen, make_server
    from nanochat.serving.settings import ServeSettings

    settings = ServeSettings(port=args.serve, max_queue=1024, rate_limit=0, uploads=False)
    server = make_server(settings, {"bench": ChatModel(Loaded(model, tokenizer, {"stage": "sft"}, Path("bench")))})
    server.config.app.state.service.model("bench").scheduler = make_scheduler(model, tokenizer, args)
    with listen("127.0.0.1", args.serve) as listening:
        server.run(sockets=[listening])


def measure_http(
    texts: Sequence[str], tokenizer: Tokenizer, args: argparse.Namespace
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    ratios: dict[str, float] = {}
    with running(args) as (port, process):

        async def ask(text: str, tokens: int = args.tokens) -> Seen:
            return await post(port, text, tokens)

        async def watched(n: int) -> None:
            looking = asyncio.create_task(look(port, health))
            await load(ask, texts, n, n * args.requests)  # for as many looks as a p99 needs
            looking.cancel()

        rows = [timed("http", ask, texts, n, args, process.pid) for n in args.streams]
        if args.streams:
            health: list[float] = []
            asyncio.run(watched(max(args.streams)))
            ratios["health_p99_ms"] = 1000 * quantile(health, 0.99)
        if args.soak:
            ratios |= soak(lambda text: ask(text, 1), texts, args.soak, process.pid)
    return rows, ratios


@contextmanager
def running(args: argparse.Namespace) -> Any:
    """The server in a process of its own: its port and the process."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = {name: getattr(args, name) for name in ("pattern", "depth", "width", "vocab_size", "device", "pace_ms")}
    flags = [f"--{name}={value}" for name, value in options.items()]
    flags += ["--streams", *map(str, args.streams)]
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.serve", f"--serve={port}", *flags])
    try:
        for _ in range(600):
            if process.poll() is not None:
                raise RuntimeError(f"the server ended with {process.returncode}")
            try:
                asyncio.run(get(port, "/health"))
                break
            except OSError:
                time.sleep(0.2)
        yield port, process
    finally:
        process.terminate()
        process.wait(60)


def soak(ask: Ask, texts: Sequence[str], n: int, pid: int) -> dict[str, float]:
    """Many requests by 64 streams: what fails, and how much the server's memory grows after a fifth of them."""
    wrong: Counter[str] = Counter()
    memory = []
    for some in (n // 5, n - n // 5):
        seen, seconds = asyncio.run(load(ask, texts, 64, some))
        for one in seen:
            one.read()
        wrong.update(one.failed for one in seen if one.failed)
        memory.append(resident(pid))
        print(f"soak: {some} requests in {seconds:.0f} s; the server has {memory[-1] / 1024:.0f} MB", file=sys.stderr)
    for message, times in wrong.most_common(5):
        print(f"soak: {times} times: {message}", file=sys.stderr)
    growth = memory[1] / memory[0] - 1 if memory[0] else float("nan")
    return {"soak_rss_growth": growth, "soak_errors": sum(wrong.values())}


def cpu_seconds(pid: int) -> float:
    """User and system time of a process, all its threads; NaN where /proc does not say."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return float("nan")
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident(pid: int) -> int:
    """Memory of a process in KB; 0 where /proc does not say."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))


if __name__ == "__main__":
    main()
