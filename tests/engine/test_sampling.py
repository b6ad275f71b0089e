"""Sampling against the definitions of its filters, written out naively."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.engine.sampling import Sampling, Stream, invert, sample
from nanochat.errors import UsageError


def allowed(logits: list[float], s: Sampling) -> dict[int, float]:
    """token -> probability, straight from the definitions."""
    probs = torch.softmax(torch.tensor(logits, dtype=torch.float64) / s.temperature, 0).tolist()
    ranked = sorted(range(len(probs)), key=lambda i: -probs[i])
    ranked = [i for i in ranked if probs[i] >= s.min_p * probs[ranked[0]]]
    if s.top_k:
        ranked = ranked[: s.top_k]
    total = sum(probs[i] for i in ranked)
    kept, mass = [], 0.0
    for i in ranked:
        if mass >= s.top_p:
            break
        kept.append(i)
        mass += probs[i] / total
    total = sum(probs[i] for i in kept)
    return {i: probs[i] / total for i in kept}


@pytest.mark.parametrize(
    "options",
    [{}, {"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.2}, {"top_k": 5, "top_p": 0.8, "min_p": 0.1}, {"temperature": 0.5}],
)
def test_frequencies_follow_the_definition(options):
    logits = [0.3, 2.0, -1.0, 1.5, 0.0, 1.0, -3.0]
    s = Sampling(**{"temperature": 1.0, "seed": 0, **options})
    expected = allowed(logits, s)
    n = 4000
    ids, logprobs = sample(torch.tensor([logits] * n), s, [Stream(0, j) for j in range(n)])
    assert set(ids) <= set(expected)
    for token, p in expected.items():
        assert abs(ids.count(token) / n - p) < 5 * math.sqrt(p * (1 - p) / n) + 1e-3
    own = torch.log_softmax(torch.tensor(logits), 0)
    assert logprobs == pytest.approx([own[i].item() for i in ids], abs=1e-5)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(-20, 20, width=16), min_size=2, max_size=40),
    st.floats(0.1, 3.0),
    st.integers(0, 50),
    st.floats(0.05, 1.0),
    st.floats(0.0, 1.0),
    st.integers(0, 2**31),
)
def test_every_choice_is_allowed(logits, temperature, top_k, top_p, min_p, seed):
    s = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    ids, _ = sample(torch.tensor([logits], dtype=torch.float32), s, [Stream(seed, 0)])
    # Rounding may move the border of a filter: compare with slightly wider ones.
    wide = Sampling(temperature=temperature, top_p=min(1.0, top_p + 1e-4), min_p=max(0.0, min_p - 1e-4))
    probs = allowed(logits, wide)
    assert logits[ids[0]] >= min(logits[i] for i in probs)  # which of equals is taken is open
    if top_k:
        better = sum(value > logits[ids[0]] for value in logits)
        assert better < top_k


def test_greedy_and_top_k_one_take_the_best():
    logits = torch.randn(5, 1000, generator=torch.Generator().manual_seed(0))
    for s in (Sampling(temperature=0.0), Sampling(top_k=1)):
        assert sample(logits.clone(), s, [])[0] == logits.argmax(1).tolist()


def test_a_row_does_not_depend_on_its_batch():
    logits = torch.randn(8, 3000, generator=torch.Generator().manual_seed(1)) * 4
    for options in ({}, {"top_p": 0.9}, {"top_k": 20, "min_p": 0.05}, {"top_p": 0.9999}):
        s = Sampling(seed=5, **options)
        whole, _ = sample(logits.clone(), s, [Stream(5, j) for j in range(8)])
        alone = [sample(logits[j : j + 1].clone(), s, [Stream(5, j)])[0][0] for j in range(8)]
        assert whole == alone


@pytest.mark.parametrize("least", [{"top_p": 5e-324}, {"temperature": 5e-324}, {"temperature": 1e-39}])
def test_the_smallest_numbers_are_greedy(least):
    logits = torch.randn(2, 500, generator=torch.Generator().manual_seed(1))
    streams = [Stream(0, i) for i in range(2)]
    assert sample(logits.clone(), Sampling(**least), streams)[0] == logits.argmax(-1).tolist()


def test_top_p_reaches_beyond_the_first_candidates():
    flat = torch.zeros(1, 5000)
    s = Sampling(temperature=1.0, top_p=0.99)
    ids = {sample(flat.clone(), s, [Stream(1, j)])[0][0] for j in range(200)}
    assert len(ids) > 150


def test_streams_repeat_with_a_seed_and_differ_without():
    assert [Stream(3, 1).uniform() for _ in range(3)] == [Stream(3, 1).uniform() for _ in range(3)]
    assert Stream(3, 1).uniform() != Stream(3, 2).uniform()
    assert Stream(None, 0).uniform() != Stream(None, 0).uniform()


def test_extreme_uniforms_never_choose_an_impossible_token():
    class Edge(Stream):
        def __init__(self, u: float) -> None:
            self.u = u

        def uniform(self) -> float:
            return self.u

    logits = torch.tensor([[-torch.inf, 1.0, -torch.inf, 0.5, -torch.inf]])
    for u, expected in ((0.0, 1), (1 - 2**-24, 3)):
        assert sample(logits.clone(), Sampling(temperature=1.0), [Edge(u)])[0] == [expected]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "--temperature -1.0"),
        ({"temperature": math.nan}, "--temperature nan"),
        ({"top_k": -1}, "--top_k -1"),
        ({"top_p": 0.0}, "--top_p 0.0"),
        ({"top_p": 1.1}, "--top_p 1.1"),
        ({"min_p": 2.0}, "--min_p 2.0"),
        ({"max_tokens": 0}, "--max_tokens 0"),
        ({"stop": ("a", "")}, "--stop"),
    ],
)
def test_values_out_of_range_are_refused(options, message):
    with pytest.raises(UsageError, match=message.replace(".", r"\.")):
        Sampling(**options)


def test_one_stop_string_may_stand_alone():
    assert Sampling(stop="END").stop == ("END",)
    assert Sampling(stop=["a", "b"]).stop == ("a", "b")


def test_a_large_vocabulary_is_drawn_from_in_two_levels():
    weights = torch.rand(1, 1000, generator=torch.Generator().manual_seed(0)) * (torch.arange(1000) % 3 > 0)
    sums = weights.double().cumsum(1)[0]
    n = 2000
    uniform = torch.arange(n) / n
    chosen = invert(weights.repeat(n, 1), uniform)
    assert (weights[0, chosen] > 0).all()
    expected = torch.searchsorted(sums, uniform.double() * sums[-1], right=True)
    assert (chosen - expected).abs().max() <= 2  # the neighbour, where rounding decides
    assert (chosen != expected).float().mean() < 0.01
