"""The kernels on one GPU, against its roofline and the peers that are installed: mamba-ssm, causal-conv1d, fla, flash.

    python -m benchmarks.kernels [--parts scan ssd conv norm loss attention] [--tokens 32768] [--dtype bfloat16]

Tokens x E=4096 channels, N=16 for S6, N=128 and heads of 64 for SSD, vocabulary 32768; attention with 16 heads of 128
at 2k, 8k and 32k. A time is the median of repeated calls with a cold L2 cache; the forward pass without gradients, the
backward pass by itself. `floor` is the least time that the bytes (at the measured bandwidth of a copy), the
exponentials and the matrix products of a call can take; `share` is floor over time. Ratios:

    <op>_forward_ms, <op>_backward_ms       ours
    <op>_<forward|backward>_vs_<peer>       the peer's time over ours, so above 1: we win; null: the peer cannot be run
    conv_share_of_copy, loss_share_of_copy  bytes read and written / time / bandwidth of a copy, forward
    <op>_<forward|backward>_target          the time aimed at, on an H200, over ours
"""

from __future__ import annotations

import argparse
import gc
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import report, time_best
from nanochat.errors import UsageError
from nanochat.kernels.attention import ATTENTION
from nanochat.kernels.conv import causal_conv
from nanochat.kernels.loss import linear_cross_entropy
from nanochat.kernels.norm import gated_rms_norm
from nanochat.kernels.scan import selective_scan
from nanochat.kernels.ssd import ssd

E, N, N2, P, K, V, D = 4096, 16, 128, 64, 4, 32768, 768
ROW = 2048  # tokens of a row, attention apart
TARGETS = {("scan", "forward"): 0.9, ("scan", "backward"): 2.0, ("ssd", "forward"): 0.6}  # ms on an H200, 32k tokens
COLD = 256 << 20  # bytes written between two calls, more than any L2 cache
EXPONENTIALS = 16  # a clock and multiprocessor


@dataclass(frozen=True)
class Case:
    """One implementation of one operation. `moved` (bytes), `exps` and `flops` are those of the forward pass."""

    op: str
    name: str  # "ours", or the peer's
    run: Callable[[], Tensor]
    inputs: list[Tensor] = field(default_factory=list)  # that the backward pass is for; none: forward only
    moved: float = 0.0
    moved_back: float = 0.0
    exps: float = 0.0
    flops: float = 0.0


@dataclass(frozen=True)
class Machine:
    """What bounds a kernel: bytes/s of a copy, exponentials/s, and FLOP/s of a large matrix product."""

    device: torch.device
    dtype: torch.dtype
    copy: float
    exps: float
    flops: float

    def floor(self, moved: float, exps: float = 0.0, flops: float = 0.0) -> float:
        return max(moved / self.copy, exps / self.exps, flops / self.flops)


def main() -> None:
    parser = argparse.ArgumentParser(description="GPU kernels")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--tokens", type=int, default=32768, help="of a call: rows of 2048 (attention: 2k, 8k, 32k)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--device", default="cuda", help="cpu only shows that it runs: take --tokens 64 or so")
    args = parser.parse_args()
    if args.device != "cpu" and not torch.cuda.is_available():
        raise SystemExit("error: this torch sees no GPU; --device cpu --tokens 64 shows that the benchmark runs")
    machine = probe(torch.device(args.device), getattr(torch, args.dtype))
    rows: list[dict[str, Any]] = [
        {"op": "copy", "GB/s": machine.copy / 1e9},
        {"op": "matmul", "TFLOP/s": machine.flops / 1e12},
        {"op": "exp", "G/s": machine.exps / 1e9},
    ]
    ratios: dict[str, float | None] = {}
    for part in args.parts:
        times: dict[str, dict[str, float]] = {}
        for case in PARTS[part](machine, args.tokens):
            row = measure(case, machine)
            rows.append(row)
            times[f"{case.op}/{case.name}"] = row
            gc.collect()
        ratios |= compare(times, args.tokens if machine.device.type == "cuda" else 0)
    report("kernels", rows, ratios)


