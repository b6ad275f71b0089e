"""The engine against the plainest way to generate: the whole sequence through the model again for every token."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_lm import build

from nanochat.engine import cache, generate
from nanochat.engine.generate import Engine, prefill
from nanochat.engine.sampling import Sampling
from nanochat.engine.text import TextStream
from nanochat.errors import UsageError
from nanochat.model.config import ModelConfig
from nanochat.model.lm import LM
from nanochat.tokenizer import StreamDecoder, Tokenizer

TOKENIZER = Tokenizer([bytes([i]) for i in range(256)])
PATTERNS = ("T", "M", "M2", "hybrid")
GREEDY = Sampling(max_tokens=12, temperature=0.0)


@pytest.fixture(scope="module", params=PATTERNS)
def model(request) -> LM:
    return build(request.param)


@pytest.fixture(scope="module")
def small() -> LM:
    return build("hybrid", depth=2, d_model=32)


def prompts(n: int, longest: int = 40, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(256) for _ in range(rng.randint(1, longest))] for _ in range(n)]


@torch.no_grad()
def naive(model: LM, prompt: list[int], n: int, eos: frozenset[int]) -> list[int]:
    ids = list(prompt)
    while len(ids) < len(prompt) + n:
        ids.append(int(model.logits(model(torch.tensor([ids]))[:, -1]).argmax()))
        if ids[-1] in eos:
            break
    return ids[len(prompt) :]


def test_a_ragged_batch_equals_the_plainest_generation(model):
    engine = Engine(model, TOKENIZER)
    given_prompts = prompts(9)
    completions = engine.generate_batch(given_prompts, GREEDY)
    assert [c.ids for c in completions] == [naive(model, p, 12, engine.eos) for p in given_prompts]
    for prompt, c in zip(given_prompts, completions):
        with torch.no_grad():
            logits = model.logits(model(torch.tensor([prompt + c.ids])))[0, len(prompt) - 1 : -1]
        expected = torch.log_softmax(logits, -1).gather(1, torch.tensor(c.ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(c.logprobs), expected, atol=1e-4, rtol=0)
        ended = c.ids[-1] in engine.eos
        assert c.text == TOKENIZER.decode(c.ids[:-1] if ended else c.ids)
        assert c.finish_reason == ("stop" if ended else "length")


def test_rows_that_wait_for_room_give_the_same(model):
    few, many = Engine(model, TOKENIZER, max_rows=3), Engine(model, TOKENIZER)
    sampling = Sampling(max_tokens=8, temperature=1.0, seed=4)
    given_prompts = prompts(8, seed=1)
    a, b = (e.generate_batch(given_prompts, sampling, n=2) for e in (few, many))
    assert [c.ids for c in a] == [c.ids for c in b]


def test_prefill_in_groups_and_chunks_equals_whole(model, monkeypatch):
    given_prompts = prompts(7, longest=60, seed=2)
    with torch.no_grad():
        states, hidden = prefill(model, given_prompts, room=4)
        monkeypatch.setattr(generate, "PREFILL_TOKENS", 16)
        chunked, hidden_chunked = prefill(model, given_prompts, room=4)
        whole = torch.cat([model(torch.tensor([p]))[:, -1] for p in given_prompts])
    torch.testing.assert_close(hidden, whole, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(hidden_chunked, whole, atol=1e-4, rtol=1e-4)
    assert cache.nbytes(states) == cache.nbytes(chunked)
    with torch.no_grad():
        next_ids = list(range(7))
        after = generate.decode(model, next_ids, chunked)
        expected = torch.cat([model(torch.tensor([[*p, i]]))[:, -1] for p, i in zip(given_prompts, next_ids)])
    torch.testing.assert_close(after, expected, atol=1e-4, rtol=1e-4)


def test_samples_of_one_prompt_differ_but_repeat_with_the_seed(model):
    engine = Engine(model, TOKENIZER)
    sampling = Sampling(max_tokens=10, temperature=1.0, seed=7)
    given_prompts = prompts(3, seed=3)
    forked = engine.generate_batch(given_prompts, sampling, n=3)
    assert len({tuple(c.ids) for c in forked}) == 9
    alone = [c.ids for p in given_prompts for c in engine.generate_batch([p], sampling, n=3)]
    assert [c.ids for c in forked] == alone
    single = engine.generate_batch([given_prompts[1]], sampling)
    assert single[0].ids == forked[3].ids  # the first sample of a prompt


def test_finished_rows_leave_and_no_forward_is_wasted(small, monkeypatch):
    sizes: list[int] = []
    decode = generate.decode

    def counting(model, ids, states):
        sizes.append(len(ids))
        return decode(model, ids, states)

    monkeypatch.setattr(generate, "decode", counting)
    context = small.config.sequence_len
    given_prompts = [[1] * (context - 1), [2] * 5, [3] * (context - 4)]  # room for 2, 9 and 5 tokens
    completions = Engine(small, TOKENIZER, eos=()).generate_batch(given_prompts, Sampling(max_tokens=9, temperature=0))
    assert [len(c.ids) for c in completions] == [2, 9, 5]
    assert sizes == [3, 2, 2, 2, 1, 1, 1, 1]


def test_only_the_last_position_of_a_prompt_becomes_logits(small, monkeypatch):
    shapes = []
    logits = small.logits
    monkeypatch.setattr(small, "logits", lambda hidden: shapes.append(tuple(hidden.shape)) or logits(hidden))
    Engine(small, TOKENIZER).generate_batch(prompts(3), Sampling(max_tokens=1))
    assert shapes == [(3, small.config.d_model)]


class Scripted:
    """A model that says what it is told: the engine's text handling without a network."""

    def __init__(self, script: list[int]) -> None:
        self.script = script
        self.config = ModelConfig(vocab_size=TOKENIZER.vocab_size, sequence_len=1000)
        self.device = torch.device("cpu")

    def init_states(self, batch, max_len=0):
        self.at = 0
        return []

    def __call__(self, ids, states, lengths=None):
        return torch.zeros(ids.shape[0], ids.shape[1], 1)

    def logits(self, hidden):
        out = torch.zeros(hidden.shape[0], TOKENIZER.vocab_size)
        out[:, self.script[self.at]] = 9.0
        self.at += 1
        return out


