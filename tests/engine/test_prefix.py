"""The cache of states after documents, against the engine without it."""

import random
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_lm import build

from nanochat.engine import cache, generate
from nanochat.engine.generate import Engine
from nanochat.engine.prefix import PrefixCache, document_boundaries, message_boundaries
from nanochat.engine.prefix import _bytes as _ids
from nanochat.engine.sampling import Sampling
from nanochat.errors import UsageError
from nanochat.model.lm import LM
from nanochat.tokenizer import Tokenizer

TOKENIZER = Tokenizer([bytes([i]) for i in range(256)])
GREEDY = Sampling(max_tokens=10, temperature=0.0)


@pytest.fixture(scope="module", params=["T", "M", "M2", "hybrid", "windowed"])
def model(request) -> LM:
    kind = {"pattern": "T", "window": 8} if request.param == "windowed" else {"pattern": request.param}
    return build(**kind, sequence_len=160)


@pytest.fixture(scope="module")
def tiny() -> LM:
    return build("hybrid", sequence_len=160, depth=2, d_model=16)


def letters(rng: random.Random, n: int) -> str:
    return "".join(chr(rng.randrange(97, 123)) for _ in range(n))


def prompt(documents, question: str) -> list[int]:
    parts = [{"type": "document", "title": str(n), "text": text} for n, text in enumerate(documents, 1)]
    messages = [{"role": "retrieval", "content": parts}, {"role": "user", "content": question}]
    return TOKENIZER.render_prompt({"messages": messages}).ids


def some_prompts(n: int, seed: int = 0) -> list[list[int]]:
    """Prompts that share documents: all, the first few, or none of them."""
    rng = random.Random(seed)
    sets = [[letters(rng, rng.randint(3, 20)) for _ in range(rng.randint(1, 4))] for _ in range(3)]
    prompts = []
    for _ in range(n):
        documents = list(rng.choice(sets))
        if rng.random() < 0.5:
            documents = [*documents[: rng.randint(0, len(documents))], letters(rng, 5)]
        prompts.append(prompt(documents, letters(rng, rng.randint(1, 30))))
    return prompts


def check(prefixes: PrefixCache) -> None:
    """The tree holds what the order lists, and no node without use."""
    nodes, waiting = [], [prefixes._root]
    while waiting:
        node = waiting.pop()
        children = [child for some in node.children.values() for child in some.values()]
        assert node.fixed is not None or children
        nodes.append(node)
        waiting += children
    assert set(nodes[1:]) == set(prefixes._order)
    assert prefixes.nbytes == sum(node.nbytes for node in nodes) <= prefixes.max_bytes


def test_ragged_batches_give_the_same_cold_warm_and_forked(model):
    engine, prefixes = Engine(model, TOKENIZER, max_rows=5), PrefixCache(spacing=0)
    prompts = some_prompts(9)
    expected = engine.generate_batch(prompts, GREEDY)
    for _ in range(2):  # the second time everything up to the questions comes from the cache
        found = engine.generate_batch(prompts, GREEDY, prefix_cache=prefixes)
        assert [c.ids for c in found] == [c.ids for c in expected]
        for a, b in zip(found, expected):
            torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=1e-4, rtol=0)
    sampling = Sampling(max_tokens=6, temperature=1.0, seed=5)
    forked = engine.generate_batch(prompts[:3], sampling, n=3, prefix_cache=prefixes)
    assert [c.ids for c in forked] == [c.ids for c in engine.generate_batch(prompts[:3], sampling, n=3)]


def test_streams_take_it_too(model):
    engine, prefixes = Engine(model, TOKENIZER), PrefixCache()
    for ids in (some := some_prompts(3, seed=1)) + some:
        assert "".join(engine.stream(ids, GREEDY, prefix_cache=prefixes)) == "".join(engine.stream(ids, GREEDY))
    assert prefixes.hits >= 3


def test_only_what_follows_the_documents_is_read_again(tiny, monkeypatch):
    documents = ["one", "two", "three"]
    a, b = prompt(documents, "who?"), prompt(documents, "where, then?")
    prefixes, engine = PrefixCache(), Engine(tiny, TOKENIZER)
    engine.generate_batch([a], GREEDY, prefix_cache=prefixes)
    read: list[int] = []
    forward = LM.forward

    def counting(self, ids, states=None, *args, **kwargs):
        read.append(ids.numel())
        return forward(self, ids, states, *args, **kwargs)

    monkeypatch.setattr(LM, "forward", counting)
    engine.generate_batch([b], Sampling(max_tokens=1), prefix_cache=prefixes)
    assert sum(read) == len(b) - document_boundaries(b, TOKENIZER)[-1]
    assert prefixes.tokens_saved == document_boundaries(b, TOKENIZER)[-1]
    assert (prefixes.hits, prefixes.misses) == (1, 1)


