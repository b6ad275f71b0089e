"""Rows that come, go and decode in slots, against each row by itself."""

from __future__ import annotations

import random

import pytest
import torch
from tiny_lm import build

from nanochat.engine import cache, generate, slots
from nanochat.engine.generate import Batch, decode, prefill
from nanochat.engine.slots import Slots
from nanochat.model.lm import LM


@pytest.fixture(scope="module", params=["T", "M", "M2", "hybrid", "windowed"])
def model(request) -> LM:
    window = {"window": 8} if request.param == "windowed" else {}
    return build("T" if window else request.param, sequence_len=160, depth=2, d_model=32, **window)


def same(slots: Slots, alone: list[list]) -> None:
    assert slots.n == len(alone)
    for i, states in enumerate(alone):
        for a, b in zip(cache.row(slots.states, i), states):
            for x, y in zip(a.tensors().values(), b.tensors().values()):
                torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_rows_are_what_they_would_be_alone(model, monkeypatch):
    monkeypatch.setattr(slots, "SPARE_TOKENS", 3)  # so that room runs out
    rng = random.Random(1)

    def read(n: int) -> tuple[list, list[list]]:
        prompts = [[rng.randrange(256) for _ in range(rng.randint(1, 20))] for _ in range(n)]
        return prefill(model, prompts)[0], [prefill(model, [prompt])[0] for prompt in prompts]

    states, alone = read(3)
    held = Slots(states, model.init_states(1))
    for _ in range(40):
        what = rng.choice(["join", "keep", "decode", "decode"])
        if what == "join" and held.n < 10:
            states, more = read(rng.randint(1, 3))
            held.join(states)
            alone += more
        elif what == "keep" and held.n > 1:
            rows = sorted(rng.sample(range(held.n), rng.randint(1, held.n)))
            alone = [alone[i] for i in held.keep(rows)]
        else:
            ids = [rng.randrange(256) for _ in alone]
            held.reserve(1)
            hidden = decode(model, ids, held.states)
            expected = torch.cat([decode(model, [i], states) for i, states in zip(ids, alone)])
            torch.testing.assert_close(hidden, expected, atol=1e-4, rtol=1e-4)
        same(held, alone)


@torch.no_grad()
def test_a_row_that_joins_copies_no_other():
    model = build("hybrid", depth=2, d_model=32)
    held = Slots(prefill(model, [[1] * 9] * 6)[0], model.init_states(1))

    def places() -> list[int]:
        return [x.data_ptr() for state in held.states for name, x in state.tensors().items() if name != "lengths"]

    before = places()
    for _ in range(5):
        assert sorted(held.keep([0, 2, 3, 4, 5])) == [0, 2, 3, 4, 5]
        held.join(prefill(model, [[2] * 30])[0])
        assert places() == before
        held.reserve(1)
        decode(model, [1] * 6, held.states)


@torch.no_grad()
def test_rows_that_came_together_stay_side_by_side():
    model = build("T", depth=1, d_model=32)
    held = Slots(prefill(model, [[1] * 9] * 4)[0], model.init_states(1), 4)
    held.join(prefill(model, [[1] * 20] * 4)[0])
    assert held.keep([0, 2, 3, 4, 5, 6, 7]) == [0, 3, 2, 7, 4, 5, 6]
    assert held.states[0].lengths == [9] * 3 + [20] * 4
    assert held.keep([0, 4, 5]) == [0, 5, 4]
    for _ in range(2 * slots.COHORTS):  # there are never so many that a row that leaves moves many others
        held.join(prefill(model, [[1] * 5])[0])
    assert len(held._cohorts) == slots.COHORTS
    before = held.n
    assert sum(i != row for i, row in enumerate(held.keep(range(1, before)))) <= slots.COHORTS


@torch.no_grad()
@pytest.mark.parametrize("broken", [0, 2])
def test_what_a_broken_row_left_behind_reaches_no_other(broken):
    model = build("T", depth=2, d_model=32)
    states = prefill(model, [[i] * (40 if i == broken else 20) for i in range(3)])[0]
    for state in states:
        state.k[broken], state.v[broken] = torch.nan, torch.nan
    held = Slots(states, model.init_states(1), 1)
    assert held.keep([i for i in range(3) if i != broken]) == ([0, 1] if broken else [2, 1])
    held.join(prefill(model, [[4] * 5])[0])
    for _ in range(45):
        held.reserve(1)
        assert decode(model, [1] * 3, held.states).isfinite().all()


@torch.no_grad()
def test_room_that_nobody_needs_is_given_back():
    model = build("T", depth=1, d_model=32, sequence_len=4096)
    held = Slots(prefill(model, [[1] * 9] * 2)[0], model.init_states(1))
    held.join(prefill(model, [[1] * 3000])[0])
    large = held.states[0].k.stride(1)
    assert held.keep([0, 1]) == [0, 1]
    held.join(prefill(model, [[1] * 9])[0])
    assert held.states[0].k.stride(1) * 5 < large


def test_a_batch_moves_its_rows_and_says_so():
    """The rows after a step are those that the states belong to."""
    model = build("hybrid", depth=2, d_model=32)
    engine = generate.Engine(model, None, eos=(), decoder=lambda: None)
    batch: Batch = Batch(model)
    prompts = [[i] * (3 + i) for i in range(6)]
    for i, prompt in enumerate(prompts):
        states, hidden = prefill(model, [prompt])
        batch.join([engine.row(i, 0, prompt, generate.Sampling())], states, hidden)
    for gone in ([1], [0, 4], [5, 2]):
        for row in batch.rows:
            if row.number in gone:
                row.finish_reason = "stop"
        fed = {row.number: row.number + 7 for row in batch.rows}
        for row in batch.rows:
            prompts[row.number].append(fed[row.number])
        batch.step([fed[row.number] for row in batch.rows])
        with torch.no_grad():
            expected = torch.cat([prefill(model, [prompts[row.number]])[1] for row in batch.rows])
        torch.testing.assert_close(batch.hidden_BD, expected, atol=1e-4, rtol=1e-4)
    assert [row.number for row in batch.rows] == [3]
