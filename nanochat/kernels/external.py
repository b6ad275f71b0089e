"""Kernels of other packages: taken when they are installed, can take the call, agree with ours and are measured faster.

    mamba_ssm       S6 (CUDA) and SSD (Triton) by the papers' authors
    causal_conv1d   their convolution
    fla             flash-linear-attention: its simple gated linear attention is SSD in other letters

`run` decides at the first call of a kind, on that call's own tensors; `NANOCHAT_KERNEL_<OP>=mamba_ssm` takes one by
name. Under torch.compile they are never taken: their autograd functions break the graph.

Letters: B batch, T time, E inner width, K taps, N state size, H heads, P head width, G groups.
"""

import importlib
import importlib.util
import logging
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from nanochat.errors import NanochatError, UsageError
from nanochat.kernels.dispatch import choose
from nanochat.kernels.segments import resets

logger = logging.getLogger("nanochat")

MARGIN = 0.9  # of our time, that another kernel may take at most
TOLERANCE = 3e-2  # relative L2 distance from our output
RUNS = 3
SSD_CHUNK = 256
PIP = {"mamba_ssm": "mamba-ssm", "causal_conv1d": "causal-conv1d", "fla": "flash-linear-attention"}

Call = Callable[..., tuple[Tensor, Tensor]]


