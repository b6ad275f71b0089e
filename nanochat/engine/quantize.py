"""Weight formats for decoding: fewer bytes a weight, because decoding a row is as fast as its weights can be read.

    format  bytes a weight   product of one row / of many rows                       relative error of a product
    fp32    4                the model as it is (`kernels.linear`)                   1e-7
    bf16    2                16 bits (see below), fp32 activations and sums          4e-4
    int8    1.08 + 2         8 bits, one scale for 96 weights / 16 bits              6e-3

`bf16` on x86 keeps fp16, which FBGEMM multiplies directly and which has three more mantissa bits; weights beyond its
range (65504) saturate. Elsewhere it keeps bf16 itself. `int8` (x86 only) keeps a 16-bit copy of the same rounded values
for batches and prompts, where arithmetic and not memory is the limit; the two agree to fp16 rounding. Embedding tables
that are only looked up stay as they are. A prepared model serves inference only: its matrices are no parameters.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from nanochat.errors import NanochatError, UsageError
from nanochat.model.layers import Linear
from nanochat.model.lm import LM

log = logging.getLogger("nanochat")

FORMATS = ("fp32", "bf16", "int8")
BLOCK = 96  # outputs that share a scale: 12 AVX2 or 6 AVX512 registers, which FBGEMM's generated code keeps full


def prepare(model: LM, weights: str) -> LM:
    """Put every matrix of `model` into a format of FORMATS, in place, and return it.

    Raises UsageError for an unknown format or one that this device cannot multiply.
    """
    if weights not in FORMATS:
        raise UsageError(f"--quantize {weights}: expected one of {', '.join(FORMATS)}")
    if any(isinstance(module, PackedLinear) for module in model.modules()):
        raise UsageError("the model's weights are packed already; load it again to change their format")
    if weights == "fp32":
        return model
    if weights == "int8" and not (model.device.type == "cpu" and has_fbgemm()):
        raise UsageError("--quantize int8 needs an x86 CPU (FBGEMM); use --quantize bf16, or --device cpu")
    if model.head is None:  # tied: the table stays for look-ups, the product gets its own copy
        model.head = Linear(model.config.d_model, model.config.vocab_size).to("meta")
        model.head.weight = nn.Parameter(model.embed.weight.detach(), requires_grad=False)
    kind = Int8Linear if weights == "int8" else Fp16Linear if _use_fp16(model) else Bf16Linear
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, Linear):
                setattr(module, name, kind(child.weight.detach()))
    log.info("weights: %s as %s", weights, kind.__name__)
    return model


def _use_fp16(model: LM) -> bool:
    return model.device.type == "cpu" and has_fbgemm()


@functools.cache
def has_fbgemm() -> bool:
    """Whether this torch multiplies FBGEMM's packed fp16 weights and 8-bit tables here."""
    try:
        with torch.no_grad():
            x = torch.ones(1, 8)
            Fp16Linear(torch.eye(8))(x)
            Int8Linear(torch.eye(8))(x)
    except (RuntimeError, AttributeError, NanochatError):
        return False
    return "fbgemm" in torch.backends.quantized.supported_engines


class PackedLinear(nn.Module):
    """x (..., K) times a packed weight (N, K): (..., N), in x's dtype."""

    def __init__(self, weight_NK: Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features = weight_NK.shape

    @property
    def weight(self) -> Tensor:
        """The weight as the product sees it, fp32 (N, K), unpacked at each call."""
        raise NotImplementedError

    def rows(self, x_MK: Tensor) -> Tensor:
        """The product of contiguous fp32 rows: (M, N) fp32."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        y_MN = self.rows(x.reshape(-1, self.in_features).float())
        return y_MN.to(x.dtype).view(*x.shape[:-1], self.out_features)


class Fp16Linear(PackedLinear):
    """fp16 weights, fp32 activations and sums, by FBGEMM: 203 us for 1 row of 3072 x 768 where F.linear takes 724
    (2 AVX2 cores), and as many GFLOP/s as MKL's fp32 for many rows."""

    def __init__(self, weight_NK: Tensor) -> None:
        super().__init__(weight_NK)
        self.packed: Any = torch.ops.quantized.linear_prepack_fp16(weight_NK.float().contiguous(), None)

    @property
    def weight(self) -> Tensor:
        return torch.ops.quantized.linear_unpack_fp16(self.packed)[0].float()

    def rows(self, x_MK: Tensor) -> Tensor:
        return torch.ops.quantized.linear_dynamic_fp16(x_MK, self.packed)


class Bf16Linear(PackedLinear):
    """bf16 weights and activations, in torch's own product."""

    def __init__(self, weight_NK: Tensor) -> None:
        super().__init__(weight_NK)
        self.packed: Any = weight_NK.bfloat16()

    @property
    def weight(self) -> Tensor:
        return self.packed.float()

    def rows(self, x_MK: Tensor) -> Tensor:
        return F.linear(x_MK.bfloat16(), self.packed).float()


class Int8Linear(PackedLinear):
    """8-bit weights, fp32 activations and sums.

    One row is a weighted sum of table rows: FBGEMM's embedding bag over a table that holds, for each block of outputs
    and each input, BLOCK bytes with their scale and offset, so that memory is read in order. It takes 154 us for
    3072 x 768 where torch's `_weight_int8pack_mm` takes 296 (AVX2). More rows use the fp16 copy.
    """

    def __init__(self, weight_NK: Tensor) -> None:
        super().__init__(weight_NK)
        n_out, n_in = weight_NK.shape
        self.n_blocks = -(-n_out // BLOCK)
        padded = F.pad(weight_NK.float(), (0, 0, 0, self.n_blocks * BLOCK - n_out))
        table = padded.view(self.n_blocks, BLOCK, n_in).transpose(1, 2).reshape(-1, BLOCK).contiguous()
        self.packed: Any = torch.ops.quantized.embedding_bag_byte_prepack(table)
        self.index, self.offsets = _bags(self.n_blocks, n_in)
        self.many = Fp16Linear(self.weight)

    @property
    def weight(self) -> Tensor:
        table = torch.ops.quantized.embedding_bag_byte_unpack(self.packed)
        blocks = table.view(self.n_blocks, self.in_features, BLOCK).transpose(1, 2)
        return blocks.reshape(-1, self.in_features)[: self.out_features].contiguous()

    def rows(self, x_MK: Tensor) -> Tensor:
        if x_MK.size(0) > 1:
            return self.many.rows(x_MK)
        each = x_MK.expand(self.n_blocks, self.in_features).reshape(-1)
        y = torch.ops.quantized.embedding_bag_byte_rowwise_offsets(
            self.packed, self.index, self.offsets, False, 0, False, each, None, True
        )
        return y.view(1, -1)[:, : self.out_features]


_counting = torch.empty(0, dtype=torch.int32)  # 0, 1, 2…, shared by all layers


def _bags(n_bags: int, size: int) -> tuple[Tensor, Tensor]:
    """Indices and offsets for bags of consecutive table rows."""
    global _counting
    if _counting.numel() < n_bags * size:
        _counting = torch.arange(n_bags * size, dtype=torch.int32)
    return _counting[: n_bags * size], torch.arange(0, n_bags * size + 1, size, dtype=torch.int32)
