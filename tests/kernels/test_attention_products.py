"""Attention by batched products, for training on a CPU, against explicit scores."""

import pytest
import torch
from kernel_cases import compare, documents, leaves
from torch import Tensor

from nanochat.kernels import attention_products as products
from nanochat.kernels.attention import attention, attention_ref


def inputs(n_time: int, n_head: int = 4, n_group: int = 4) -> list[Tensor]:
    g = torch.Generator().manual_seed(n_time)
    return [torch.randn(2, n_time, heads, 8, generator=g) for heads in (n_head, n_group, n_group)]


@pytest.mark.parametrize("n_time", [1, 2, 7, 16, 17, 50])
@pytest.mark.parametrize("n_group", [1, 2, 4])
@pytest.mark.parametrize("kept", [0, 1 << 23], ids=["made again", "kept"])
def test_blocks_of_queries_and_heads(n_time: int, n_group: int, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "QUERIES", 8)
    monkeypatch.setattr(products, "SCORES", 300)  # a few heads a product
    monkeypatch.setattr(products, "KEPT", kept)
    tensors = leaves(inputs(n_time, 4, n_group), torch.float32)
    compare(products.causal, lambda q, k, v, scale: attention_ref(q, k, v, scale=scale), tensors, 1e-5, scale=0.3)


def test_gradcheck() -> None:
    tensors = leaves(inputs(5, 2, 1), torch.float64)
    assert torch.autograd.gradcheck(lambda *x: products.causal(*x, None), tensors)


@pytest.mark.parametrize("packed", [0, 30])
def test_half_precision_is_close(packed: int) -> None:
    options = {"segments_BT": documents(2, 60, packed)} if packed else {}
    half, exact = leaves(inputs(60), torch.bfloat16), leaves(inputs(60), torch.float64)
    for a, b in zip(half, exact):
        b.data = a.detach().double()
    found, wanted = attention(*half, **options), attention_ref(*exact, **options)
    torch.testing.assert_close(found.double(), wanted, rtol=0.02, atol=0.02)
    for a, b in zip(torch.autograd.grad(found.sum(), half), torch.autograd.grad(wanted.sum(), exact)):
        torch.testing.assert_close(a.double(), b, rtol=0.05, atol=0.05)


def test_only_training_on_a_cpu_takes_it() -> None:
    q, k, _ = inputs(3)
    assert not products.fits(q, k)
    assert products.fits(q.requires_grad_(), k)
    with torch.no_grad():
        assert not products.fits(q, k)
    assert not products.fits(q.to("meta"), k)