def test_a_restored_state_is_not_touched_by_what_follows(model):
    prefixes, ids = PrefixCache(), some_prompts(1)[0]
    engine = Engine(model, TOKENIZER)
    first = engine.generate_batch([ids], GREEDY, prefix_cache=prefixes)
    end = document_boundaries(ids, TOKENIZER)[-1]

    def contents() -> list[torch.Tensor]:
        return [x.clone() for state in prefixes.get(ids).states for x in state.tensors().values()]

    before = contents()
    assert prefixes.get(ids).n == end
    assert engine.generate_batch([ids], GREEDY, prefix_cache=prefixes) == first
    for a, b in zip(before, contents()):
        assert torch.equal(a, b)
    fresh = model.init_states(1)
    with torch.no_grad():
        model(torch.tensor([ids[:end]]), fresh)
    for a, b in zip(before, (x for state in fresh for x in state.tensors().values())):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_boundaries_of_ones_own_and_long_passes(model, monkeypatch):
    ids = [random.Random(3).randrange(256) for _ in range(60)]
    engine, prefixes = Engine(model, TOKENIZER), PrefixCache()
    expected = engine.generate_batch([ids], GREEDY)[0].ids
    monkeypatch.setattr(generate, "PREFILL_TOKENS", 16)
    for boundaries in ([0, 31, 7, 7], [50], [60, 99, -4], [5], []):
        found = engine.generate_batch([ids], GREEDY, prefix_cache=prefixes, boundaries=[boundaries])
        assert found[0].ids == expected
    assert len(prefixes) == 3  # 7, 31, 50: the last token is never stored, nor what lies before a longer beginning
    assert [prefixes.get(ids[:n]).n for n in (6, 7, 30, 49, 50, 60)] == [0, 7, 7, 31, 50, 50]


def test_snapshots_after_messages():
    messages = [
        {"role": "system", "content": "a" * 20},
        {"role": "user", "content": "b" * 5},
        {"role": "assistant", "content": "c" * 30},
        {"role": "user", "content": "d" * 40},
    ]
    ids = TOKENIZER.render_prompt({"messages": messages}).ids
    every = message_boundaries(ids, TOKENIZER)
    assert [TOKENIZER.decode(ids[n - 2 : n])[0] for n in every] == list("abcd")
    assert every[-1] == len(ids) - 1  # before <|assistant_start|>
    assert message_boundaries(ids, TOKENIZER, 20) == [every[0], every[2], every[3]]
    assert message_boundaries(ids, TOKENIZER, 20, every[2] - 10) == every[3:]


def test_where_snapshots_are_taken():
    ids = prompt(["a" * 10, "b" * 50, "c" * 5, "d" * 5, "e" * 60, "f"], "Who?")
    every = document_boundaries(ids, TOKENIZER)
    assert [TOKENIZER.decode(ids[n - 2 : n]) for n in every] == [f"{c}<|doc_end|>" for c in "abcdef"]
    assert document_boundaries(ids, TOKENIZER, 40) == [every[1], every[4], every[5]]
    assert document_boundaries(ids, TOKENIZER, 1000) == [every[-1]]
    assert document_boundaries([1, 2], TOKENIZER, 40) == []


def test_what_grows_with_the_tokens_is_stored_once(model):
    """Ten boundaries of one prompt hold no more keys and values than the last state alone."""
    ids = [1] * 100
    many, one = PrefixCache(), PrefixCache()
    for prefixes, boundaries in ((many, range(10, 100, 10)), (one, [90])):
        prefixes.bind(model)
        with torch.no_grad():
            begun = prefixes.begin(ids, boundaries)
    constant = sum(
        x.numel() * x.element_size()
        for state, empty in zip(begun.states, model.init_states(1))
        for x, e in zip(state.tensors().values(), empty.tensors().values())
        if x.shape == e.shape
    )
    overhead = sum(len(state.tensors()) for state in begun.states) * 1024
    assert len(many) == 9
    assert many.nbytes - one.nbytes == 8 * (constant + overhead)
    assert one.nbytes == cache.nbytes(begun.states) + overhead + 90 * 4


def test_a_thousand_different_prompts_stay_within_the_bound(tiny):
    bound = 400_000
    prefixes, engine = PrefixCache(bound), Engine(tiny, TOKENIZER)
    prefixes.bind(tiny)
    rng = random.Random(0)
    kept = prompt(["stays", "here"], "?")
    expected = engine.generate_batch([kept], GREEDY)[0].ids
    for _ in range(1000):
        ids = prompt([letters(rng, rng.randint(5, 40))], "?")
        with torch.no_grad():
            prefixes.begin(ids, document_boundaries(ids, TOKENIZER))
        prefixes.get(kept)
        if not prefixes.hits:
            engine.generate_batch([kept], GREEDY, prefix_cache=prefixes)
    check(prefixes)
    assert len(prefixes) > 3
    assert prefixes.get(kept).n == document_boundaries(kept, TOKENIZER)[-1]  # in use, so it was never the oldest
    assert engine.generate_batch([kept], GREEDY, prefix_cache=prefixes)[0].ids == expected


def test_states_larger_than_the_bound_are_not_stored(tiny):
    ids, engine = prompt(["a", "b"], "?"), Engine(tiny, TOKENIZER)
    for bound in (0, 5000):
        prefixes = PrefixCache(bound)
        found = engine.generate_batch([ids], GREEDY, prefix_cache=prefixes)
        assert found[0].ids == engine.generate_batch([ids], GREEDY)[0].ids
        assert prefixes.nbytes == len(prefixes) == 0


