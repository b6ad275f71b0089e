"""The attention mixer and its cache, beyond the contract of all mixers."""

import pytest
import torch
from models import config, mixer, noise

from nanochat.model.attention import Attention, KVState

close = torch.testing.assert_close


def attention(**options: object) -> Attention:
    module = mixer("T", **options)
    assert isinstance(module, Attention)
    return module


@pytest.mark.parametrize("n_kv_head", [2, 1])
def test_grouped_heads_are_full_heads_with_repeated_keys(n_kv_head: int) -> None:
    few, full = attention(n_kv_head=n_kv_head), attention()
    H, P = few.n_head, few.P
    with torch.no_grad():
        q, k, v = few.qkv.weight.split((H * P, n_kv_head * P, n_kv_head * P))
        k, v = (w.view(n_kv_head, P, -1).repeat_interleave(H // n_kv_head, 0).flatten(0, 1) for w in (k, v))
        full.qkv.weight.copy_(torch.cat((q, k, v)))
        full.out.weight.copy_(few.out.weight)
        x = noise(2, 9, 32)
        close(few(x), full(x))


def test_without_positions_only_the_set_of_the_past_matters() -> None:
    module, x = attention(rope=False, key_offset=False), noise(1, 6, 32)
    shuffled = x[:, [3, 0, 4, 1, 2, 5]]
    with torch.no_grad():
        close(module(x)[:, 5], module(shuffled)[:, 5])
        rotated = attention()
        assert not torch.allclose(rotated(x)[:, 5], rotated(shuffled)[:, 5], atol=1e-3)


def test_the_value_embedding_is_added_to_the_values() -> None:
    module, x, value = attention(n_kv_head=2), noise(1, 5, 32), noise(1, 5, 16, seed=3)
    with torch.no_grad():
        difference = module(x, value_BTC=value) - module(x)
        only = module.out(value.view(1, 5, 2, 8).repeat_interleave(2, 2).flatten(2)[:, :1])
    close(difference[:, :1], only, rtol=1e-4, atol=1e-5)  # the first token sees itself alone


def test_windows_follow_the_pattern_over_attention_layers() -> None:
    made = config(pattern="T M T T M T", depth=6, window=4, window_pattern="SSL")
    assert [made.window_of(i) for i in (0, 2, 3, 5)] == [4, 4, 0, 4]
    assert attention(layer=0, window=4).window == 4
    assert attention(window=4, window_pattern="L").window == 0


def state(lengths: list[int], room: int = 0) -> KVState:
    module = attention()
    made = module.init_state(len(lengths), room, torch.device("cpu"), torch.float32)
    assert isinstance(made, KVState)
    made.append(noise(len(lengths), max(lengths), 4, 8), noise(len(lengths), max(lengths), 4, 8, seed=1), lengths)
    return made


def test_nbytes_counts_what_is_live() -> None:
    made = state([5, 5], room=100)
    assert made.nbytes == 2 * (2 * 5 * 4 * 8) * 4 + 2 * 4 * 4 * 4 + 2 * 8
    assert made.longest == 5
    assert made.uniform
    before = made.nbytes
    made.reserve(500)
    assert made.nbytes == before


def test_room_grows_by_doubling_then_by_steps() -> None:
    made = state([3])
    addresses = set()
    for _ in range(200):
        made.append(noise(1, 1, 4, 8), noise(1, 1, 4, 8))
        addresses.add(made.k.data_ptr())
    assert made.lengths == [203]
    assert len(addresses) < 12  # few copies
    kept = made.snapshot()
    assert isinstance(kept, KVState)
    assert torch.equal(kept.k, made.tensors()["k"])


def test_selecting_the_short_rows_forgets_the_long_one() -> None:
    made = state([2, 9, 4])
    made.select(torch.tensor([2, 0]))
    assert (made.lengths, made.longest) == ([4, 2], 4)
    made.select(torch.tensor([1]))
    assert made.uniform
    assert made.nbytes == 2 * 2 * 4 * 8 * 4 + 4 * 4 * 4 + 8
