"""The architecture: one dial, patterns, and one clear error for each mistake."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.errors import UsageError
from nanochat.model.config import ModelConfig, expand_pattern, named_patterns

T, M, M2 = "T", "M", "M2"


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 6, 12, 20])
def test_depth_alone_gives_a_sensible_model(depth: int) -> None:
    config = ModelConfig(depth=depth).resolved()
    assert config.d_model == 64 * depth
    assert (config.n_head, config.n_kv_head, config.head_dim) == (depth, depth, 64)
    assert config.dt_rank == 4 * depth
    assert len(config.blocks) == depth
    assert config.resolved() == config
    assert ModelConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("pattern", "depth", "expected"),
    [
        ("transformer", 3, (T, T, T)),
        ("mamba", 2, (M, M)),
        ("mamba2", 2, (M2, M2)),
        ("hybrid", 4, (M2, M2, M2, T)),
        ("hybrid", 3, (M2, M2, T)),
        ("hybrid", 1, (M2,)),
        ("early", 5, (T, T, M2, M2, M2)),
        ("late", 4, (M2, M2, T, T)),
        ("alternate", 4, (M2, T, M2, T)),
        ("sandwich", 6, (T, M2, M2, M2, M2, T)),
        ("sandwich", 2, (M2, T)),
        ("1in8", 8, (M2,) * 7 + (T,)),
        ("MMMT", 8, (M, M, M, T, M, M, M, T)),
        ("M2 M2 T", 3, (M2, M2, T)),
        ("M2,M,T", 3, (M2, M, T)),
        ("M2M2T", 6, (M2, M2, T, M2, M2, T)),
        ("T-M", 4, (T, M, T, M)),
    ],
)
def test_patterns(pattern: str, depth: int, expected: tuple[str, ...]) -> None:
    assert expand_pattern(pattern, depth, "M2") == expected


@given(st.integers(1, 40), st.sampled_from(["M", "M2"]))
def test_named_patterns_have_the_depth_and_the_kinds_that_they_promise(depth: int, ssm: str) -> None:
    for name, blocks in named_patterns(depth, ssm).items():
        assert len(blocks) == depth, name
        kinds = {"transformer": {T}, "mamba": {M}, "mamba2": {M2}}.get(name, {T, ssm})
        assert set(blocks) <= kinds, name
        if len(kinds) == 2 and depth > 1:
            assert set(blocks) == kinds, name


@given(st.lists(st.sampled_from(["T", "M", "M2"]), min_size=1, max_size=12), st.sampled_from(["", " ", ",", "-", ", "]))
def test_letters_come_back_whatever_separates_them(letters: list[str], separator: str) -> None:
    assert expand_pattern(separator.join(letters), len(letters), "M2") == tuple(letters)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"pattern": "MMX"},
            r"--pattern 'MMX': unknown block letter 'X'\. Letters are T \(attention\), M \(Mamba\), M2",
        ),
        ({"pattern": "T3"}, "unknown block letter '3'"),
        ({"pattern": "hybird"}, r"Did you mean 'hybrid'\?"),
        ({"pattern": ""}, "--pattern ''"),
        ({"pattern": "MMT", "depth": 4}, "--pattern 'MMT' names 3 blocks, which does not divide --depth 4"),
        ({"depth": 0}, "--depth 0: a model needs at least one block"),
        ({"d_model": -8}, "--d_model -8"),
        ({"ssm": "T"}, "--ssm 'T': must be M or M2"),
        ({"n_head": 4, "n_kv_head": 3}, "--n_kv_head 3 does not divide --n_head 4"),
        ({"n_head": 2, "n_kv_head": 4}, "--n_kv_head 4 does not divide --n_head 2"),
        ({"head_dim": 15, "n_head": 2, "pattern": "T"}, "--head_dim 15: rotary positions need an even head width"),
        ({"head_dim": 0}, "--head_dim 0: must be at least 1"),
        ({"head_dim2": 0}, "--head_dim2 0: must be at least 1"),
        ({"head_dim2": 48}, "--head_dim2 48 does not divide the inner width 512"),
        ({"n_groups": 3}, "--n_groups 3 does not divide the 8 heads of M2"),
        ({"activation": "relu"}, "--activation 'relu': must be one of relu2, gelu, swiglu"),
        ({"window_pattern": "SX"}, "--window_pattern 'SX'"),
        ({"window": -1}, "--window -1"),
        ({"vocab_size": 0}, "--vocab_size 0: must be at least 1"),
        ({"sequence_len": 0}, "--sequence_len 0: must be at least 1"),
        ({"d_conv": 0}, "--d_conv 0: must be at least 1"),
        ({"softcap": -1.0}, "--softcap -1.0: must be 0"),
        ({"mlp_t": -1.0}, "--mlp_t -1.0: must be 0"),
        ({"rope_base": 0.0}, "--rope_base 0.0: must be a positive number"),
        ({"norm_eps": float("nan")}, "--norm_eps nan: must be a positive number"),
    ],
    ids=str,
)
def test_each_mistake_is_named(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        ModelConfig(**{"depth": 4, **options}).resolved()


def test_an_odd_head_width_is_fine_without_rotation() -> None:
    plain = ModelConfig(depth=2, head_dim=15, n_head=2, rope=False, key_offset=False, pattern="T")
    assert plain.resolved().head_dim == 15
    with pytest.raises(UsageError, match="--key_offset False"):
        replace(plain, key_offset=True, head_dim=14).resolved()
    assert ModelConfig(depth=2, head_dim=15, n_head=2, pattern="mamba").resolved()


def test_small_widths_shrink_the_default_heads_but_never_a_chosen_one() -> None:
    config = ModelConfig(depth=2, d_model=24, pattern="M2 T").resolved()
    assert (config.head_dim, config.n_head, config.head_dim2) == (24, 1, 24)
    assert ModelConfig(depth=1, d_model=24, head_dim2=16, pattern="M2").resolved().head_dim2 == 16


def test_a_checkpoint_of_a_newer_version_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown options n_experts, router: it needs a newer nanochat"):
        ModelConfig.from_dict({**ModelConfig().to_dict(), "router": 1, "n_experts": 8})