def run_script(script: list[int], stop=(), max_tokens: int = 1000):
    engine = Engine(Scripted([*script, TOKENIZER.eot]), TOKENIZER)
    stream = engine.stream([1], Sampling(temperature=0, stop=stop, max_tokens=max_tokens))
    pieces = []
    while True:
        try:
            pieces.append(next(stream))
        except StopIteration as end:
            return pieces, end.value


def test_stop_strings_across_tokens_never_show():
    pieces, done = run_script(list(b"The answer. EN ENDED"), stop=("END", "zzz"))
    assert "".join(pieces) == done.text == "The answer. EN "
    assert done.finish_reason == "stop"
    assert bytes(done.ids) == b"The answer. EN END"
    assert len(done.logprobs) == len(done.ids)


def test_the_end_token_ends_a_row_and_releases_held_text():
    pieces, done = run_script(list(b"almost EN"), stop=("END",))
    assert "".join(pieces) == done.text == "almost EN"
    assert done.ids[-1] == TOKENIZER.eot
    assert done.finish_reason == "stop"


def test_max_tokens_releases_held_text_and_half_characters():
    pieces, done = run_script(list("aé".encode()), max_tokens=2)
    assert "".join(pieces) == done.text == "a\ufffd"
    assert done.finish_reason == "length"


def test_skip_special_leaves_no_names():
    engine = Engine(Scripted([65, TOKENIZER.special("abstain"), 66, TOKENIZER.eot]), TOKENIZER, skip_special=True)
    assert engine.generate_batch([[1]], Sampling(temperature=0))[0].text == "AB"
    engine.model.at, engine.skip_special = 0, False
    assert engine.generate_batch([[1]], Sampling(temperature=0))[0].text == "A<|abstain|>B"


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet="abé日🎉 ", max_size=30), st.lists(st.text("abé日", min_size=1, max_size=4), max_size=3))
def test_text_stream_is_the_text_up_to_the_first_stop_string(text, stops):
    stream = TextStream(StreamDecoder(TOKENIZER), stops)
    shown = ""
    for byte in text.encode():
        shown += stream.push(byte)
        assert "\ufffd" not in shown
        assert text.startswith(shown)
        if stream.stopped:
            break
    shown += stream.finish()
    # The first stop string to be complete ends the text, where it begins.
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    if not ends:
        assert shown == text
        assert not stream.stopped
    else:
        seen = text[: min(ends)]
        assert shown == seen[: min(seen.find(stop) for stop in stops if stop in seen)]


def test_prompts_that_do_not_fit_are_named(small):
    engine = Engine(small, TOKENIZER)
    with pytest.raises(UsageError, match="prompt 1 has 97 tokens, the model's context only 96"):
        engine.generate_batch([[1], [1] * 97])
    with pytest.raises(UsageError, match="the prompt is empty"):
        engine.generate_batch([[]])
    with pytest.raises(UsageError, match="n=0"):
        engine.generate_batch([[1]], n=0)
    assert engine.generate_batch([]) == []


def test_generating_disturbs_neither_training_nor_random_numbers(small):
    before = torch.get_rng_state()
    Engine(small, TOKENIZER).generate_batch(prompts(2), Sampling(max_tokens=3))
    assert torch.equal(before, torch.get_rng_state())
    ids = torch.randint(0, 256, (2, 16))
    small.loss(ids, ids, torch.ones(2, 16)).backward()  # nothing that generation cached is in the way
    assert all(p.grad is not None for p in small.parameters() if p.dim() == 2)
    small.zero_grad()


def test_a_batch_can_be_joined_forked_and_cut(model):
    with torch.no_grad():
        first, second = prompts(2, seed=8)
        a, _ = prefill(model, [first])
        b, _ = prefill(model, [second])
        states = cache.fork(cache.join([a, b], model.init_states(1)), 2)
        cache.select(states, [3, 0])
        cache.reserve(states, 3)
        hidden = generate.decode(model, [5, 6], states)
        expected = torch.cat([model(torch.tensor([[*second, 5]]))[:, -1], model(torch.tensor([[*first, 6]]))[:, -1]])
    torch.testing.assert_close(hidden, expected, atol=1e-4, rtol=1e-4)
