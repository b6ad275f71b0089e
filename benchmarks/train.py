"""Training speed: tokens/s, GFLOP/s and the share of this machine's measured matmul peak, beside karpathy/nanochat.

    python -m benchmarks.train [--shape small|quickstart|quickstart_rag|d12]
                               [--patterns transformer mamba mamba2 hybrid]
                               [--dtypes float32 bfloat16] [--compile] [--device cpu|cuda] [--peer CHECKOUT]

Shape "small" is 4 blocks 256 wide, vocabulary 32768, rows of 512 tokens, 8 rows a step; "d12" (for a GPU) is 12 blocks
768 wide, 16 rows of 2048. "quickstart" and "quickstart_rag" are the quickstart's stages on a CPU: 4 blocks 128 wide,
vocabulary 2048, 8 rows of 256 tokens packed from documents of about 50, or one row of 1024 from documents of 350. A
step is forward, backward and both optimizers, in the surroundings that a run has (`runtime.setup`); the peer's is what
its own script runs. The fastest of --steps counts (what else runs on the machine can only add time). bfloat16 is
measured where the device multiplies it natively. MFU is the share of a H100's or H200's 989 TFLOP/s in bfloat16, by the
same count of FLOPs for both. Ratios:

    share_of_peak_<dtype>        GFLOP/s of the transformer over the measured peak of torch.mm in that dtype; on a CPU
                                 in fp32 that is the product as a run multiplies (oneDNN where it is the faster)
    <dtype>_vs_nanochat          tokens/s of the transformer over nanochat's compiled step, at equal FLOPs a token
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

from benchmarks.common import report, run_peer, time_best
from nanochat import runtime
from nanochat.model.config import ModelConfig
from nanochat.model.lm import LM
from nanochat.runtime import cpu_has_bf16, peak_memory_bytes
from nanochat.training.optim import Optimizers, Rates

SHAPES = {  # depth, width, vocabulary, T, rows
    "small": (4, 256, 32768, 512, 8),
    "quickstart": (4, 128, 2048, 256, 8),
    "quickstart_rag": (4, 128, 2048, 1024, 1),
    "d12": (12, 768, 32768, 2048, 16),
}
DOCUMENT = {"quickstart": 50, "quickstart_rag": 350}  # tokens of a packed document; elsewhere it fills its row
HOPPER = 989e12  # FLOP/s, bfloat16, dense
PATTERNS = ("transformer", "mamba", "mamba2", "hybrid")


def main() -> None:
    parser = argparse.ArgumentParser(description="Training speed")
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--patterns", nargs="*", default=list(PATTERNS))
    parser.add_argument("--dtypes", nargs="*", choices=("float32", "bfloat16"))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--compile", action="store_true", help="also measure with torch.compile (a minute more a row)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--peer", help="checkout of karpathy/nanochat to measure in the same run")
    args = parser.parse_args()
    runtime.setup(args.device)
    torch.set_default_device(args.device)
    dtypes = args.dtypes or ["float32"] + (["bfloat16"] if args.device == "cuda" or cpu_has_bf16() else [])
    rows: list[dict[str, Any]] = []
    ratios: dict[str, float | None] = {}
    for dtype in dtypes:
        peak = matmul_peak(getattr(torch, dtype))
        rows.append({"what": "torch.mm", "dtype": dtype, "GFLOP/s": peak / 1e9, "share_of_peak": 1.0})
        ours = 0.0
        for pattern in args.patterns:
            for compiled in (False, True) if args.compile else (False,):
                row = measure(pattern, args.shape, dtype, args.steps, compiled, peak)
                rows.append(row)
                if pattern == "transformer" and row["tok/s"] > ours:
                    ours = row["tok/s"]
                    ratios[f"share_of_peak_{'bf16' if dtype == 'bfloat16' else 'fp32'}"] = row["share_of_peak"]
        if args.peer:
            peer = measure_peer(args.peer, args.shape, dtype, args.steps, peak, args.device)
            rows.append(peer)
            if ours:
                ratios[f"{'bf16' if dtype == 'bfloat16' else 'fp32'}_vs_nanochat"] = ours / peer["tok/s"]
    if args.device == "cpu" and not cpu_has_bf16():  # emulated a hundred times slower than fp32: no run would end
        print("this CPU has no bf16 matrix product: share_of_peak_bf16 cannot be measured here")
        ratios["share_of_peak_bf16"] = None
    report("train", rows, ratios)


def matmul_peak(dtype: torch.dtype) -> float:
    """FLOP/s of the best torch.mm of 1024 and 2048, on a GPU of 4096 and 8192."""
    best = 0.0
    gpu = torch.get_default_device().type == "cuda"
    for n in (4096, 8192) if gpu else (1024, 2048):
        a, b = torch.randn(n, n, dtype=dtype), torch.randn(n, n, dtype=dtype)

        def product(a: torch.Tensor = a, b: torch.Tensor = b) -> None:
            _ = a @ b
            synchronize()

        best = max(best, 2 * n**3 / time_best(product, 6))
    return best


def synchronize() -> None:
    if torch.get_default_device().type == "cuda":
        torch.cuda.synchronize()


def measure(pattern: str, shape: str, dtype: str, steps: int, compiled: bool, peak: float) -> dict[str, Any]:
    depth, width, vocab, T, n_rows = SHAPES[shape]
    config = ModelConfig(vocab_size=vocab, sequence_len=T, depth=depth, d_model=width, pattern=pattern)
    device = torch.get_default_device()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    model = LM.build(config, device, seed=0)
    model.compute_dtype = getattr(torch, dtype)
    optimizers = Optimizers(model, Rates())
    ids = torch.randint(0, vocab, (n_rows, T + 1))
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    weights, segments = torch.ones(n_rows, T), documents(n_rows, T, DOCUMENT.get(shape, T))
    loss_of = torch.compile(model.loss, dynamic=False) if compiled else model.loss
    times = []
    for _ in range(steps + 2):
        began = time.perf_counter()
        (loss_of(inputs, targets, weights, segments) / inputs.numel()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizers.step()
        optimizers.zero_grad()
        synchronize()
        times.append(time.perf_counter() - began)
    rate = n_rows * T / min(times[2:])
    flops = model.flops_per_token(T)
    return {
        "what": "ours" + (" compiled" if compiled else ""), "pattern": pattern, "dtype": dtype, "tok/s": rate,
        "MFLOP/token": flops / 1e6, "GFLOP/s": rate * flops / 1e9, "share_of_peak": rate * flops / peak,
        "peak_MB": peak_memory_bytes(device) / 1e6, **mfu(rate * flops, dtype),
    }  # fmt: skip


def documents(n_rows: int, T: int, mean: int) -> torch.Tensor:
    """(rows, T): which document of its row each token belongs to; with `mean` below T of mean / 2 to 3 mean / 2."""
    if mean >= T:
        return torch.zeros(n_rows, T, dtype=torch.int32)
    lengths = torch.randint(mean // 2, mean * 3 // 2, (n_rows, 2 * T // mean + 1), device="cpu")
    numbers = [torch.arange(len(row)).repeat_interleave(row)[:T] for row in lengths]
    return torch.stack(numbers).to(torch.get_default_device(), torch.int32)


def mfu(achieved: float, dtype: str) -> dict[str, float]:
    """The share of what the vendor promises; nothing where that is not known."""
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    return {"MFU": achieved / HOPPER} if hopper and dtype == "bfloat16" else {}


def measure_peer(peer: str, shape: str, dtype: str, steps: int, peak: float, device: str) -> dict[str, Any]:
    depth, width, vocab, T, n_rows = SHAPES[shape]
    arguments = [str(x) for x in (depth, width, vocab, T, n_rows, steps, dtype, device)]
    found = run_peer("train", peer, arguments)[-1]
    rate = n_rows * T / found["seconds"]
    return {
        "what": "nanochat compiled", "pattern": "transformer", "dtype": dtype, "tok/s": rate,
        "MFLOP/token": found["flops_per_token"] / 1e6, "GFLOP/s": rate * found["flops_per_token"] / 1e9,
        "share_of_peak": rate * found["flops_per_token"] / peak, **mfu(rate * found["flops_per_token"], dtype),
    }  # fmt: skip


if __name__ == "__main__":
    main()
