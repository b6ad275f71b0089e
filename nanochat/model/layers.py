"""The parts that every block is made of: norm, linear, rotary positions, MLP, and rows of unequal length.

Shape suffixes: B batch, T time, D model width, H heads, P head width, N tokens of all rows end to end.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanochat.kernels.linear import linear

ACTIVATIONS = ("relu2", "gelu", "swiglu")


class Linear(nn.Linear):
    """A matrix without bias. The weight is kept in fp32 and cast to the dtype of the activations at each use.

    `splits` names the parts of the output rows that are matrices of their own (q, k, v; or z, x, B, C, dt): the
    optimizer orthogonalises each by itself.
    """

    def __init__(self, n_in: int, n_out: int, splits: Sequence[int] = ()) -> None:
        super().__init__(n_in, n_out, bias=False)
        self.splits = tuple(splits)

    def reset_parameters(self) -> None:
        """`LM.build` writes every weight once; torch's own on the meta device would import torch._dynamo (1.4 s)."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight.to(input.dtype))

    def init_uniform(self, copies: Tensor | None = None) -> None:
        """Uniform with variance 1/n_in, the spread of a normal init without its tails. `copies` (n_out,): for each row
        the row whose values it gets."""
        bound = (3.0 / self.in_features) ** 0.5
        if copies is None:
            self.weight.uniform_(-bound, bound)
        else:
            self.weight.copy_(torch.empty_like(self.weight).uniform_(-bound, bound)[copies.to(self.weight.device)])

    def init_zero(self) -> None:
        """A block whose last matrix is zero starts as the identity (ReZero, arXiv 2003.04887)."""
        self.weight.zero_()


class Embedding(nn.Embedding):
    """A table that `LM.build` fills, as it does every weight."""

    def reset_parameters(self) -> None:
        """Nothing: see `Linear`."""


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """RMSNorm (arXiv 1910.07467) without a gain: the next matrix can absorb one, so a gain only slows the optimizer."""
    bare = not (torch.is_grad_enabled() or torch.compiler.is_compiling())
    if bare and x.dtype == torch.float32 and x.device.type == "cpu":
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)  # torch's own is six operations on a CPU
        return x * torch.addcmul(_scalar(eps), norm, norm, value=1 / x.size(-1)).rsqrt_()
    return F.rms_norm(x, (x.size(-1),), eps=eps)


@functools.cache
def _scalar(value: float) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(value, device="cpu")


class Rotary:
    """Rotary positions (arXiv 2104.09864), half-rotation layout, on the first `head_dim` coordinates of a head. Tables
    grow on demand; they are no parameters."""

    def __init__(self, head_dim: int, base: float) -> None:
        self.head_dim, self.base = head_dim, base
        self.tables: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}
        self.steps: dict[tuple[torch.device, torch.dtype, int], tuple[Tensor, Tensor, Tensor]] = {}

    def table(self, n: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin for positions 0..n-1, each (n, 1, P/2). Angles are computed in float64 (on the CPU: some devices
        have none): in fp32 the angle of position 10,000 is off by up to 0.0005."""
        cached = self.tables.get((device, dtype))
        if cached is None or cached[0].size(0) < n:
            size = max(64, 1 << (n - 1).bit_length())
            with torch.inference_mode(False):  # the same tables serve training, which cannot save inference tensors
                inverse = self.base ** (-torch.arange(0, self.head_dim, 2, dtype=torch.float64) / self.head_dim)
                angle = torch.outer(torch.arange(size, dtype=torch.float64), inverse)[:, None, :]
                cached = angle.cos().to(device, dtype), angle.sin().to(device, dtype)
            self.tables[device, dtype] = cached
        return cached

    def step(self, x: Tensor, position: int) -> Tensor:
        """Rotate x (..., P), all at one position: as `__call__`, in fewer operations on tables as wide as x."""
        width = x.size(-1)
        cached = self.steps.get((x.device, x.dtype, width))
        if cached is None or cached[0].size(0) <= position:
            cos, sin = (table[:, 0] for table in self.table(position + 1, x.device, x.dtype))
            half, rest = cos.size(1), width - 2 * cos.size(1)
            i = torch.arange(width, device=x.device)
            swapped = torch.cat((i[half : 2 * half], i[:half], i[2 * half :]))
            cached = F.pad(cos.repeat(1, 2), (0, rest), value=1.0), F.pad(torch.cat((-sin, sin), 1), (0, rest)), swapped
            self.steps[x.device, x.dtype, width] = cached
        cos_nP, sin_nP, swapped_P = cached
        return (x * cos_nP[position]).addcmul_(x.index_select(-1, swapped_P), sin_nP[position])

    def __call__(self, x: Tensor, positions: int | Tensor, n: int) -> Tensor:
        """Rotate x (B, T, H, P). `positions`: the first position of every row (int), or each one (B, T) or (1, N).
        `n`: one more than the largest position."""
        cos, sin = self.table(n, x.device, x.dtype)
        if isinstance(positions, int):
            cos, sin = cos[positions:n], sin[positions:n]
        else:
            cos, sin = cos[positions], sin[positions]
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            y: Tensor = _Rotate.apply(x, cos, sin) if torch.is_grad_enabled() else rotate(x, cos, sin)
            return y
        width = cos.size(-1)
        a, b, rest = x.split((width, width, x.size(-1) - 2 * width), dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (..., P), its first coordinates rotated: each part is written once, where it belongs. No gradient."""
    width = cos.size(-1)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    a, b = x[..., :width], x[..., width : 2 * width]
    torch.mul(a, cos, out=out[..., :width]).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=out[..., width : 2 * width]).addcmul_(a, sin)
    if 2 * width < x.size(-1):
        out[..., 2 * width :] = x[..., 2 * width :]
    return out


