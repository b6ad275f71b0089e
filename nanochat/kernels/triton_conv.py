# mypy: disable-error-code="no-untyped-def"
"""The short causal convolution with bias and SiLU in Triton: bound by memory, so every input is read once.

A program walks over a stretch of time with the inputs under the window in registers. The backward pass walks the same
way: the gradient of the sum at token t reaches the inputs of t - 3 ... t, and what these have received is carried in
registers until it is whole. A document's first token empties the window and ends what flows back. Weights' gradients
are summed by program, then by torch in a fixed order.

Letters: B batch, T time, E inner width, K taps (at most 4: fewer are filled up with zeros), Z stretches.
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from nanochat.errors import UsageError
from nanochat.kernels.conv import CAUSAL_CONV, MAX_TAPS, final_state
from nanochat.kernels.triton_common import DTYPES, compare, dense, launch, sigmoid

BLOCK, BLOCK_BACKWARD = 256, 128  # channels of a program (one warp)
STRETCH = 128  # steps of a program


@triton.jit
def _before(x, past, segments, first, b, e, inside, n_time, n_inner, x_step, PACKED: tl.constexpr):
    """The three inputs before `first` that its window may see, the newest first; before the row from `past`."""
    x1 = _input(x, past, first - 1, b, e, inside, n_inner, x_step)
    x2 = _input(x, past, first - 2, b, e, inside, n_inner, x_step)
    x3 = _input(x, past, first - 3, b, e, inside, n_inner, x_step)
    if PACKED:
        newest, newer = _is_first(segments, first - 1, n_time), _is_first(segments, first - 2, n_time)
        x2 = tl.where(newest, 0.0, x2)
        x3 = tl.where(newest | newer, 0.0, x3)
    return x1, x2, x3


@triton.jit
def _input(x, past, t, b, e, inside, n_inner, x_step):
    if t < 0:
        x_E = tl.load(past + (b * 3 + t + 3) * n_inner + e, mask=inside, other=0.0).to(tl.float32)
    else:
        x_E = tl.load(x + t * x_step, mask=inside, other=0.0).to(tl.float32)
    return x_E


@triton.jit
def _is_first(segments, t, n_time):
    """Whether a new document begins at t."""
    at = tl.minimum(tl.maximum(t, 0), n_time - 1)
    return (tl.load(segments + at) != tl.load(segments + tl.maximum(at - 1, 0))) & (t > 0)


@triton.jit
def _four(x, t, n_time, x_step, inside):
    """Four tokens from t on; behind the row its last one again. Asked for all at once, and long before they are used:
    it takes that many loads on their way to fill the memory bus."""
    last = n_time - 1
    a = tl.load(x + tl.minimum(t, last) * x_step, mask=inside, other=0.0)
    b = tl.load(x + tl.minimum(t + 1, last) * x_step, mask=inside, other=0.0)
    c = tl.load(x + tl.minimum(t + 2, last) * x_step, mask=inside, other=0.0)
    d = tl.load(x + tl.minimum(t + 3, last) * x_step, mask=inside, other=0.0)
    return a, b, c, d


@triton.jit
def _taps(weight, bias, e, inside, BIAS: tl.constexpr):
    """Weights of lags 0 to 3, and the bias; each (BLOCK,)."""
    w0 = tl.load(weight + e * 4 + 3, mask=inside, other=0.0)
    w1 = tl.load(weight + e * 4 + 2, mask=inside, other=0.0)
    w2 = tl.load(weight + e * 4 + 1, mask=inside, other=0.0)
    w3 = tl.load(weight + e * 4, mask=inside, other=0.0)
    bias_E = tl.load(bias + e, mask=inside, other=0.0) if BIAS else tl.zeros_like(w0)
    return w0, w1, w2, w3, bias_E


@triton.jit
def _forward_kernel(
    x, weight, bias, past, segments, y, n_time, n_inner, x_row, x_step,
    BLOCK: tl.constexpr, STRETCH: tl.constexpr, BIAS: tl.constexpr, PACKED: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b, inside = tl.program_id(2).to(tl.int64), e < n_inner
    w0, w1, w2, w3, bias_E = _taps(weight, bias, e, inside, BIAS)
    x += b * x_row + e
    y += b * n_time * n_inner + e
    if PACKED:
        segments += b * n_time
    first = (tl.program_id(1) * STRETCH).to(tl.int64)
    stop = tl.minimum(first + STRETCH, n_time)
    zero = tl.zeros((BLOCK,), tl.float32)
    x1, x2, x3 = _before(x, past, segments, first, b, e, inside, n_time, n_inner, x_step, PACKED)
    next0, next1, next2, next3 = _four(x, first, n_time, x_step, inside)
    for start in range(first, stop, 4):
        tokens = (next0, next1, next2, next3)
        next0, next1, next2, next3 = _four(x, start + 4, n_time, x_step, inside)
        for i in tl.static_range(4):
            t = start + i
            x0 = tokens[i].to(tl.float32)
            if PACKED:  # noqa: SIM102 (known when compiled; what it guards only when run)
                if _is_first(segments, t, n_time):
                    x1, x2, x3 = zero, zero, zero
            sum_E = bias_E + w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3
            if ACTIVATION:
                sum_E *= sigmoid(sum_E)
            tl.store(y + t * n_inner, sum_E.to(y.dtype.element_ty), mask=e < tl.where(t < stop, n_inner, 0))
            x1, x2, x3 = x0, x1, x2


@triton.jit
def _backward_kernel(
    dy, x, weight, bias, past, segments, dx, dpast, dweight, dbias,
    n_time, n_inner, dy_row, dy_step, x_row, x_step,
    BLOCK: tl.constexpr, STRETCH: tl.constexpr, BIAS: tl.constexpr, PACKED: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Gradients of the stretch's inputs, of the past, and the stretch's part of those of weights and bias.

    The last inputs' need the three sums behind the stretch, which are computed here too."""
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b, z, inside = tl.program_id(2).to(tl.int64), tl.program_id(1), e < n_inner
    w0, w1, w2, w3, bias_E = _taps(weight, bias, e, inside, BIAS)
    x += b * x_row + e
    dy += b * dy_row + e
    dx += b * n_time * n_inner + e
    if PACKED:
        segments += b * n_time
    first = (z * STRETCH).to(tl.int64)
    stop = tl.minimum(first + STRETCH, n_time)
    zero = tl.zeros((BLOCK,), tl.float32)
    x1, x2, x3 = _before(x, past, segments, first, b, e, inside, n_time, n_inner, x_step, PACKED)
    dw0, dw1, dw2, dw3, db = zero, zero, zero, zero, zero
    d1, d2, d3 = zero, zero, zero  # what the inputs at t - 1, t - 2, t - 3 have received so far
    next0, next1, next2, next3 = _four(x, first, n_time, x_step, inside)
    dnext0, dnext1, dnext2, dnext3 = _four(dy, first, n_time, dy_step, inside)
    for start in range(first, stop + 3, 4):
        tokens, dtokens = (next0, next1, next2, next3), (dnext0, dnext1, dnext2, dnext3)
        next0, next1, next2, next3 = _four(x, start + 4, n_time, x_step, inside)
        dnext0, dnext1, dnext2, dnext3 = _four(dy, start + 4, n_time, dy_step, inside)
        for i in tl.static_range(4):
            t = start + i
            x0, dsum = tokens[i].to(tl.float32), tl.where(t < n_time, dtokens[i].to(tl.float32), 0.0)
            if PACKED:  # noqa: SIM102 (known when compiled; what it guards only when run)
                if _is_first(segments, t, n_time):
                    x1, x2, x3 = zero, zero, zero
            if ACTIVATION:
                sum_E = bias_E + w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3
                sigma_E = sigmoid(sum_E)
                dsum *= sigma_E * (1.0 + sum_E * (1.0 - sigma_E))
            own = tl.where(t < stop, dsum, 0.0)
            dw0, dw1, dw2, dw3, db = dw0 + own * x0, dw1 + own * x1, dw2 + own * x2, dw3 + own * x3, db + own
            to1, to2, to3 = w1 * dsum, w2 * dsum, w3 * dsum  # for the inputs so many places before
            if PACKED:  # none over the beginning of a document
                new = _is_first(segments, t, n_time)
                new2 = new | _is_first(segments, t - 1, n_time)
                new3 = new2 | _is_first(segments, t - 2, n_time)
                if new3:
                    to1, to2 = tl.where(new, 0.0, to1), tl.where(new2, 0.0, to2)
                    to3 = zero
            place = t - 3  # whose gradient is whole: no later sum contains that input
            if place < first:
                if z == 0:
                    tl.store(dpast + (b * 3 + place + 3) * n_inner + e, d3 + to3, mask=inside)
            else:
                store = e < tl.where(place < stop, n_inner, 0)
                tl.store(dx + place * n_inner, (d3 + to3).to(dx.dtype.element_ty), mask=store)
            d3, d2, d1 = d2 + to2, d1 + to1, w0 * dsum
            x1, x2, x3 = x0, x1, x2
    part = b * tl.num_programs(1) + z
    dweight += part * n_inner * 4 + e * 4
    tl.store(dweight + 3, dw0, mask=inside)
    tl.store(dweight + 2, dw1, mask=inside)
    tl.store(dweight + 1, dw2, mask=inside)
    tl.store(dweight, dw3, mask=inside)
    tl.store(dbias + part * n_inner + e, db, mask=inside)


