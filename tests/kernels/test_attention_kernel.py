"""Attention in all the shapes that need no mask, against explicit scores in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import LENGTHS, compare, documents, leaves
from torch import Tensor

from nanochat.kernels import attention as kernels
from nanochat.kernels.attention import attention, attention_ref


def inputs(n_batch: int, n_time: int, n_source: int, n_head: int = 4, n_group: int = 2, width: int = 8) -> list[Tensor]:
    """q, k, v in float64."""
    g = torch.Generator().manual_seed(n_time)
    shapes = (n_batch, n_time, n_head, width), *[(n_batch, n_source, n_group, width)] * 2
    return leaves([torch.randn(shape, generator=g) for shape in shapes], torch.float64)


@pytest.mark.parametrize("n_time", LENGTHS)
@pytest.mark.parametrize("packed", [0, 4, 30, 1000])
@pytest.mark.parametrize("window", [0, 5, 40, 64])
def test_matches_the_oracle(n_time: int, packed: int, window: int) -> None:
    options = {"segments_BT": documents(2, n_time, packed)} if packed else {}
    tensors = leaves(inputs(2, n_time, n_time), torch.float32)
    compare(attention, attention_ref, tensors, 1e-5, window=window, **options)


@pytest.mark.parametrize("n_head", [1, 2, 6])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_groups_and_scale(n_head: int, scale: float | None) -> None:
    tensors = leaves(inputs(2, 20, 20, n_head, 1), torch.float32)
    compare(attention, attention_ref, tensors, 1e-5, segments_BT=documents(2, 20), scale=scale)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 20), st.integers(0, 20), st.integers(0, 12), st.data())
def test_queries_against_a_longer_cache(
    n_batch: int, n_time: int, n_past: int, window: int, data: st.DataObject
) -> None:
    q, k, v = inputs(n_batch, n_time, n_time + n_past)
    starts = st.one_of(st.none(), st.lists(st.integers(0, n_past), min_size=n_batch, max_size=n_batch))
    start = data.draw(starts)
    options = {"window": window, "start": None if start is None else torch.tensor(start)}
    if data.draw(st.booleans()):
        options["segments_BT"] = documents(n_batch, n_time)
    if data.draw(st.booleans()):
        valid = st.lists(st.integers(1, n_time + n_past), min_size=n_batch, max_size=n_batch)
        options["lengths"] = torch.tensor(data.draw(valid))
    torch.testing.assert_close(attention(q, k, v, **options), attention_ref(q, k, v, **options))


def test_gradcheck() -> None:
    segments = torch.tensor([[0, 0, 0, 1, 2, 2], [0, 0, 0, 0, 1, 1]])
    tensors = inputs(2, 6, 6, 2, 1, 2)
    assert torch.autograd.gradcheck(lambda *x: attention(*x, segments_BT=segments), tensors)


def test_packed_documents_are_separate_documents() -> None:
    q, k, v = inputs(1, 60, 60)
    segments = torch.repeat_interleave(torch.arange(4), torch.tensor([25, 1, 3, 31]))[None]
    packed = attention(q, k, v, segments_BT=segments)
    for n in range(4):
        part = (segments == n)[0]
        torch.testing.assert_close(packed[:, part], attention(q[:, part], k[:, part], v[:, part]))


def test_a_cache_in_two_pieces_is_the_whole() -> None:
    q, k, v = inputs(2, 30, 30)
    whole = attention(q, k, v)
    torch.testing.assert_close(attention(q[:, 20:], k, v), whole[:, 20:])
    torch.testing.assert_close(attention(q[:, 29:], k, v), whole[:, 29:])


def test_rows_at_different_positions_ignore_what_lies_behind() -> None:
    q, k, v = inputs(2, 1, 20)
    start = torch.tensor([4, 19])
    y = attention(q, k, v, start=start)
    torch.testing.assert_close(y[:1], attention(q[:1], k[:1, :5], v[:1, :5]))
    torch.testing.assert_close(y[1:], attention(q[1:], k[1:], v[1:]))


def test_a_query_that_sees_nothing_gets_zeros() -> None:
    q, k, v = inputs(1, 2, 4)
    y = attention(q, k, v, start=torch.tensor([2]), window=1, lengths=torch.tensor([2]))
    assert y.abs().sum() == 0


@pytest.mark.parametrize("window", [0, 7, 60])
@pytest.mark.parametrize("options", [{}, {"start": torch.tensor([0, 40])}, {"lengths": torch.tensor([90, 3])}])
def test_a_mask_for_a_few_queries_at_a_time(
    window: int, options: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "QUERIES", 16)
    tensors = leaves(inputs(2, 50, 90), torch.float32)
    compare(attention, attention_ref, tensors, 1e-5, window=window, **options)
    q, k, v = inputs(2, 90, 90)  # a window too long for blocks
    wanted, masks, visible = attention_ref(q, k, v, window=60), [], kernels.visible
    monkeypatch.setattr(kernels, "visible", lambda *x, **k: masks.append(visible(*x, **k)) or masks[-1])
    torch.testing.assert_close(attention(q, k, v, window=60), wanted)
    assert max(mask.shape[1] for mask in masks) == 16


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("packed", [0, 30])
@pytest.mark.parametrize("window", [0, 5])
def test_block_masks(packed: int, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_KERNEL_ATTENTION", "flex")
    options = {"segments_BT": documents(2, 40, packed)} if packed else {}
    q, k, v = (x.detach().float() for x in inputs(2, 40, 40))
    found = attention(q, k, v, window=window, **options)
    torch.testing.assert_close(found, attention_ref(q, k, v, window=window, **options))
