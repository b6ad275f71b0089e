"""Plain products against the oracle, and how rows are cut into runs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanochat.kernels import attention_cache
from nanochat.kernels.attention import attention, attention_ref
from nanochat.kernels.attention_cache import runs


def qkv(n_batch: int, n_time: int, n_source: int, n_group: int) -> tuple[torch.Tensor, ...]:
    """As a cache holds them: heads first, with room behind, and what is no number in that room."""
    generator = torch.Generator().manual_seed(n_batch + n_source)
    q = torch.randn(n_batch, n_time, 4, 16, generator=generator)
    k, v = torch.randn(2, n_batch, n_group, n_source + 9, 16, generator=generator).unbind()
    k[:, :, n_source:], v[:, :, n_source:] = torch.nan, torch.nan
    return q, k[:, :, :n_source].transpose(1, 2), v[:, :, :n_source].transpose(1, 2)


@torch.no_grad()
@pytest.mark.parametrize("n_batch", [1, 5, 37])
@pytest.mark.parametrize("n_group", [4, 2, 1])
@pytest.mark.parametrize("window", [0, 7])
@pytest.mark.parametrize("n_time", [1, 6])
@pytest.mark.parametrize("ragged", [False, True])
def test_it_is_the_oracle(
    monkeypatch: pytest.MonkeyPatch, n_batch: int, n_group: int, window: int, n_time: int, ragged: bool
) -> None:
    monkeypatch.setattr(attention_cache, "MANY", 0)
    monkeypatch.setattr(attention_cache, "CALL_BYTES", 1 << 12)  # so that there are several runs
    q, k, v = qkv(n_batch, n_time, 50, n_group)
    assert attention_cache.fits(q, 50)
    start = torch.arange(n_batch) * 13 % (51 - n_time) if ragged else None
    found = attention(q, k, v, window=window, start=start, scale=0.3)
    expected = attention_ref(q, k, v, None, window, None, start, 0.3)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("n_group", [4, 2])
def test_prompts_and_packed_rows(n_group: int) -> None:
    q, k, v = qkv(3, 40, 40, n_group)
    torch.testing.assert_close(attention(q, k, v), attention_ref(q, k, v), atol=1e-5, rtol=1e-5)
    segments = (torch.arange(40) // 11).expand(3, -1)
    found = attention(q, k, v, segments_BT=segments)
    torch.testing.assert_close(found, attention_ref(q, k, v, segments), atol=1e-5, rtol=1e-5)


def test_where_it_is_not_taken() -> None:
    q = torch.zeros(2, 3, 4, 16)
    assert not attention_cache.fits(q, 10)  # gradients
    with torch.no_grad():
        assert attention_cache.fits(q, 10)
        assert not attention_cache.fits(q.bfloat16(), 10)
        assert not attention_cache.fits(q, attention_cache.SCORE_BYTES)


@given(st.lists(st.integers(1, 600), min_size=1, max_size=100))
def test_runs_cover_every_row_once(lengths: list[int]) -> None:
    found = runs(lengths, 2048)
    assert [i for rows, _ in found for i in range(rows.start, rows.stop)] == list(range(len(lengths)))
    for rows, longest in found:
        assert longest == max(lengths[rows])
        assert rows.start % attention_cache.RUN == 0
        assert rows.stop - rows.start <= attention_cache.RUN or longest * (rows.stop - rows.start) * 2048 <= 2 << 23


def test_rows_of_another_length_are_a_run_of_their_own() -> None:
    found = runs([40] * 16 + [300] * 16 + [41] * 8, 2048)
    assert found == [(slice(0, 16), 40), (slice(16, 24), 300), (slice(24, 32), 300), (slice(32, 40), 41)]
    assert runs([40, 41] * 12, 2048) == [(slice(0, 24), 41)]
