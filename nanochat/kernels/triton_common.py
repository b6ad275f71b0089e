# mypy: disable-error-code="no-untyped-def"
"""What the Triton kernels share. Imports Triton: only the files `triton_*.py` import this one, and they only at need.

Without a GPU the kernels run in Triton's interpreter: set TRITON_INTERPRET=1 before the first of them is imported.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanochat.errors import UsageError

INTERPRET: bool = bool(triton.knobs.runtime.interpret)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Start `kernel` on the device of its first tensor; UsageError for a CPU tensor outside of the interpreter."""
    device = next(x for x in args if isinstance(x, Tensor)).device
    if device.type == "cpu":
        if not INTERPRET:
            raise UsageError("a Triton kernel was given a CPU tensor: it needs a GPU, or TRITON_INTERPRET=1 (slow)")
        kernel[grid](*args, **options)
        return
    with torch.cuda.device(device):
        kernel[grid](*args, **options)


def packed(x: Tensor) -> Tensor:
    """x, copied only when the dimensions behind the second (batch, time) do not lie densely in memory."""
    size = 1
    for n, stride in zip(reversed(x.shape[2:]), reversed(x.stride()[2:])):
        if n > 1 and stride != size:
            return x.contiguous()
        size *= n
    return x


def dense(x: Tensor) -> Tensor:
    """x, copied only when its last dimension does not lie densely in memory."""
    return x if x.stride(-1) == 1 else x.contiguous()


def power_of_2(n: int, least: int = 16) -> int:
    """The smallest power of 2 that is at least n, and at least `least` (16: what a matrix product takes)."""
    return max(least, 1 << max(0, n - 1).bit_length())


def precision() -> str:
    """How `tl.dot` multiplies float32: as exactly as torch has been told to (`torch.set_float32_matmul_precision`)."""
    # three products of halves, on tensor cores: "ieee" would go through scalar units and spill hundreds of registers
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def compare(
    kernel: Callable[..., Any], oracle: Callable[..., Any], inputs: list[Tensor], tolerance: float, what: str = ""
) -> None:
    """What a self-check does: outputs, and gradients if any, of `kernel` against those of `oracle` in float64.

    AssertionError where the relative L2 distance of one of them exceeds the tolerance, or is no number.
    """
    given = [x.detach().requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    found, wanted = kernel(*given), oracle(*exact)
    if isinstance(wanted, Tensor):
        found, wanted = (found,), (wanted,)
    g = torch.Generator().manual_seed(0)
    directions = [torch.randn(y.shape, generator=g).to(y.device) for y in wanted]
    if wanted[0].requires_grad:
        found += torch.autograd.grad(found, given, [d.to(y.dtype) for d, y in zip(directions, found)])
        wanted += torch.autograd.grad(wanted, exact, [d.double() for d in directions])
    for i, (a, b) in enumerate(zip(found, wanted)):
        distance = float(((a.double() - b).norm() / b.norm().clamp(min=0.1)).detach())
        assert distance < tolerance, f"{what} result {i} is off by {distance:.1e}, more than {tolerance:.0e}"


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))  # where exp overflows the quotient is 0, as it should be


@triton.jit
def softplus(x):
    """log(1 + exp(x)) to all digits of float32, also where the result is tiny: no approximate logarithm near 1.

    log1p(e) = 2 atanh(s) with s = e / (2 + e); here e = exp(-|x|) <= 1, so s <= 1/3 and eight terms are enough.
    """
    e = tl.exp(-tl.abs(x))
    s = e / (2.0 + e)
    q = s * s
    tail = 1.0 / 13 + q * (1.0 / 15)
    tail = 1.0 / 7 + q * (1.0 / 9 + q * (1.0 / 11 + q * tail))
    tail = 1.0 + q * (1.0 / 3 + q * (1.0 / 5 + q * tail))
    return tl.maximum(x, 0.0) + 2.0 * s * tail
