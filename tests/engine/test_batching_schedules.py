"""Whatever arrives, leaves and is kept meanwhile: every request gets what the engine alone, without any cache, gives.

`test_random_schedules` runs 50 schedules a pattern, 200 in all; the slow test 200 a pattern.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache as memoize

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_lm import build

from nanochat.engine.batching import Request, Scheduler, Ticket
from nanochat.engine.generate import Completion, Engine
from nanochat.engine.prefix import PrefixCache
from nanochat.engine.sampling import Sampling
from nanochat.model.lm import LM
from nanochat.tokenizer import Tokenizer

TOKENIZER = Tokenizer([bytes([i]) for i in range(256)])
PATTERNS = ("T", "M", "M2", "hybrid")
N_PROMPTS = 12


class World:
    """One model, prompts that share beginnings and follow each other, and what the engine alone answers."""

    def __init__(self, model: LM) -> None:
        self.model, self.engine = model, Engine(model, TOKENIZER, skip_special=True)
        rng = random.Random(0)
        words = ["".join(rng.choices("abcde ", k=rng.randint(1, 25))) for _ in range(12)]
        documents = [{"type": "document", "title": str(i), "text": words[i]} for i in range(3)]
        system, shelf = {"role": "system", "content": words[3]}, {"role": "retrieval", "content": documents}
        conversations = [
            *([{"role": "user", "content": word}] for word in words[4:6]),
            *([system, {"role": "user", "content": word}] for word in words[6:8]),
            *([system, shelf, {"role": "user", "content": word}] for word in words[8:10]),
        ]
        self.prompts = [TOKENIZER.render_prompt({"messages": m}).ids for m in conversations]
        self.prompts += [[rng.randrange(256) for _ in range(n)] for n in (1, 60)]
        for i in range(4):  # the next turn, as a client sends it
            said = self.alone(i, 6, 0.0, 1)[0].ids
            question = TOKENIZER.render_prompt({"messages": [{"role": "user", "content": words[i]}]}).ids[1:]
            self.prompts.append([*self.prompts[i], *said, TOKENIZER.eot, *question])
        assert len(self.prompts) == N_PROMPTS

    @memoize  # noqa: B019 (it lives as long as the module)
    def alone(self, prompt: int, max_tokens: int, temperature: float, n: int) -> list[Completion]:
        sampling = Sampling(max_tokens=max_tokens, temperature=temperature, seed=3, stop=("ab",))
        return self.engine.generate_batch([self.prompts[prompt]], sampling, n)


@dataclass(frozen=True)
class Arrival:
    step: int
    prompt: int
    max_tokens: int
    temperature: float
    n: int
    key: str
    cancel: int | None  # so many steps after it came
    late: bool  # its deadline has passed when it comes


ARRIVALS = st.lists(
    st.builds(
        Arrival,
        step=st.integers(0, 20),
        prompt=st.integers(0, N_PROMPTS - 1),
        max_tokens=st.sampled_from([1, 6, 12]),
        temperature=st.sampled_from([0.0, 0.0, 0.0, 1.0]),
        n=st.sampled_from([1, 1, 1, 3]),
        key=st.sampled_from("ab"),
        cancel=st.one_of(st.none(), st.none(), st.integers(0, 12)),
        late=st.sampled_from([False] * 7 + [True]),
    ),
    min_size=1,
    max_size=9,
)
SCHEDULES = st.fixed_dictionaries(
    {
        "arrivals": ARRIVALS,
        "max_rows": st.integers(3, 8),
        "prefill_chunk": st.sampled_from([4, 16, 64, 256]),
        "tight": st.booleans(),  # memory for no more than four of the longest rows
        "cache_bytes": st.sampled_from([None, 0, 30_000, 200_000, 1 << 25]),
        "spacing": st.sampled_from([0, 16, 128]),
    }
)


@pytest.fixture(scope="module", params=PATTERNS)
def world(request) -> World:
    return World(build(request.param, sequence_len=160, depth=2, d_model=32))


def play(world: World, arrivals, max_rows, prefill_chunk, tight, cache_bytes, spacing) -> None:
    """Run a schedule step by step, and compare."""
    prefixes = None if cache_bytes is None else PrefixCache(cache_bytes, spacing)
    scheduler = Scheduler(
        world.model, TOKENIZER, max_rows=max_rows, max_queue=99, prefill_chunk=prefill_chunk, prefix_cache=prefixes
    )
    if tight:
        scheduler.memory_bytes = scheduler._bytes(4, world.model.config.sequence_len)
    tickets: list[tuple[Arrival, Ticket]] = []
    waiting, step, busy = sorted(arrivals, key=lambda a: a.step), 0, True
    while waiting or busy:
        while waiting and waiting[0].step <= step:
            a = waiting.pop(0)
            sampling = Sampling(max_tokens=a.max_tokens, temperature=a.temperature, seed=3, stop=("ab",))
            deadline = 0.0 if a.late else None
            request = Request(world.prompts[a.prompt], sampling, a.n, a.key, deadline)
            tickets.append((a, scheduler.submit(request)))
        for a, ticket in tickets:
            if a.cancel is not None and step == a.step + a.cancel:
                ticket.cancel()
        busy = scheduler.step()
        stats = scheduler.stats()
        assert stats.active <= max_rows
        assert not tight or stats.state_bytes <= scheduler.memory_bytes
        step += 1
        assert step < 2000
    for a, ticket in tickets:
        compare(a, ticket, world.alone(a.prompt, a.max_tokens, a.temperature, a.n))
    assert (stats.active, stats.queued, stats.state_bytes, stats.failed) == (0, 0, 0, 0)
    assert stats.finished == len(arrivals)
    if prefixes is not None:
        assert prefixes.nbytes == sum(node.nbytes for node in prefixes._order) <= cache_bytes


def compare(a: Arrival, ticket: Ticket, expected: list[Completion]) -> None:
    events = list(ticket)
    assert ticket.usage.completion == sum(len(event.ids) for event in events)
    for j, alone in enumerate(expected):
        mine = [event for event in events if event.index == j]
        ids, text = [i for event in mine for i in event.ids], "".join(event.text for event in mine)
        reasons = [event.finish_reason for event in mine]
        assert not any(reasons[:-1])
        if reasons[-1] in ("cancelled", "deadline"):
            assert a.cancel is not None or a.late
            assert alone.ids[: len(ids)] == ids
            assert alone.text.startswith(text)
        else:
            assert (ids, text, reasons[-1]) == (alone.ids, alone.text, alone.finish_reason)
        if a.late:
            assert not ids


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(schedule=SCHEDULES)
def test_random_schedules(world, schedule):
    play(world, **schedule)


@pytest.mark.slow
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(schedule=SCHEDULES)
def test_many_random_schedules(world, schedule):
    play(world, **schedule)
