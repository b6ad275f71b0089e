"""The parts of a block: norm, rotary positions, MLP, rows of unequal length."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import noise

from nanochat.model.layers import MLP, Linear, Ragged, Rotary, rms_norm

close = torch.testing.assert_close


def test_rms_norm_has_no_gain_and_unit_size() -> None:
    x = noise(3, 5, 16) * 7
    y = rms_norm(x, 1e-5)
    close(y.square().mean(-1), torch.ones(3, 5), rtol=1e-4, atol=0)
    close(y, x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-5))
    assert (rms_norm(torch.zeros(2, 4), 1e-5) == 0).all()


def test_linear_casts_its_weight_to_the_activations() -> None:
    linear = Linear(6, 4)
    with torch.no_grad():
        linear.init_uniform()
        assert linear.weight.abs().max() <= math.sqrt(3 / 6)
        x = noise(2, 6)
        assert linear(x.double()).dtype == torch.float64
        close(linear(x.bfloat16()).float(), linear(x), rtol=0.02, atol=0.02)
        linear.init_zero()
        assert (linear(x) == 0).all()


# ---- rotary


def test_products_depend_on_the_distance_only() -> None:
    rotary = Rotary(16, 10_000.0)
    q, k = noise(1, 1, 2, 16, seed=1), noise(1, 1, 2, 16, seed=2)

    def product(i: int, j: int) -> torch.Tensor:
        return (rotary(q, i, i + 1) * rotary(k, j, j + 1)).sum(-1)

    close(product(9, 4), product(505, 500), rtol=1e-4, atol=1e-5)
    close(product(3, 3), (q * k).sum(-1), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(product(9, 4), product(9, 5), atol=1e-3)


def test_rotation_keeps_lengths_and_positions_agree() -> None:
    rotary = Rotary(8, 100.0)
    x = noise(2, 7, 3, 8)
    y = rotary(x, 5, 12)
    close(y.norm(dim=-1), x.norm(dim=-1))
    positions = torch.arange(5, 12).expand(2, 7)
    assert torch.equal(rotary(x, positions, 12), y)
    one = torch.tensor([[5, 9]])  # ragged: each token has a position of its own
    close(rotary(x[:1, [0, 4]], one, 12), y[:1, [0, 4]])


def test_angles_are_exact_far_out() -> None:
    """Position 100,000: in fp32 the angle itself would be off by 0.004."""
    n, P = 100_001, 8
    x = noise(1, 1, 1, P)
    found = Rotary(P, 10_000.0)(x, n - 1, n)[0, 0, 0]
    for i in range(P // 2):
        angle = (n - 1) * 10_000.0 ** (-2 * i / P)
        a, b = float(x[0, 0, 0, i]), float(x[0, 0, 0, i + P // 2])
        assert float(found[i]) == pytest.approx(a * math.cos(angle) - b * math.sin(angle), abs=1e-6)
        assert float(found[i + P // 2]) == pytest.approx(b * math.cos(angle) + a * math.sin(angle), abs=1e-6)


def test_tables_made_for_inference_serve_training():
    rotary, x = Rotary(8, 100.0), torch.randn(1, 4, 2, 8, requires_grad=True)
    with torch.inference_mode():
        y = rotary(x, 0, 4)
    z = rotary(x, 0, 4)
    assert torch.equal(y, z)
    z.sum().backward()
    assert x.grad is not None


def test_tables_grow_and_are_kept() -> None:
    rotary = Rotary(4, 10.0)
    x = noise(1, 1, 1, 4)
    rotary(x, 0, 1)
    first = rotary.table(60, x.device, x.dtype)
    assert rotary.table(64, x.device, x.dtype)[0] is first[0]
    assert rotary.table(65, x.device, x.dtype)[0].size(0) == 128
    assert torch.equal(rotary.table(65, x.device, x.dtype)[0][:64], first[0])


# ---- MLP


@pytest.mark.parametrize("activation", ["relu2", "gelu", "swiglu"])
def test_mlp_formulas(activation: str) -> None:
    mlp = MLP(8, 2.0, activation)
    with torch.no_grad():
        mlp.up.weight.copy_(noise(*mlp.up.weight.shape))
        mlp.down.weight.copy_(noise(*mlp.down.weight.shape, seed=1))
    x = noise(2, 3, 8, seed=2)
    h = x @ mlp.up.weight.T
    if activation == "relu2":
        h = h.clamp(min=0) ** 2
    elif activation == "gelu":
        h = h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))
    else:
        gate, value = h[..., :16], h[..., 16:]
        h = gate * torch.sigmoid(gate) * value
    close(mlp(x), h @ mlp.down.weight.T, rtol=1e-4, atol=1e-4)
    assert mlp.down.in_features == 16


def test_mlp_widths_are_multiples_of_8() -> None:
    assert MLP(20, 8 / 3, "gelu").down.in_features == 56
    assert MLP(4, 0.1, "gelu").down.in_features == 8
    assert MLP(8, 2.0, "swiglu").up.splits == (16, 16)


# ---- ragged rows


@given(st.lists(st.integers(0, 6), min_size=1, max_size=6).filter(any))
def test_pad_and_flat_are_inverse(lengths: list[int]) -> None:
    ragged = Ragged(lengths, "cpu")
    flat = noise(1, sum(lengths), 2, 3)
    padded = ragged.pad(flat)
    assert padded.shape == (len(lengths), max(lengths), 2, 3)
    assert torch.equal(ragged.flat(padded), flat)
    for row, n, part in zip(padded, lengths, flat[0].split(lengths)):
        assert torch.equal(row[:n], part)
        assert (row[n:] == 0).all()
    ends = [flat[0, int(i)] for i, n in zip(ragged.last_B, lengths) if n]
    assert all(
        torch.equal(end, row[n - 1]) for end, (row, n) in zip(ends, [(r, n) for r, n in zip(padded, lengths) if n])
    )