@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=12),
    offsets=st.lists(st.integers(0, 12), max_size=4),
    bound=st.integers(0, 120_000),
)
def test_get_finds_the_longest_beginning_and_nothing_else(tiny, rows, offsets, bound):
    prefixes = PrefixCache(bound)
    prefixes.bind(tiny)
    stored = set()
    for ids in rows:
        with torch.no_grad():
            prefixes.begin(ids, offsets)
        stored |= {tuple(ids[:n]) for n in offsets if 0 < n < len(ids)}
        check(prefixes)
    unbounded = bound > sum(node.nbytes for node in prefixes._order) and len(prefixes) == len(stored)
    for ids in rows:
        begun = prefixes.get(ids)
        fitting = [len(s) for s in stored if s == tuple(ids[: len(s)])]
        assert begun.n in {0, *fitting}
        if unbounded:
            assert begun.n == max([0, *fitting])
        states = tiny.init_states(1)
        if begun.n:
            with torch.no_grad():
                tiny(torch.tensor([ids[: begun.n]]), states)
        for a, b in zip(begun.states, states):
            for x, y in zip(a.tensors().values(), b.tensors().values()):
                torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_what_is_used_often_outlives_what_is_new(tiny):
    system, rng = [7] * 30, random.Random(1)
    prefixes = PrefixCache(400_000)
    prefixes.bind(tiny)
    prefixes.begin([*system, 1], [30])
    for i in range(150):
        if i < 20:
            prefixes.get([*system, i])
        ids = [rng.randrange(256) for _ in range(60)]
        prefixes.begin(ids, [50])  # saves more tokens, but only itself
    check(prefixes)
    assert prefixes.get([*system, 1]).n == 30
    for _ in range(3000):  # nothing lasts for ever
        prefixes.begin([rng.randrange(256) for _ in range(60)], [50])
        if prefixes._longest(_ids([*system, 1])).n == 0:
            break
    else:
        raise AssertionError("what is not used any more never leaves")


@torch.no_grad()
@pytest.mark.parametrize("pattern", ["M2", "hybrid"])
def test_a_long_conversation_keeps_its_last_turns(pattern):
    """The snapshots of earlier turns leave by themselves, although the later ones stand on them."""
    model = build(pattern, sequence_len=160, depth=2, d_model=16)
    ids = [random.Random(2).randrange(256) for _ in range(130)]
    one = PrefixCache()
    one.bind(model)
    one.begin(ids, [120])
    prefixes = PrefixCache(3 * one.nbytes)
    prefixes.bind(model)
    for end in range(10, 130, 10):
        begun = prefixes.begin(ids[: end + 1], [end])
        check(prefixes)
        assert prefixes.get(ids).n == begun.n == end
    assert any(node.fixed is None for node in prefixes._order)
    for node in list(prefixes._order):
        found, fresh = prefixes.get(ids[: node.n]), model.init_states(1)
        if found.n:
            model(torch.tensor([ids[: found.n]]), fresh)
        for a, b in zip(found.states, fresh):
            for x, y in zip(a.tensors().values(), b.tensors().values()):
                torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)
    gone = next(node.n for node in prefixes._order if node.fixed is None)
    prefixes.begin(ids[: gone + 1], [gone])  # and may come back
    check(prefixes)
    assert prefixes.get(ids[: gone + 1]).n == gone


def test_threads_share_it(tiny):
    prefixes, engine = PrefixCache(60_000), Engine(tiny, TOKENIZER)
    prompts = some_prompts(6, seed=2)
    expected = [c.ids for c in engine.generate_batch(prompts, GREEDY)]
    wrong: list[object] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        try:
            for _ in range(15):
                i = rng.randrange(len(prompts))
                if engine.generate_batch([prompts[i]], GREEDY, prefix_cache=prefixes)[0].ids != expected[i]:
                    wrong.append(i)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert prefixes.nbytes <= 60_000


def test_wrong_use_is_refused(tiny):
    for options in ({"max_bytes": -1}, {"spacing": -1}):
        with pytest.raises(UsageError, match="expected at least 0"):
            PrefixCache(**options)
    prefixes = PrefixCache()
    with pytest.raises(UsageError, match="serves no model yet"):
        prefixes.get([1, 2])
    prefixes.bind(tiny)
    with pytest.raises(UsageError, match="another model"):
        Engine(build("M", depth=1), TOKENIZER).generate_batch([[1, 2]], GREEDY, prefix_cache=prefixes)
    with pytest.raises(UsageError, match="2 lists of boundaries for 1 prompts"):
        Engine(tiny, TOKENIZER).generate_batch([[1, 2]], GREEDY, prefix_cache=prefixes, boundaries=[[1], [1]])
    with torch.no_grad():
        prefixes.begin([1, 2, 3], [2])
    prefixes.clear()
    assert prefixes.nbytes == len(prefixes) == prefixes.get([1, 2, 3]).n == 0
