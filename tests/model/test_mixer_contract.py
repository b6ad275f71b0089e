"""The contract that every kind of mixer keeps: one suite over every row of MIXERS and over models built of them."""

from collections.abc import Sequence

import pytest
import torch
from mixer_oracles import oracle
from models import MODELS, mixer, model, noise, tokens
from torch import Tensor

from nanochat.model.lm import LM, MIXERS
from nanochat.model.mixer import State

LETTERS = list(MIXERS)
close = torch.testing.assert_close

VARIANTS = [
    ("T", {}),
    ("T", {"n_kv_head": 2, "window": 7}),
    ("T", {"n_kv_head": 1, "rope": False, "qk_norm": False}),
    ("T", {"key_offset": False}),
    ("M", {}),
    ("M", {"ssm_norm": False, "d_conv": 4}),
    ("M2", {}),
    ("M2", {"n_groups": 2}),
]


def logits(lm: LM, ids: Tensor, states: Sequence[State] | None = None, lengths: list[int] | None = None) -> Tensor:
    with torch.no_grad():
        return lm.logits(lm(ids, states, lengths=lengths))


def same(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    close(found, expected, rtol=0, atol=tolerance)
    assert torch.equal(found.argmax(-1), expected.argmax(-1))  # the greedy tokens


# ---- the mixers themselves


@pytest.mark.parametrize("letter", LETTERS)
def test_no_output_depends_on_a_later_input(letter: str) -> None:
    module, T = mixer(letter), 7
    x = noise(1, T, 32).requires_grad_()
    y = module(x)
    assert y.shape == x.shape
    for t in range(T):
        (gradient,) = torch.autograd.grad(y[0, t].sum(), x, retain_graph=True)
        size = gradient[0].abs().sum(-1)
        assert (size[t + 1 :] == 0).all()
        assert (size[: t + 1] > 0).all()


def test_a_window_sees_so_many_tokens_and_no_more() -> None:
    for key_offset in (False, True):  # the first of three keys is of the token before it, too
        module = mixer("T", window=3, key_offset=key_offset)
        x = noise(1, 8, 32).requires_grad_()
        (gradient,) = torch.autograd.grad(module(x)[0, 6].sum(), x)
        seen = (gradient[0].abs().sum(-1) > 0).tolist()
        assert seen == [False] * 3 + [key_offset] + [True] * 3 + [False]


@pytest.mark.parametrize("length", [1, 2, 3, 17, 64, 257])
@pytest.mark.parametrize(("letter", "options"), VARIANTS)
def test_matches_the_sequential_float64_oracle(letter: str, options: dict[str, object], length: int) -> None:
    module = mixer(letter, **options)
    x = noise(1, length, 32, seed=length)
    with torch.no_grad():
        found = module(x)[0]
    expected = oracle(module, x[0])
    close(found.double(), expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():  # what is left in fp32 is rounding: in float64 the two agree
        close(module.double()(x.double())[0], expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("letter", "options"), VARIANTS)
def test_gradients_of_input_and_every_parameter(letter: str, options: dict[str, object]) -> None:
    small = {"d_model": 6, "head_dim": 4, "d_state": 2, "d_state2": 2, "head_dim2": 3, "dt_rank": 2, "d_conv": 2}
    if options.get("n_kv_head") == 2:
        options = {**options, "n_head": 4}
    module = mixer(letter, **{**small, **options}).double()
    names, parameters = zip(*module.named_parameters())
    segments = torch.tensor([[0, 0, 0, 1, 1], [0, 1, 1, 1, 1]])

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, values)), (x, None, segments))

    x = noise(2, 5, 6, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(run, (x, *parameters))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("letter", LETTERS)
def test_every_dtype_of_activations(letter: str, dtype: torch.dtype) -> None:
    module = mixer(letter)
    x, T = noise(2, 6, 32), 6
    with torch.no_grad():
        expected = module(x)
        found = module(x.to(dtype))
        state = module.init_state(2, T, x.device, dtype)
        steps = torch.cat([module(x[:, t : t + 1].to(dtype), state) for t in range(T)], 1)
    assert found.dtype == steps.dtype == dtype
    tolerance = {torch.bfloat16: 0.1, torch.float16: 0.01, torch.float64: 1e-5}[dtype]
    close(found.float(), expected, rtol=0, atol=tolerance)
    close(steps.float(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("letter", LETTERS)
def test_gradients_flow_to_every_parameter(letter: str) -> None:
    module = mixer(letter)
    module(noise(2, 7, 32)).square().sum().backward()
    for name, p in module.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().sum() > 0, name


# ---- models: states


@pytest.mark.parametrize("name", MODELS)
def test_prefill_steps_chunks_and_the_stateless_pass_agree(name: str) -> None:
    lm, (B, T) = model(name), (3, 21)
    ids = tokens(B, T)
    expected = logits(lm, ids)
    same(logits(lm, ids, lm.init_states(B, T)), expected)
    for sizes in ([1] * T, [7, 7, 7], [1, 5, 2, 13], [20, 1], [2, 1, 1, 17]):
        states = lm.init_states(B)
        parts = [logits(lm, part, states) for part in ids.split(sizes, dim=1)]
        same(torch.cat(parts, 1), expected)


@pytest.mark.parametrize("name", MODELS)
def test_a_batch_equals_its_rows(name: str) -> None:
    lm, ids = model(name), tokens(3, 11)
    same(logits(lm, ids), torch.cat([logits(lm, row[None]) for row in ids]), 2e-5)


def ragged_pass(lm: LM, states: list[State], rows: list[Tensor]) -> list[Tensor]:
    lengths = [len(row) for row in rows]
    return list(logits(lm, torch.cat(rows)[None], states, lengths)[0].split(lengths))


@pytest.mark.parametrize("name", MODELS)
def test_rows_of_different_lengths_share_a_pass(name: str) -> None:
    """Ragged prefill, ragged continuation, single steps and equal chunks, each row compared with itself alone."""
    lm = model(name)
    rounds = [[5, 1, 9], [3, 12, 1], [1, 1, 1], [1, 1, 1], [4, 4, 4], [2, 1, 6], [1, 2, 1]]
    total = [sum(lengths[i] for lengths in rounds) for i in range(3)]
    rows = [tokens(n, seed=n) for n in total]
    expected = [logits(lm, row[None])[0] for row in rows]
    states, at = lm.init_states(3), [0, 0, 0]
    for number, lengths in enumerate(rounds):
        parts = [row[a : a + n] for row, a, n in zip(rows, at, lengths)]
        if len(set(lengths)) == 1 and number % 2 == 0:  # rectangular passes over rows with different pasts
            found = list(logits(lm, torch.stack(parts), states))
        else:
            found = ragged_pass(lm, states, parts)
        for i, n in enumerate(lengths):
            same(found[i], expected[i][at[i] : at[i] + n])
            at[i] += n


@pytest.mark.parametrize("name", MODELS)
def test_fork_snapshot_restore_select_and_reserve(name: str) -> None:
    lm, a, b = model(name), tokens(2, 9, seed=1), tokens(4, 6, seed=2)
    states = lm.init_states(2, 4)
    first = logits(lm, a, states)
    size = sum(state.nbytes for state in states)

    forked = [state.fork(2) for state in states]  # rows 0, 0, 1, 1
    assert sum(state.nbytes for state in forked) == 2 * size
    twice = a.repeat_interleave(2, dim=0)
    whole = logits(lm, torch.cat((twice, b), 1))
    same(whole[:, :9], first.repeat_interleave(2, dim=0))

    saved = [state.snapshot() for state in forked]
    for state in forked:
        state.reserve(6)
    same(logits(lm, b, forked), whole[:, 9:])
    for state, snapshot in zip(forked, saved):
        state.restore(snapshot)
    again = torch.cat([logits(lm, part, forked) for part in b.split(2, dim=1)], 1)
    same(again, whole[:, 9:])  # the snapshot was a copy
    for state, snapshot in zip(forked, saved):
        state.restore(snapshot)
    same(logits(lm, b[:, :3], forked), whole[:, 9:12])  # and restoring made another one

    rows = torch.tensor([3, 1])
    for state in forked:
        state.select(rows)
        state.reserve(3)
    same(logits(lm, b[rows, 3:], forked), whole[rows, 12:])
    # the original has seen none of this
    same(logits(lm, b[:2], states), logits(lm, torch.cat((a, b[:2]), 1))[:, 9:])


@pytest.mark.parametrize("name", MODELS)
def test_states_of_ragged_rows_fork_and_select(name: str) -> None:
    lm = model(name)
    rows = [tokens(n, seed=n) for n in (7, 2, 4)]
    states, more = lm.init_states(3), tokens(3, 5, seed=50)
    ragged_pass(lm, states, rows)
    chosen = [2, 0]
    for state in states:
        state.select(torch.tensor(chosen))
    forked = [state.fork(2).snapshot() for state in states]
    found = torch.cat([logits(lm, part.repeat_interleave(2, dim=0), forked) for part in more[:2].split(1, dim=1)], 1)
    for i, row in enumerate(chosen):
        expected = logits(lm, torch.cat((rows[row], more[i]))[None])[0, -5:]
        same(found[2 * i], expected)
        same(found[2 * i + 1], expected)


# ---- models: packed documents


@pytest.mark.parametrize("name", MODELS)
def test_packed_documents_are_as_separate_ones(name: str) -> None:
    lm = model(name)
    lengths = [[6, 1, 9, 70], [1, 1, 83, 1]]
    rows = [[tokens(n, seed=10 * r + i) for i, n in enumerate(row)] for r, row in enumerate(lengths)]
    ids = torch.stack([torch.cat(row) for row in rows])
    segments = torch.tensor([[i for i, n in enumerate(row) for _ in range(n)] for row in lengths], dtype=torch.int32)
    with torch.no_grad():
        found = lm.logits(lm(ids, segments_BT=segments))
    expected = torch.stack([torch.cat([logits(lm, document[None])[0] for document in row]) for row in rows])
    same(found, expected)


@pytest.mark.parametrize("letter", LETTERS)
def test_no_gradient_crosses_a_document_border(letter: str) -> None:
    module = mixer(letter)
    x = noise(1, 8, 32).requires_grad_()
    segments = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2]])
    y = module(x, segments_BT=segments)
    (gradient,) = torch.autograd.grad(y[0, 4].sum(), x)
    size = gradient[0].abs().sum(-1)  # M2 subtracts running sums of log-decays: other documents leave a rounding error
    assert (size > 1e-9 * size.max()).tolist() == [False, False, False, True, True, False, False, False]
