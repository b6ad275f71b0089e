"""What the kernel tests share: lengths at the edges of chunks, packed documents, and the comparison with an oracle."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LENGTHS = (1, 2, 3, 17, 64, 257)


def documents(n_batch: int, n_time: int, size: int = 8) -> Tensor:
    """Segments (B, T): each row holds documents of about `size` tokens."""
    g = torch.Generator().manual_seed(n_time)
    return torch.randint(0, 1 + n_time // size, (n_batch, n_time), generator=g).sort(1)[0]


def error(a: Tensor, b: Tensor) -> float:
    """Relative L2 distance of a from b; absolute where b is next to nothing."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp(min=0.1))


def leaves(tensors: list[Tensor], *dtypes: torch.dtype) -> list[Tensor]:
    """Copies that collect gradients, each in its dtype (the last one for all the rest)."""
    padded = list(dtypes) + [dtypes[-1]] * (len(tensors) - len(dtypes))
    return [x.detach().to(dtype).clone().requires_grad_() for x, dtype in zip(tensors, padded)]


def compare(
    fast: Callable[..., Any], oracle: Callable[..., Any], tensors: list[Tensor], tolerance: float, **options: Any
) -> None:
    """Outputs and all gradients of `fast`, in the tensors' dtypes, against the oracle in float64."""
    exact = leaves(tensors, torch.float64)
    outputs, wanted = fast(*tensors, **options), oracle(*exact, **options)
    if isinstance(wanted, Tensor):
        outputs, wanted = (outputs,), (wanted,)
    g = torch.Generator().manual_seed(0)
    grads = [torch.randn(y.shape, generator=g, dtype=torch.float64) for y in wanted]
    got = torch.autograd.grad(outputs, tensors, [g.to(y.dtype) for g, y in zip(grads, outputs)])
    expected = torch.autograd.grad(wanted, exact, grads)
    errors = [error(a, b) for a, b in zip((*outputs, *got), (*wanted, *expected))]
    assert max(errors) < tolerance, errors
