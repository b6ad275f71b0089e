"""Answers with searches through the scheduler: what `MultiHopChat` alone gives, beside other requests."""

import threading
import time
from dataclasses import replace

import pytest
import torch
from test_multihop import Shelf
from test_multihop_chat import QUESTION, TOKENIZER, build, chain

from nanochat.conversation import SPECIAL_TOKENS
from nanochat.engine.batching import Request, Scheduler
from nanochat.engine.prefix import PrefixCache
from nanochat.engine.sampling import Sampling
from nanochat.errors import NanochatError, UsageError
from nanochat.model.config import ModelConfig
from nanochat.model.lm import LM
from nanochat.rag.multihop_chat import MultiHopChat

PLAIN = Request(TOKENIZER.render_prompt({"messages": [{"role": "user", "content": QUESTION}]}).ids, Sampling(5, 0.0))


class Waiting(Shelf):
    """A shelf that finds nothing before it is told to."""

    def __init__(self):
        super().__init__()
        self.go, self.began = threading.Event(), threading.Event()

    def search(self, queries, k=5):
        self.began.set()
        assert self.go.wait(20)
        return super().search(queries, k)


def adrift(question, results):
    """Cites what was never found."""
    if not results:
        return [{"type": "search", "text": "Torwick founded"}]
    return [{"type": "cite", "text": "Somebody 9"}, {"type": "text", "text": "Somebody was born at sea."}]


def scheduler_for(chat, **options):
    return Scheduler(chat.model, TOKENIZER, **options)


def request(search, **options):
    return Request(search.ids, search.sampling, guide=search, decoder=search.decoder, **options)


def run(scheduler, *tickets):
    """Steps until these have ended."""
    deadline = time.monotonic() + 20
    while not all(ticket.done for ticket in tickets):
        scheduler.step()
        assert time.monotonic() < deadline


def until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        time.sleep(0.001)
        assert time.monotonic() < deadline


def assert_same(search, ticket, expected):
    events, answer = list(ticket), search.finish()
    assert "".join(event.text for event in events) == answer.text == expected.text
    assert answer.hops == expected.hops
    assert answer.rollout._replace(logprobs=[], calls=()) == expected.rollout._replace(logprobs=[], calls=())
    assert answer.rollout.logprobs == pytest.approx(expected.rollout.logprobs, abs=1e-4)
    assert [i for event in events for i in event.ids] == expected.completion.ids
    assert answer.completion.finish_reason == expected.completion.finish_reason
    reason = expected.completion.finish_reason
    assert events[-1].finish_reason == ("stop" if reason == "calls" else reason)
    assert [d.id for d in answer.citations] == [d.id for d in expected.citations]
    read = len(expected.rollout.prompt) + expected.rollout.sampled.count(False)
    assert ticket.usage[::2] == (read, len(expected.completion.ids))


@pytest.mark.parametrize(
    ("options", "sampling"),
    [
        ({}, {}),
        ({}, {"stop": "was born"}),
        *(({}, {"max_tokens": n}) for n in (1, 11, 12, 30)),
        ({"max_hops": 0}, {"max_tokens": 20}),
        ({"max_hops": 1}, {"max_tokens": 20}),
        ({"reply": lambda question, results: [{"type": "search", "text": "Torwick"}]}, {"max_tokens": 40}),
        ({"reply": adrift}, {}),
        *(({"sequence_len": n}, {}) for n in (100, 110, 150, 200, 250, 300)),
    ],
)
@pytest.mark.parametrize("kept", [None, 1 << 20])
def test_the_answer_is_that_of_the_loop_alone(options, sampling, kept):
    expected = build(**options).chat(QUESTION, **sampling)
    chat = build(**options)
    scheduler = scheduler_for(chat, prefix_cache=kept and PrefixCache(kept), prefill_chunk=16)
    for _ in range(2):
        search = chat.prepare(QUESTION, **sampling)
        ticket = scheduler.submit(request(search))
        run(scheduler, ticket)
        assert_same(search, ticket, expected)
    stats = scheduler.stats()
    assert (stats.active, stats.failed, stats.finished, stats.state_bytes) == (0, 0, 2, 0)