def _grid(x: Tensor, block: int) -> tuple[int, int, int]:
    return triton.cdiv(x.shape[2], block), triton.cdiv(x.shape[1], STRETCH), x.shape[0]


@torch.library.custom_op("nanochat::causal_conv", mutates_args=())
def _conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor, segments: Tensor | None, activation: bool
) -> Tensor:
    """`weight` (E, 4) and `bias` (E,) in float32, `past` (B, 3, E)."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    launch(
        _forward_kernel, _grid(x, BLOCK), x, weight, bias, past, segments, y, *x.shape[1:], *x.stride()[:2],
        BLOCK=BLOCK, STRETCH=STRETCH, BIAS=bias is not None, PACKED=segments is not None, ACTIVATION=activation,
        num_warps=1,
    )  # fmt: skip
    return y


@_conv.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor, segments: Tensor | None, activation: bool
) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("nanochat::causal_conv_backward", mutates_args=())
def _conv_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor, segments: Tensor | None, activation: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and past, the last three in float32."""
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    n_part = x.shape[0] * triton.cdiv(x.shape[1], STRETCH)
    dweight, dbias = weight.new_empty(n_part, *weight.shape), weight.new_empty(n_part, x.shape[2])
    dpast = torch.empty_like(past, dtype=torch.float32)
    launch(
        _backward_kernel, _grid(x, BLOCK_BACKWARD), dy, x, weight, bias, past, segments, dx, dpast, dweight, dbias,
        *x.shape[1:], *dy.stride()[:2], *x.stride()[:2], BLOCK=BLOCK_BACKWARD, STRETCH=STRETCH, BIAS=bias is not None,
        PACKED=segments is not None, ACTIVATION=activation, num_warps=1,
    )  # fmt: skip
    return dx, dweight.sum(0), dbias.sum(0), dpast


