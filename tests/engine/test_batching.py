"""The scheduler: threads and event loops, turns, room, cancellation, failures. That its answers are the engine's is
shown in test_batching_schedules.py."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable

import pytest
import torch
from tiny_lm import build

from nanochat.engine.batching import Overloaded, Request, Scheduler, measure_states
from nanochat.engine.generate import Engine
from nanochat.engine.prefix import PrefixCache
from nanochat.engine.sampling import Sampling
from nanochat.errors import UsageError
from nanochat.model.lm import LM
from nanochat.tokenizer import StreamDecoder, Tokenizer

TOKENIZER = Tokenizer([bytes([i]) for i in range(256)])
GREEDY = Sampling(max_tokens=8, temperature=0.0)
LONG = Sampling(max_tokens=100, temperature=0.0)


@pytest.fixture(scope="module")
def model() -> LM:
    return build("hybrid", sequence_len=160, depth=2, d_model=32)


@pytest.fixture
def make(model) -> Callable[..., Scheduler]:
    """Schedulers of which nobody but the test takes the steps."""
    return lambda **options: Scheduler(model, TOKENIZER, **{"eos": (), **options})


@pytest.fixture
def passes(monkeypatch) -> list[tuple[int, int]]:
    """Rows and tokens of every pass through the model."""
    seen: list[tuple[int, int]] = []
    forward = LM.forward

    def counting(self, ids, *args, **kwargs):
        seen.append(tuple(ids.shape))
        return forward(self, ids, *args, **kwargs)

    monkeypatch.setattr(LM, "forward", counting)
    return seen


def run(scheduler: Scheduler) -> None:
    while scheduler.step():
        pass


def ids_of(ticket) -> list[int]:
    return [i for event in ticket for i in event.ids]


def reason(ticket) -> str:
    return list(ticket)[-1].finish_reason


# ---- threads and event loops


def test_threads_and_event_loops_get_what_the_engine_gives(model):
    prompts = [[i, *range(i)] for i in range(1, 13)]
    expected = [c.ids for c in Engine(model, TOKENIZER, eos=()).generate_batch(prompts, GREEDY)]
    found: dict[int, list[int]] = {}
    with Scheduler(model, TOKENIZER, max_rows=5, prefill_chunk=16, eos=()) as scheduler:

        async def one(i: int) -> None:
            found[i] = [token async for event in scheduler.submit(Request(prompts[i], GREEDY)) for token in event.ids]

        async def some(which: range) -> None:
            await asyncio.gather(*map(one, which))

        def plain(which: range) -> None:
            for i in which:
                found[i] = ids_of(scheduler.submit(Request(prompts[i], GREEDY)))

        threads = [
            threading.Thread(target=asyncio.run, args=(some(range(4)),)),
            threading.Thread(target=asyncio.run, args=(some(range(4, 8)),)),
            threading.Thread(target=plain, args=(range(8, 12),)),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert scheduler.drain(10)
    assert [found[i] for i in range(12)] == expected


def test_a_loop_that_is_gone_stops_its_request(make):
    scheduler = make()
    ticket = scheduler.submit(Request([1, 2], LONG))
    loop = asyncio.new_event_loop()
    listening = ticket.__anext__()

    async def listen() -> None:
        listening.send(None)  # up to where it waits for an event

    loop.run_until_complete(listen())
    loop.close()
    run(scheduler)
    assert scheduler.stats().cancelled == 1
    listening.close()


def test_closing_ends_everything_and_takes_nothing_more(make):
    scheduler = make(max_rows=1).start()
    tickets = [scheduler.submit(Request([1] * 5, LONG)) for _ in range(3)]
    next(iter(tickets[0]))
    scheduler.close()
    assert [reason(ticket) for ticket in tickets] == ["cancelled"] * 3
    with pytest.raises(Overloaded, match="shutting down"):
        scheduler.submit(Request([1], GREEDY))


def test_draining_finishes_what_was_taken(make):
    scheduler = make(max_rows=1)
    tickets = [scheduler.submit(Request([1] * 5, GREEDY)) for _ in range(3)]
    assert not scheduler.drain(0.01)  # nobody takes steps
    with pytest.raises(Overloaded):
        scheduler.submit(Request([1], GREEDY))
    scheduler.start()
    assert scheduler.drain(30)
    assert [reason(ticket) for ticket in tickets] == ["length"] * 3
    scheduler.close()


# ---- turns and room


def test_keys_take_turns(make):
    scheduler = make(max_rows=1)
    tickets = [scheduler.submit(Request([1], GREEDY, key=key)) for key in "aaaabab"]
    run(scheduler)
    order = sorted(tickets, key=lambda ticket: ticket.first_at)
    assert "".join(ticket.request.key for ticket in order) == "ababaaa"
    assert [ticket for ticket in order if ticket.request.key == "a"] == [tickets[i] for i in (0, 1, 2, 3, 5)]


def test_a_full_queue_says_when_to_come_back(make):
    scheduler = make(max_rows=1, max_queue=2)
    for _ in range(2):
        scheduler.submit(Request([1], GREEDY))
    with pytest.raises(Overloaded, match="has 2 requests waiting already; try again in 3 s") as caught:
        scheduler.submit(Request([1], GREEDY))
    assert caught.value.retry_after == pytest.approx(3.0)
    scheduler.step()
    scheduler.submit(Request([1], GREEDY))
    assert (scheduler.stats().rejected, scheduler.stats().requests) == (1, 3)


def test_requests_that_never_fit_are_refused(make, model):
    scheduler = make(max_rows=4, memory_bytes=sum(measure_states(model)) * 20)
    for request, message in (
        (Request([], GREEDY), "the prompt is empty"),
        (Request([1] * 161, GREEDY), "161 tokens, the model's context only 160"),
        (Request([1], GREEDY, n=5), "n=5: expected 1 to 4"),
        (Request([1], GREEDY, n=0), "n=0: expected 1 to 4"),
        (Request([1] * 100, LONG, n=4), "MB for its states"),
    ):
        with pytest.raises(UsageError, match=message):
            scheduler.submit(request)
    for name in ("max_rows", "max_queue", "prefill_chunk"):
        with pytest.raises(UsageError, match=f"{name} 0: expected at least 1"):
            make(**{name: 0})


def test_rows_wait_for_memory(make, model):
    row, token = measure_states(model)
    scheduler = make(memory_bytes=2 * (row + 20 * token))  # two rows of 20 tokens
    tickets = [scheduler.submit(Request([i] * 13, GREEDY)) for i in range(5)]  # each may come to 13 + 8 - 1
    busiest = 0
    while scheduler.step():
        busiest = max(busiest, scheduler.stats().active)
        assert scheduler.stats().state_bytes <= scheduler.memory_bytes
    assert busiest == 2
    assert all(len(ids_of(ticket)) == 8 for ticket in tickets)


def test_states_are_measured(model):
    for m in (model, build("T", depth=2), build("M", depth=2)):
        row, token = measure_states(m)
        states = m.init_states(1)
        with torch.no_grad():
            m(torch.ones(1, 50, dtype=torch.int64), states)
        assert row + 50 * token == sum(state.nbytes for state in states)


# ---- reading


def test_a_long_prompt_does_not_hold_up_the_others(make, passes):
    scheduler = make(prefill_chunk=32)
    talking = scheduler.submit(Request([1], Sampling(max_tokens=60, temperature=0.0)))
    scheduler.step()
    long, short = (scheduler.submit(Request([2] * n, GREEDY)) for n in (150, 10))
    passes.clear()
    n_steps = 0
    while long.timings.first_token is None:
        before = talking.usage.completion
        scheduler.step()
        assert talking.usage.completion == before + 1
        n_steps += 1
        if n_steps == 1:
            assert short.timings.first_token is not None  # half of a chunk was enough for it
    assert n_steps == 5  # 160 tokens
    assert all(rows * tokens <= 32 for rows, tokens in passes)


def test_short_prompts_share_a_pass(make, passes):
    scheduler = make()
    for i in range(6):
        scheduler.submit(Request([i] * 9, GREEDY))
    passes.clear()
    scheduler.step()
    assert passes == [(1, 54)]
    scheduler.step()
    assert passes[1:] == [(6, 1)]


@pytest.mark.parametrize("pattern", ["T", "M", "M2", "hybrid"])
def test_the_next_turn_reads_only_what_is_new(pattern, passes):
    model = build(pattern, sequence_len=160, depth=2, d_model=32)
    scheduler = Scheduler(model, TOKENIZER, prefix_cache=PrefixCache(), eos=())
    first = TOKENIZER.render_prompt({"messages": [{"role": "user", "content": "Hello there, who are you?"}]}).ids
    answer = scheduler.submit(Request(first, GREEDY))
    run(scheduler)
    said = ids_of(answer)
    question = TOKENIZER.render_prompt({"messages": [{"role": "user", "content": "And?"}]}).ids[1:]
    second = [*first, *said, TOKENIZER.eot, *question]
    passes.clear()
    turn = scheduler.submit(Request(second, GREEDY))
    scheduler.step()
    assert turn.usage.cached == len(first) + len(said) - 1  # the last token sampled had not been read
    assert passes == [(1, len(second) - turn.usage.cached)]
    run(scheduler)
    assert ids_of(turn) == Engine(model, TOKENIZER, eos=()).generate_batch([second], GREEDY)[0].ids
    assert scheduler.stats().cached_tokens == turn.usage.cached


# ---- ending


def test_cancelled_before_the_next_step(make, passes):
    scheduler = make(max_rows=3)
    decoding, *others = (scheduler.submit(Request([i, i], LONG)) for i in range(3))
    waiting = scheduler.submit(Request([1], LONG))
    scheduler.step()
    scheduler.step()
    for ticket in (decoding, waiting):
        ticket.cancel()
    passes.clear()
    scheduler.step()
    assert passes == [(2, 1)]  # neither reads another token
    assert (reason(decoding), decoding.usage.completion) == ("cancelled", 2)
    assert (reason(waiting), waiting.usage.completion) == ("cancelled", 0)
    for ticket in others:
        ticket.cancel()
    passes.clear()
    assert not scheduler.step()
    assert not passes
    assert scheduler.stats().cancelled == 4
    assert scheduler.stats().state_bytes == 0
    decoding.cancel()  # again: nothing happens
    assert not scheduler.step()


def test_deadlines(make, monkeypatch):
    scheduler = make(max_rows=1)
    running, waiting = (scheduler.submit(Request([1], LONG, deadline=d)) for d in (5.0, 3.0))
    scheduler.step()
    running.arrived -= 4.0
    waiting.arrived -= 4.0
    scheduler.step()
    assert reason(waiting) == "deadline"
    assert not running.done
    running.arrived -= 1.0
    assert not scheduler.step()
    assert reason(running) == "deadline"
    assert scheduler.stats().expired == 2


class Breaking(StreamDecoder):
    """Fails at its third token."""

    n = 0

    def feed(self, ids: int) -> str:
        self.n += 1
        if self.n == 3:
            raise ValueError("a decoder's bug")
        return super().feed(ids)


def test_what_breaks_in_one_row_ends_that_row(make, model, monkeypatch, caplog):
    expected = Engine(model, TOKENIZER, eos=()).generate_batch([[5, 6]], GREEDY)[0].ids
    scheduler = make()
    bad = scheduler.submit(Request([1, 2], GREEDY, decoder=lambda: Breaking(TOKENIZER)))
    good = scheduler.submit(Request([5, 6], GREEDY))
    unborn = scheduler.submit(Request([1, 2], GREEDY, decoder=lambda: 1 / 0))
    with caplog.at_level(logging.ERROR, "nanochat"):
        run(scheduler)
    assert (reason(bad), bad.usage.completion, str(bad.error)) == ("error", 2, "a decoder's bug")
    assert (reason(unborn), type(unborn.error)) == ("error", ZeroDivisionError)
    assert ids_of(good) == expected
    assert scheduler.stats().failed == 2


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_hidden_states_that_are_no_numbers_end_their_row(make, model, monkeypatch, temperature):
    sampling = Sampling(max_tokens=8, temperature=temperature, seed=1)
    expected = Engine(model, TOKENIZER, eos=()).generate_batch([[5, 6]], sampling)[0].ids
    forward = LM.forward

    def damaged(self, ids, *args, **kwargs):
        return forward(self, ids, *args, **kwargs).masked_fill((ids == 77)[..., None], float("nan"))

    monkeypatch.setattr(LM, "forward", damaged)
    scheduler = make(prefix_cache=PrefixCache())
    bad, good = scheduler.submit(Request([5, 77], sampling, n=2)), scheduler.submit(Request([5, 6], sampling))
    run(scheduler)
    assert [(event.ids, event.finish_reason) for event in bad] == [([], "error")] * 2
    assert "not finite" in str(bad.error)
    assert ids_of(good) == expected


@pytest.mark.parametrize("length", [9, 90])
def test_a_prompt_that_cannot_be_read_ends_alone(make, model, monkeypatch, length):
    """In a pass of its own, and in one that it shares with others."""
    expected = Engine(model, TOKENIZER, eos=()).generate_batch([[5] * 9, [6] * 9], GREEDY)
    forward = LM.forward

    def failing(self, ids, *args, **kwargs):
        if (ids == 77).any():
            raise MemoryError("no room")
        return forward(self, ids, *args, **kwargs)

    monkeypatch.setattr(LM, "forward", failing)
    scheduler = make(prefill_chunk=64)
    tickets = [scheduler.submit(Request(ids, GREEDY)) for ids in ([5] * 9, [77] * length, [6] * 9)]
    run(scheduler)
    assert [ids_of(ticket) for ticket in tickets] == [expected[0].ids, [], expected[1].ids]
    assert isinstance(tickets[1].error, MemoryError)
    assert scheduler.stats().failed == 1


def test_a_step_that_fails_for_all_rows_ends_them_and_the_next_requests_go_on(make, monkeypatch):
    scheduler = make(max_rows=2)
    tickets = [scheduler.submit(Request([i], GREEDY)) for i in range(3)]
    scheduler.step()
    with monkeypatch.context() as patch:
        patch.setattr("nanochat.engine.generate.decode", lambda *_: 1 / 0)
        scheduler.step()
    run(scheduler)
    assert [reason(ticket) for ticket in tickets] == ["error", "error", "length"]


def test_a_bug_in_the_loop_leaves_nobody_waiting(make, monkeypatch):
    scheduler = make()
    monkeypatch.setattr(scheduler._jobs, "read", lambda: 1 / 0)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    ticket = scheduler.submit(Request([1], GREEDY))
    scheduler.start()
    assert reason(ticket) == "error"
    with pytest.raises(Overloaded):
        scheduler.submit(Request([1], GREEDY))
    scheduler.close()


# ---- what events say


def test_most_likely_tokens(make):
    scheduler = make()
    sampled = Sampling(max_tokens=8, temperature=1.5, seed=1)
    plain = scheduler.submit(Request([3, 4], GREEDY))
    asked = scheduler.submit(Request([3, 4], sampled, top_logprobs=300))
    run(scheduler)
    assert not any(event.top_logprobs for event in plain)
    for event in asked:
        (likely,) = event.top_logprobs
        values = [value for _, value in likely]
        assert values == sorted(values, reverse=True)
        assert sum(torch.tensor(values).exp()) == pytest.approx(1.0, abs=1e-4)
        assert dict(likely)[event.ids[0]] == pytest.approx(event.logprobs[0], abs=1e-4)


def test_usage_and_timings(make):
    scheduler = make(max_rows=1)
    first, second = (scheduler.submit(Request([1, 2, 3], GREEDY, n=1)) for _ in range(2))
    assert second.timings == (None, None, None)
    run(scheduler)
    assert first.usage == (3, 0, 8)
    queued, first_token, total = second.timings
    assert 0 < queued < first_token < total
    assert queued > first.timings.first_token