@pytest.mark.parametrize("pattern", ["T", "M", "M2", "hybrid"])
def test_sampled_answers_many_at_a_time_beside_others(pattern, monkeypatch):
    """A model that says letters, searches and ends as chance will have it."""
    config = ModelConfig(
        vocab_size=256 + len(SPECIAL_TOKENS), sequence_len=300, depth=2, d_model=32, head_dim=16, pattern=pattern
    )
    model, logits = LM.build(config.resolved(), seed=1).eval().requires_grad_(False), LM.logits
    likely = [*TOKENIZER.encode("abTorwick "), TOKENIZER.eot]
    likely += [TOKENIZER.special(name) for name in ("search_start", "search_end", "cite_start", "cite_end")]
    bias = torch.full((config.vocab_size,), -1e4)
    bias[likely] = 0.0
    bias[[TOKENIZER.special("search_start"), TOKENIZER.special("search_end")]] = 1.0
    with torch.no_grad():
        model.head.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(LM, "logits", lambda self, hidden: logits(self, hidden) + bias)
    chat = MultiHopChat(model, TOKENIZER, Shelf(), top_k=1, cache=PrefixCache(0))

    def ask(answer, seed):
        return answer(f"{QUESTION} {seed}", temperature=1.0, seed=seed, max_tokens=40)

    def alone(seed):
        try:
            return ask(chat.chat, seed)
        except NanochatError as error:  # a call that never ends
            return str(error)

    expected = [alone(seed) for seed in range(16)]
    assert sum(len(answer.hops) for answer in expected if not isinstance(answer, str)) > 8
    plain = Request(PLAIN.ids, Sampling(20, 1.0, seed=5))
    with Scheduler(model, TOKENIZER, max_rows=5, prefill_chunk=32, prefix_cache=PrefixCache()) as scheduler:
        beside = [scheduler.submit(plain) for _ in range(3)]
        searches = [ask(chat.prepare, seed) for seed in range(16)]
        tickets = [scheduler.submit(request(search)) for search in searches]
        beside += [scheduler.submit(plain) for _ in range(3)]
        for search, ticket, answer in zip(searches, tickets, expected):
            if isinstance(answer, str):
                assert list(ticket)[-1].finish_reason == "error"
                assert str(ticket.error) == answer
            else:
                assert_same(search, ticket, answer)
        assert len({tuple(i for event in ticket for i in event.ids) for ticket in beside}) == 1


def test_others_are_answered_while_a_search_waits():
    shelf = Waiting()
    chat = build(knowledge=shelf)
    with scheduler_for(chat) as scheduler:
        search = chat.prepare(QUESTION)
        ticket = scheduler.submit(request(search))
        assert shelf.began.wait(20)
        for _ in range(3):
            assert list(scheduler.submit(PLAIN))[-1].finish_reason == "length"
        steps = scheduler.stats().steps
        time.sleep(0.1)
        assert scheduler.stats().steps - steps < 20  # while it waits the thread does not spin
        assert scheduler.stats().active == 1
        assert not ticket.done
        shelf.go.set()
        assert list(ticket)[-1].finish_reason == "stop"
    assert len(search.finish().hops) == 2


@pytest.mark.parametrize("reason", ["cancelled", "deadline"])
def test_who_waits_for_a_search_ends_before_the_next_step(reason):
    shelf = Waiting()
    chat = build(knowledge=shelf)
    with scheduler_for(chat) as scheduler:
        search = chat.prepare(QUESTION)
        ticket = scheduler.submit(request(search))
        assert shelf.began.wait(20)
        (job,) = scheduler._jobs._jobs
        if reason == "cancelled":
            ticket.cancel()
        else:
            ticket.request = replace(ticket.request, deadline=0.0)
        assert list(ticket)[-1].finish_reason == reason
        until(lambda: scheduler.stats().active == 0)
        assert not shelf.go.is_set()
        assert job.begun is None  # the search goes on; the states of the answer are gone
        assert search.finish().text.startswith("Let me see")
        shelf.go.set()  # what is found comes too late for anybody
        assert list(scheduler.submit(PLAIN))[-1].finish_reason == "length"


def test_keys_take_turns_with_searches_too():
    chat = build()
    scheduler = scheduler_for(chat, max_rows=1)
    mine = [scheduler.submit(request(chat.prepare(QUESTION), key="a")) for _ in range(3)]
    yours = scheduler.submit(Request(PLAIN.ids, PLAIN.sampling, key="b"))
    run(scheduler, yours)
    assert [ticket.done for ticket in mine] == [True, False, False]
    run(scheduler, *mine)


@pytest.mark.parametrize("error", [NanochatError("the knowledge base is gone"), ValueError("a bug")])
def test_a_search_that_fails_ends_its_own_answer_only(error):
    class Gone(Shelf):
        def search(self, queries, k=5):
            raise error

    chat = build(knowledge=Gone())
    scheduler = scheduler_for(chat)
    ticket, plain = scheduler.submit(request(chat.prepare(QUESTION))), scheduler.submit(PLAIN)
    run(scheduler, ticket, plain)
    assert list(ticket)[-1].finish_reason == "error"
    assert str(error) in str(ticket.error)
    assert list(plain)[-1].finish_reason == "length"
    assert (scheduler.stats().active, scheduler.stats().failed) == (0, 1)


def test_closing_ends_who_waits():
    shelf = Waiting()
    chat = build(lambda question, results: chain(question, results), knowledge=shelf)
    scheduler = scheduler_for(chat).start()
    ticket = scheduler.submit(request(chat.prepare(QUESTION)))
    assert shelf.began.wait(20)
    threading.Timer(0.1, shelf.go.set).start()
    scheduler.close()
    assert list(ticket)[-1].finish_reason == "cancelled"


def test_a_guide_steers_one_completion():
    chat = build()
    search = chat.prepare(QUESTION)
    with pytest.raises(UsageError, match="one completion"):
        scheduler_for(chat).submit(request(search, n=2))