def probe(device: torch.device, dtype: torch.dtype) -> Machine:
    size = 1 << 29 if device.type == "cuda" else 1 << 24
    a, b = torch.empty(size, dtype=torch.uint8, device=device), torch.empty(size, dtype=torch.uint8, device=device)
    copy = 2 * size / seconds(lambda: b.copy_(a), device)
    n = 8192 if device.type == "cuda" else 256
    m = torch.randn(n, n, device=device, dtype=dtype)
    flops = 2 * n**3 / seconds(lambda: m @ m, device)
    if device.type != "cuda":
        return Machine(device, dtype, copy, 1e9, flops)
    properties = torch.cuda.get_device_properties(device)
    clock = 1e3 * getattr(properties, "clock_rate", 1_755_000)  # kHz
    return Machine(device, dtype, copy, EXPONENTIALS * properties.multi_processor_count * clock, flops)


def seconds(fn: Callable[[], object], device: torch.device, repeats: int = 20) -> float:
    """The median of `repeats` calls on a GPU, each with a cold L2 cache; the best of 2 on a CPU."""
    if device.type != "cuda":
        return time_best(fn, 2)
    cold = torch.empty(COLD, dtype=torch.uint8, device=device)
    for _ in range(3):
        fn()
    pairs = []
    for _ in range(repeats):
        cold.zero_()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        fn()
        end.record()
        pairs.append((begin, end))
    torch.cuda.synchronize()
    times = sorted(begin.elapsed_time(end) for begin, end in pairs)
    return times[len(times) // 2] / 1e3


def measure(case: Case, machine: Machine) -> dict[str, Any]:
    row: dict[str, Any] = {"op": case.op, "implementation": case.name}
    try:
        with torch.no_grad():
            row["forward_ms"] = 1e3 * seconds(case.run, machine.device)
        floor = machine.floor(case.moved, case.exps, case.flops)
        if floor:
            row |= {"floor_ms": 1e3 * floor, "share": 1e3 * floor / row["forward_ms"]}
            row["share_of_copy"] = 1e3 * case.moved / machine.copy / row["forward_ms"]
        if case.flops:
            row["TFLOP/s"] = case.flops / row["forward_ms"] / 1e9
        if case.inputs:
            y = case.run()
            dy = torch.randn_like(y)
            back = seconds(lambda: torch.autograd.grad(y, case.inputs, dy, retain_graph=True), machine.device)
            # twice the products, the exponentials once more
            floor = machine.floor(case.moved_back or 2 * case.moved, case.exps, 2 * case.flops)
            row["backward_ms"] = 1e3 * back
            if floor:
                row |= {"floor_back_ms": 1e3 * floor, "share_back": floor / back}
    except Exception as error:  # a peer built for another torch must not end the table; our own must work
        if case.name == "ours":
            raise
        row["problem"] = f"{type(error).__name__}: {error}".splitlines()[0][:100]
    return row


def compare(times: dict[str, dict[str, float]], n_token: int) -> dict[str, float | None]:
    """Ours in ms, against the targets for so many tokens (0: no GPU, no target), and against each peer."""
    ratios: dict[str, float | None] = {}
    for key, row in times.items():
        op, name = key.split("/")
        for way in ("forward", "backward"):
            ours = times[f"{op}/ours"].get(f"{way}_ms") if f"{op}/ours" in times else None
            mine = row.get(f"{way}_ms")
            if name != "ours":
                if ours is not None:
                    ratios[f"{op}_{way}_vs_{name}"] = None if mine is None else mine / ours
            elif mine is not None:
                ratios[f"{op}_{way}_ms"] = mine
                if n_token and (op, way) in TARGETS:
                    ratios[f"{op}_{way}_target"] = TARGETS[op, way] * n_token / 32768 / mine
        if name == "ours" and op in ("conv", "loss"):
            ratios[f"{op}_share_of_copy"] = row["share_of_copy"]
    return ratios


class Maker:
    """Random tensors for a machine."""

    def __init__(self, machine: Machine):
        self.machine = machine
        self.generator = torch.Generator(machine.device).manual_seed(0)

    def __call__(self, *shape: int, grad: bool = True, wide: bool = False) -> Tensor:
        dtype = torch.float32 if wide else self.machine.dtype
        x = torch.randn(shape, generator=self.generator, device=self.machine.device, dtype=torch.float32)
        return x.to(dtype).requires_grad_(grad)

    def steps(self, *shape: int) -> Tensor:
        """Step sizes between 0.001 and 0.1, float32."""
        x = torch.rand(shape, generator=self.generator, device=self.machine.device)
        return (0.001 * 100**x).requires_grad_()


def rows_of(n_token: int) -> tuple[int, int]:
    return max(1, n_token // ROW), min(ROW, n_token)


def peer(module: str, name: str) -> Callable[..., Any]:
    """A peer's function; where it cannot be imported, one that says why."""
    try:
        return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]
    except Exception as error:  # not installed, or built for another torch
        why = error

        def missing(*args: object, **options: object) -> Tensor:
            raise RuntimeError(f"not usable: {why}")

        return missing


def scan_cases(machine: Machine, n_token: int) -> Iterator[Case]:
    make, (B, T) = Maker(machine), rows_of(n_token)
    x, delta, gate = (make(B, T, E) for _ in range(3))
    A = (-torch.arange(1, N + 1, device=machine.device).float().expand(E, N)).clone().requires_grad_()
    b, c, skip = make(B, T, N), make(B, T, N), make(E, wide=True)
    bias = make.steps(E).detach().expm1().log().requires_grad_()
    inputs = [x, delta, A, b, c, skip, bias, gate]
    tokens = B * T * E * x.element_size()
    size = {"moved": 4.0 * tokens, "moved_back": 7.0 * tokens, "exps": float(B * T * E * N)}
    yield Case("scan", "ours", lambda: selective_scan(x, delta, A, b, c, skip, bias_E=bias, gate_BTE=gate)[0], inputs,
               **size)  # fmt: skip
    theirs = peer("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn")
    xt, dt, zt, bt, ct = (v.detach().transpose(1, 2).contiguous().requires_grad_() for v in (x, delta, gate, b, c))
    yield Case("scan", "mamba_ssm", lambda: theirs(xt, dt, A, bt, ct, skip, z=zt, delta_bias=bias, delta_softplus=True),
               [xt, dt, A, bt, ct, skip, bias, zt], **size)  # fmt: skip


def ssd_cases(machine: Machine, n_token: int) -> Iterator[Case]:
    make, (B, T) = Maker(machine), rows_of(n_token)
    H = E // P
    x, b, c = make(B, T, H, P), make(B, T, 1, N2), make(B, T, 1, N2)
    dt, skip = make.steps(B, T, H), make(H, wide=True)
    A = (-1 - 15 * torch.rand(H, device=machine.device)).requires_grad_()
    inputs = [x, dt, A, b, c, skip]
    chunk = 128
    flops = float(B * T * H * (2 * chunk * P + 4 * N2 * P) + B * T * 2 * chunk * N2)
    size = {"moved": 2.0 * x.numel() * x.element_size(), "moved_back": 3.0 * x.numel() * x.element_size(),
            "flops": flops}  # fmt: skip
    yield Case("ssd", "ours", lambda: ssd(x, dt, A, b, c, skip)[0], inputs, **size)
    theirs = peer("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined")
    yield Case("ssd", "mamba_ssm", lambda: theirs(x, dt, A, b, c, 256, D=skip), inputs, **size)
    gla = peer("fla.ops.simple_gla", "chunk_simple_gla")

    def fla() -> Tensor:
        keys, queries = (v.expand(B, T, H, N2).contiguous() for v in (b, c))
        return gla(queries, keys, (x * dt[..., None]).to(x.dtype), g=dt * A, scale=1.0)[0]  # type: ignore[no-any-return]

    yield Case("ssd", "fla", fla, [x, dt, A, b, c], **size)


def conv_cases(machine: Machine, n_token: int) -> Iterator[Case]:
    make, (B, T) = Maker(machine), rows_of(n_token)
    x, weight, bias = make(B, T, E), make(E, K, wide=True), make(E, wide=True)
    bytes_ = float(x.numel() * x.element_size())
    yield Case("conv", "ours", lambda: causal_conv(x, weight, bias)[0], [x, weight, bias], 2 * bytes_, 3 * bytes_)
    theirs = peer("causal_conv1d", "causal_conv1d_fn")
    yield Case("conv", "causal_conv1d",
               lambda: theirs(x.transpose(1, 2), weight.to(x.dtype), bias.to(x.dtype), activation="silu"),
               [x, weight, bias], 2 * bytes_, 3 * bytes_)  # fmt: skip


def norm_cases(machine: Machine, n_token: int) -> Iterator[Case]:
    make, (B, T) = Maker(machine), rows_of(n_token)
    y, z, weight = make(B, T, E), make(B, T, E), make(E, wide=True)
    bytes_ = float(y.numel() * y.element_size())
    yield Case("norm", "ours", lambda: gated_rms_norm(y, z, 1, 1e-6), [y, z], 3 * bytes_, 5 * bytes_)
    theirs = peer("mamba_ssm.ops.triton.layernorm_gated", "rmsnorm_fn")
    yield Case("norm", "mamba_ssm", lambda: theirs(y, weight, None, z=z, eps=1e-6, norm_before_gate=False), [y, z],
               3 * bytes_, 5 * bytes_)  # fmt: skip
    yield Case("norm", "torch", lambda: F.rms_norm(y * F.silu(z), (E,), eps=1e-6), [y, z], 3 * bytes_, 5 * bytes_)


def loss_cases(machine: Machine, n_token: int) -> Iterator[Case]:
    """The kernel between the matrix products by itself, then the loss whole, with its gradients."""
    make = Maker(machine)
    targets = torch.randint(V, (n_token,), generator=make.generator, device=machine.device)
    weights = torch.ones(n_token, device=machine.device)
    if machine.device.type == "cuda":
        from nanochat.kernels.triton_loss import cross_entropy_rows

        n_row = min(8192, n_token)
        logits = make(n_row, V, grad=False)
        yield Case("loss", "ours", lambda: cross_entropy_rows(logits, targets[:n_row], weights[:n_row], 15.0, True),
                   moved=2.0 * logits.numel() * logits.element_size())  # fmt: skip
    hidden, head = make(n_token, D), make(V, D, wide=True)
    flops = 6.0 * n_token * V * D

    def whole() -> Tensor:
        with torch.enable_grad():  # the gradients are made in the forward pass
            return linear_cross_entropy(hidden, head, targets, weights, 15.0)

    def plain() -> Tensor:
        with torch.enable_grad():
            logits = 15 * torch.tanh((hidden @ head.to(hidden.dtype).t()).float() / 15)
            loss = F.cross_entropy(logits, targets, reduction="sum")
        torch.autograd.grad(loss, (hidden, head))
        return loss

    yield Case("head", "ours", whole, flops=flops)
    yield Case("head", "torch", plain, flops=flops)


def attention_cases(machine: Machine, n_token: int) -> Iterator[Case]:
    make, n_head, width = Maker(machine), 16, 128
    for length in sorted({min(n_token, n) for n in (2048, 8192, 32768)}):
        n_row = max(1, n_token // length)
        q, k, v = (make(n_row, length, n_head, width) for _ in range(3))
        size = {"moved": 4.0 * q.numel() * q.element_size(), "flops": 2.0 * n_row * n_head * length**2 * width}
        names = ["sdpa", "flash"] if machine.device.type == "cuda" else ["sdpa"]
        for name in names:
            op = ATTENTION[name]
            yield Case(f"attention_{length}", name, lambda op=op, q=q, k=k, v=v: op(q, k, v), [q, k, v], **size)  # type: ignore[misc]
        if length <= 8192:  # packed documents of 500 tokens, windows of 1024
            documents = (torch.arange(length, device=q.device) // 500).expand(n_row, -1)
            for name in names:
                op = ATTENTION[name]
                yield Case(f"packed_{length}", name, lambda op=op, q=q, k=k, v=v, s=documents: op(q, k, v, s),
                           [q, k, v])  # type: ignore[misc]  # fmt: skip
                yield Case(f"window_{length}", name, lambda op=op, q=q, k=k, v=v: op(q, k, v, None, 1024), [q, k, v])  # type: ignore[misc]


PARTS: dict[str, Callable[[Machine, int], Iterator[Case]]] = {
    "scan": scan_cases, "ssd": ssd_cases, "conv": conv_cases, "norm": norm_cases, "loss": loss_cases,
    "attention": attention_cases,
}  # fmt: skip


if __name__ == "__main__":
    try:
        main()
    except UsageError as error:
        raise SystemExit(f"error: {error}") from None
