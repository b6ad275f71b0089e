"""Weight formats: each product against fp32, and what a whole model loses."""

import pytest
import torch

from nanochat.engine.quantize import BLOCK, Bf16Linear, Fp16Linear, Int8Linear, PackedLinear, has_fbgemm, prepare
from nanochat.errors import UsageError
from nanochat.kernels.linear import LINEAR, linear
from nanochat.model.config import ModelConfig
from nanochat.model.layers import Linear
from nanochat.model.lm import LM

needs_fbgemm = pytest.mark.skipif(not has_fbgemm(), reason="this torch has no FBGEMM")
SHAPES = [(8, 16), (BLOCK, 64), (BLOCK + 1, 33), (256, 256), (768, 96)]


def weight(n_out: int, n_in: int) -> torch.Tensor:
    return torch.randn(n_out, n_in, generator=torch.Generator().manual_seed(n_out)) * n_in**-0.5


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize(("n_out", "n_in"), SHAPES)
@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize(
    ("kind", "worst"),
    [
        pytest.param(Fp16Linear, 1e-3, marks=needs_fbgemm),
        pytest.param(Int8Linear, 1.2e-2, marks=needs_fbgemm),
        (Bf16Linear, 1e-2),
    ],
)
def test_products_are_close_to_fp32(kind, worst, rows, n_out, n_in):
    w = weight(n_out, n_in)
    x = torch.randn(2, rows, n_in, generator=torch.Generator().manual_seed(1))[:1]
    packed = kind(w)
    y = packed(x)
    assert y.shape == (1, rows, n_out)
    assert relative(y, x @ w.t()) < worst
    assert relative(y, x @ packed.weight.t()) < 5e-3 if kind is Bf16Linear else 1e-3
    assert packed.weight.shape == w.shape
    assert packed(x.bfloat16()).dtype == torch.bfloat16


@needs_fbgemm
def test_int8_gives_one_row_what_it_gives_many():
    packed = Int8Linear(weight(200, 64))
    x = torch.randn(6, 64)
    torch.testing.assert_close(torch.cat([packed(row[None]) for row in x]), packed(x), atol=2e-3, rtol=2e-3)


@needs_fbgemm
def test_int8_weights_are_within_half_a_step():
    w = weight(BLOCK, 8)
    w[:, 3] *= 100.0  # a scale of its own for each input
    step = (w.amax(0) - w.amin(0)) / 255
    assert ((Int8Linear(w).weight - w).abs() <= 0.51 * step).all()


@pytest.mark.parametrize("rows", [1, 5, 8, 30, 100])
@pytest.mark.parametrize(("n_out", "n_in"), [(256, 256), (254, 128), (251, 128), (16, 8)])
def test_few_row_products_agree_with_torch(rows, n_out, n_in):
    w, x = weight(n_out, n_in), torch.randn(1, rows, n_in)
    expected = torch.nn.functional.linear(x, w)
    with torch.no_grad():
        torch.testing.assert_close(linear(x, w), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(LINEAR["split"](x, w), expected, atol=1e-5, rtol=1e-5)
    w.requires_grad_()
    linear(x, w).sum().backward()
    assert w.grad is not None


def small(**options) -> LM:
    config = ModelConfig(vocab_size=300, depth=4, d_model=64, pattern="T M M2 T", head_dim=16, **options)
    model = LM.build(config, seed=0)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.copy_(weight(*p.shape))
    return model


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize(
    ("name", "worst"), [("fp32", 1e-6), ("bf16", 2e-2), pytest.param("int8", 5e-2, marks=needs_fbgemm)]
)
def test_a_prepared_model_gives_nearly_the_same_logits_and_loss(name, worst, tie):
    ids = torch.randint(0, 300, (2, 20), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        model = small(tie_embeddings=tie)
        before, nll = model.logits(model(ids)), model.nll(ids[:, :-1], ids[:, 1:])
        assert prepare(model, name) is model
        after = model.logits(model(ids))
        assert relative(after, before) < worst
        assert (model.nll(ids[:, :-1], ids[:, 1:]) - nll).abs().mean() < 0.05
    kinds = {type(m) for m in model.modules()}
    assert (Linear in kinds) == (name == "fp32")
    assert any(issubclass(kind, PackedLinear) for kind in kinds) == (name != "fp32")


def test_unknown_formats_are_refused():
    with pytest.raises(UsageError, match="--quantize int4: expected one of fp32, bf16, int8"):
        prepare(small(), "int4")


@needs_fbgemm
def test_a_model_is_prepared_once():
    model = prepare(small(), "bf16")
    with pytest.raises(UsageError, match="already"):
        prepare(model, "int8")