@_conv_backward.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor, segments: Tensor | None, activation: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return dx, torch.empty_like(weight), weight.new_empty(x.shape[2]), torch.empty_like(past, dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, activation = inputs
    ctx.save_for_backward(*tensors)
    ctx.activation = activation


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, past, segments = ctx.saved_tensors
    dx, dweight, dbias, dpast = _conv_backward(dense(dy), x, weight, bias, past, segments, ctx.activation)
    return dx, dweight, None if bias is None else dbias, dpast.to(past.dtype), None, None


_conv.register_autograd(_backward, setup_context=_setup_context)


def causal_conv(
    x_BTE: Tensor,
    weight_EK: Tensor,
    bias_E: Tensor | None = None,
    state: Tensor | None = None,
    segments_BT: Tensor | None = None,
    lengths: Tensor | None = None,
    activation: bool = True,
) -> tuple[Tensor, Tensor]:
    """`conv.causal_conv` on the GPU."""
    if x_BTE.dtype not in DTYPES:
        raise UsageError(f"the Triton convolution takes float32, bfloat16 and float16, not {x_BTE.dtype}")
    n_missing = MAX_TAPS - weight_EK.shape[1]
    if n_missing < 0:
        raise UsageError(f"the Triton convolution takes at most {MAX_TAPS} taps, not {weight_EK.shape[1]}")
    n_batch, _, n_inner = x_BTE.shape
    n_past = weight_EK.shape[1] - 1
    past = x_BTE.new_zeros(n_batch, n_past, n_inner) if state is None else state.to(x_BTE.dtype)
    x = dense(x_BTE)
    weight = F.pad(weight_EK.float(), (n_missing, 0)).contiguous()
    bias = None if bias_E is None else bias_E.float()
    segments = None if segments_BT is None else segments_BT.contiguous()
    y_BTE = _conv(x, weight, bias, F.pad(past, (0, 0, n_missing, 0)).contiguous(), segments, activation)
    return y_BTE, final_state(x_BTE, past, lengths)


def self_check(device: torch.device) -> None:
    """Outputs and gradients on this GPU against the oracle; AssertionError where they differ.

    Two stretches, documents, an initial state, in float32 and bfloat16.
    """
    n_time, n_inner = STRETCH + 5, BLOCK + BLOCK // 4
    g = torch.Generator().manual_seed(0)
    shapes = (1, n_time, n_inner), (n_inner, 4), (n_inner,), (1, 3, n_inner)
    inputs = [torch.randn(shape, generator=g) for shape in shapes]
    segments = (torch.arange(n_time, device=device) >= STRETCH - 1).int()[None]
    kernel, oracle = (lambda *x, op=CAUSAL_CONV[name]: op(*x, segments) for name in ("triton", "ref"))
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 3e-2)):
        given = [x.to(device, dtype if i in (0, 3) else torch.float32) for i, x in enumerate(inputs)]
        compare(kernel, oracle, given, tolerance, str(dtype))