def run(op: str, table: Mapping[str, Call], default: str, unfit: str, inputs: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """Call the implementation that `dispatch.choose` names, or another package's that has won the race against it."""
    chosen = choose(op, table, default, inputs[0], unfit)
    if inputs[0].is_cuda and not torch.compiler.is_compiling() and not os.environ.get(f"NANOCHAT_KERNEL_{op.upper()}"):
        chosen = race(op, table, chosen, inputs)
    return chosen(*inputs)


# ---- the race

_winners: dict[tuple[Any, ...], Call] = {}


def race(op: str, table: Mapping[str, Call], ours: Call, inputs: tuple[Any, ...]) -> Call:
    """Ours, or the fastest of the installed rivals that can take such a call and agree with ours.

    Measured once for each kind of call: dtype, which arguments there are, gradients or not, and size within a factor
    of two.
    """
    first = inputs[0]
    given, size = tuple(x is not None for x in inputs), tuple(n.bit_length() for n in first.shape)
    key = (op, first.dtype, first.device, torch.is_grad_enabled() and first.requires_grad, given, size)
    if key not in _winners:
        able = [name for name, unfit in RIVALS[op].items() if importlib.util.find_spec(name) and not unfit(*inputs)]
        winner = _fastest(op, ours, {name: table[name] for name in able}, inputs) if able else ""
        _winners[key] = table[winner] if winner else ours
    return _winners[key]


def _fastest(op: str, ours: Call, rivals: Mapping[str, Call], inputs: tuple[Any, ...]) -> str:
    """The name of the winner, "" for ours; a line in the log with the times."""
    expected, seconds = _measure(ours, inputs)
    report, winner, best = [f"ours {seconds * 1e3:.2f} ms"], "", seconds * MARGIN
    for name, call in rivals.items():
        try:
            found, seconds = _measure(call, inputs)
        except Exception as error:  # whatever another package does, training goes on with ours
            report.append(f"{name} failed: {(str(error) or type(error).__name__).splitlines()[0]}")
            continue
        distance = float((found - expected).norm() / expected.norm().clamp(min=1e-6))
        agrees = distance < TOLERANCE
        report.append(f"{name} {seconds * 1e3:.2f} ms{'' if agrees else f', but off by {distance:.1g}'}")
        if agrees and seconds < best:
            winner, best = name, seconds
    logger.info("kernel %s for %s: %s (%s)", op, list(inputs[0].shape), winner or "ours", "; ".join(report))
    return winner


def _measure(call: Call, inputs: tuple[Any, ...]) -> tuple[Tensor, float]:
    """The output in float32, and the seconds of one call, with its backward pass where the inputs ask for one."""
    own = [x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in inputs]

    def once() -> Tensor:
        y = call(*own)[0]
        if y.requires_grad:
            y.sum().backward()
        return y.detach()

    y = once().float()  # the first call compiles
    _wait(y)
    start = time.perf_counter()
    for _ in range(RUNS):
        once()
    _wait(y)
    return y, (time.perf_counter() - start) / RUNS


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


# ---- the packages


def _function(module: str, name: str) -> Callable[..., Any]:
    package = module.partition(".")[0]
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        install = f"pip install --no-build-isolation {PIP[package]}"
        raise UsageError(f"{package} cannot be used: {error}; {install}") from error
    return function


def _fit(reason: str) -> None:
    if reason:
        raise UsageError(f"the kernel that NANOCHAT_KERNEL_<OP> names cannot take this call: {reason}")


class _NoGradient(torch.autograd.Function):
    """A state that the package returns without a gradient: an error when one is asked for, never a silent zero."""

    @staticmethod
    def forward(ctx: Any, state: Tensor, like: Tensor) -> Tensor:
        return state.clone()

    @staticmethod
    def backward(ctx: Any, dstate: Tensor) -> tuple[None, None]:
        raise NanochatError("mamba_ssm gives the last state no gradient: set NANOCHAT_KERNEL_SELECTIVE_SCAN=triton")


def _scan_unfit(u: Tensor, delta: Tensor, *rest: Any) -> str:
    if any(x is not None for x in rest[4:7]):
        return "mamba_ssm's scan knows no initial state, documents or lengths"
    return "" if delta.dtype == u.dtype else "mamba_ssm's scan takes steps in u's dtype"


def scan_mamba_ssm(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor | None = None,
    segments: Tensor | None = None, lengths: Tensor | None = None, bias: Tensor | None = None,
    gate: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`scan.selective_scan` by mamba_ssm's CUDA kernel; time comes last there."""
    _fit(_scan_unfit(u, delta, A, B, C, D, state, segments, lengths))
    scan = _function("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn")
    u_, delta_, B_, C_ = (x.transpose(1, 2) for x in (u, delta, B.to(u.dtype), C.to(u.dtype)))
    z, bias = None if gate is None else gate.transpose(1, 2), None if bias is None else bias.float()
    y, last = scan(u_, delta_, A.float(), B_, C_, D.float(), z, bias, bias is not None, return_last_state=True)
    return y.transpose(1, 2), _NoGradient.apply(last, u)


def _conv_unfit(x: Tensor, weight: Tensor, bias: Tensor | None = None, state: Tensor | None = None, *_: Any) -> str:
    if state is not None:
        return "causal_conv1d takes no state beside documents"
    fits = 2 <= weight.shape[1] <= 4 and x.shape[2] % 8 == 0
    return "" if fits else "causal_conv1d takes two to four taps and a multiple of eight channels"


def conv_causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, segments: Tensor | None, activation: bool
) -> Tensor:
    """The output of `conv.causal_conv` by causal_conv1d; time comes last there."""
    _fit(_conv_unfit(x, weight, bias, state))
    conv = _function("causal_conv1d", "causal_conv1d_fn")
    documents = None if segments is None else resets(segments).cumsum(1).to(torch.int32)
    y: Tensor = conv(x.transpose(1, 2), weight, bias, seq_idx=documents, activation="silu" if activation else None)
    return y.transpose(1, 2)


def ssd_mamba_ssm(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor, documents: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`ssd.ssd`, its inputs prepared, by mamba_ssm's Triton kernels."""
    scan = _function("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined")
    options = {"initial_states": state, "seq_idx": None if documents is None else documents.to(torch.int32)}
    y, last = scan(x, dt, A.float(), B, C, SSD_CHUNK, D=D.float(), return_final_states=True, **options)
    return y, last


def _ssd_unfit(*inputs: Any) -> str:
    return ""


def _gla_unfit(*inputs: Any) -> str:
    return "fla's kernel knows no documents in a row" if len(inputs) > 7 and inputs[7] is not None else ""


def ssd_fla(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor, documents: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`ssd.ssd`, its inputs prepared, by flash-linear-attention: q = C, k = B, v = dt x, the log of the decay dt A."""
    _fit(_gla_unfit(x, dt, A, B, C, D, state, documents))
    scan = _function("fla.ops.simple_gla", "chunk_simple_gla")
    repeats = x.shape[2] // B.shape[2]
    q, k = (v.to(x.dtype).repeat_interleave(repeats, 2) for v in (C, B))
    v, start = (x * dt[..., None]).to(x.dtype), state.transpose(2, 3).contiguous()
    y, last = scan(q, k, v, g=dt * A, scale=1.0, initial_state=start, output_final_state=True)
    return (y + D[:, None] * x).to(x.dtype), last.transpose(2, 3)


# by operation and package, which is also the name of the implementation: why it cannot take a call ("" if it can)
RIVALS: dict[str, dict[str, Callable[..., str]]] = {
    "selective_scan": {"mamba_ssm": _scan_unfit},
    "causal_conv": {"causal_conv1d": _conv_unfit},
    "ssd": {"mamba_ssm": _ssd_unfit, "fla": _gla_unfit},
}