class _Rotate(torch.autograd.Function):
    """The gradient goes back by the opposite angle; autograd's own way through slices fills a tensor for each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return rotate(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return rotate(grad, cos, -sin), None, None


class MLP(nn.Module):
    """The position-wise network of a block: relu squared (arXiv 2109.08668), gelu, or SwiGLU (arXiv 2002.05202)."""

    def __init__(self, d_model: int, ratio: float, activation: str) -> None:
        super().__init__()
        self.activation = activation
        hidden = max(8, round(d_model * ratio / 8) * 8)
        gated = activation == "swiglu"
        self.up = Linear(d_model, hidden * (2 if gated else 1), splits=(hidden, hidden) if gated else ())
        self.down = Linear(hidden, d_model)

    def init_weights(self) -> None:
        self.up.init_uniform()
        self.down.init_zero()

    def forward(self, x_BTD: Tensor) -> Tensor:
        h = self.up(x_BTD)
        if self.activation == "relu2":
            h = F.relu(h)
            h = h * h if torch.is_grad_enabled() else h.mul_(h)
        elif self.activation == "gelu":
            h = F.gelu(h)
        else:
            gate, value = h.chunk(2, dim=-1)
            h = F.silu(gate) * value
        return self.down(h)


class Ragged:
    """Rows of different lengths laid end to end as one row (1, N, ...), and the way to and from a padded (B, T, ...).

    Dense layers see no padding; only the mixing over time, which needs rows, is computed on the padded form.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device | str) -> None:
        self.lengths = [int(n) for n in lengths]
        self.longest = max(self.lengths)
        self.total = sum(self.lengths)
        self.equal = min(self.lengths) == self.longest
        self.tensor = torch.tensor(self.lengths, device=device)
        inside = torch.arange(self.longest, device=device) < self.tensor[:, None]
        self.index_N = inside.flatten().nonzero().squeeze(1)  # where each token stands in the padded form
        self.last_B = self.tensor.cumsum(0) - 1  # where each row's last token stands in the flat form

    def pad(self, x_1N: Tensor) -> Tensor:
        """(1, N, ...) to (B, T, ...), zeros behind each row's end."""
        tail = x_1N.shape[2:]
        if self.equal:
            return x_1N.reshape(len(self.lengths), self.longest, *tail)
        out = x_1N.new_zeros(len(self.lengths) * self.longest, *tail)
        out[self.index_N] = x_1N[0]
        return out.view(len(self.lengths), self.longest, *tail)

    def flat(self, x_BT: Tensor) -> Tensor:
        """(B, T, ...) to (1, N, ...)."""
        tail = x_BT.shape[2:]
        if self.equal:
            return x_BT.reshape(1, self.total, *tail)
        return x_BT.reshape(-1, *tail)[self.index_N][None]
