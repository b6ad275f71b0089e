"""Mamba on the CPU: the scans, the blocks and their decoding, beside mambapy and transformers in one run.

    python -m benchmarks.mamba [--parts errors op block attention decode] [--threads 1] [--repeats 3]

Forward and backward, B=4, L=1024, d_model=256 (E=512), N=16 for S6 and N=64 for SSD; random weights; matrix products as
the runtime sets them, for all alike. mambapy is its selective scan by pscan and its block; transformers are its mixers
without CUDA kernels. The time of Mamba-1's grows with the square of the length, so at L=1024 it is called once. Peers
that are not installed give ratios of null. Ratios (their time over ours, so above 1: we win):

    s6_vs_mambapy, m_block_vs_mambapy, m_block_vs_hf, m_block_vs_hf_256, m2_block_vs_hf
    s6_memory_share               our peak memory over mambapy's, of forward and backward by themselves
    m2_block_vs_attention_<L>     our attention block's time over our Mamba-2 block's; with _bf16 where the CPU has it
    decode_<m|m2>_<context>       one layer of d_model=512: a token of our attention over one of ours; _b8: 8 rows
    <s6|ssd>_error, _gradient     largest relative L2 error against float64, outputs and gradients
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import report
from benchmarks.memory import peak_growth
from nanochat.kernels.scan import selective_scan, selective_scan_ref
from nanochat.kernels.ssd import ssd, ssd_ref
from nanochat.model.attention import KVState
from nanochat.model.config import ModelConfig
from nanochat.model.lm import LM
from nanochat.model.mixer import Mixer
from nanochat.runtime import cpu_has_bf16, setup

B, L, D, E, N, N2, P = 4, 1024, 256, 512, 16, 64, 64
PARTS = ("errors", "op", "block", "attention", "decode")
Rows, Ratios = list[dict[str, Any]], dict[str, float | None]


def main() -> None:
    parser = argparse.ArgumentParser(description="Mamba on the CPU")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--threads", type=int, default=1, help="of every implementation (0: torch's default)")
    parser.add_argument("--repeats", type=int, default=3, help="the fastest counts")
    args = parser.parse_args()
    setup("cpu", threads=args.threads)
    rows: Rows = []
    ratios: Ratios = {}
    for part in args.parts:
        measure: Callable[[int], tuple[Rows, Ratios]] = globals()[f"measure_{part}"]
        found, compared = measure(args.repeats)
        rows += found
        ratios |= compared
    report("mamba", rows, ratios)


def time_all(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Seconds of the fastest call of each, after one to warm up; taken in turns, so that what else runs on the machine
    disturbs all alike."""
    best = dict.fromkeys(calls, float("inf"))
    for turn in range(repeats + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if turn:
                best[name] = min(best[name], time.perf_counter() - began)
    return best


def once(call: Callable[[], object]) -> float:
    """Seconds of a call that takes so long that what comes first makes no difference."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def over(theirs: float | None, ours: float | None) -> float | None:
    return theirs / ours if theirs and ours else None


def row(what: str, length: int, seconds: float | None, **more: Any) -> dict[str, Any]:
    return {"what": what, "L": length, "ms": None if seconds is None else seconds * 1e3, **more}


def gradients(fn: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """The output and the gradients of its product with fixed noise."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    return there_and_back(fn, leaves)()


def there_and_back(fn: Callable[..., Tensor], leaves: list[Tensor]) -> Callable[[], list[Tensor]]:
    """Forward and backward and nothing else: what it takes besides is made here."""
    g = torch.Generator().manual_seed(1)
    weight = torch.randn(leaves[0].shape, generator=g, dtype=torch.float64).to(leaves[0].dtype)

    def call() -> list[Tensor]:
        y = fn(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, weight)]

    return call


# ---- operators


def s6_inputs(length: int = L, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """u, delta, A, B, C, D as a trained block would give them."""
    g = torch.Generator().manual_seed(0)
    u, b, c = (torch.randn(B, length, n, generator=g) for n in (E, N, N))
    delta = torch.nn.functional.softplus(torch.randn(B, length, E, generator=g) - 3.0)
    A = -torch.arange(1, N + 1).float().expand(E, N).clone()
    return [x.to(dtype) for x in (u, delta, A, b, c, torch.ones(E))]


def ssd_inputs(length: int = L, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    H = E // P
    x = torch.randn(B, length, H, P, generator=g)
    b, c = (torch.randn(B, length, 1, N2, generator=g) for _ in range(2))
    dt = torch.nn.functional.softplus(torch.randn(B, length, H, generator=g) - 3.0)
    return [v.to(dtype) for v in (x, dt, -torch.linspace(1, 16, H), b, c, torch.ones(H))]


def measure_errors(repeats: int, length: int = 256) -> tuple[Rows, Ratios]:
    """Against the sequential float64 oracle; at a length that it can do in seconds."""
    ratios: Ratios = {}
    for name, op, ref, inputs in (
        ("s6", selective_scan, selective_scan_ref, s6_inputs(length)),
        ("ssd", ssd, ssd_ref, ssd_inputs(length)),
    ):
        ours = gradients(lambda *x, op=op: op(*x)[0], inputs)  # type: ignore[misc]
        exact = gradients(lambda *x, ref=ref: ref(*x)[0], [x.double() for x in inputs])  # type: ignore[misc]
        errors = [float((a.double() - b).norm() / b.norm()) for a, b in zip(ours, exact)]
        ratios |= {f"{name}_error": errors[0], f"{name}_gradient_error": max(errors[1:])}
    return [], ratios


def mambapy_scan() -> Callable[..., Tensor] | None:
    """mambapy's selective scan, (u, delta, A, B, C, D) as ours takes them."""
    block = mambapy_block()
    return None if block is None else block.selective_scan  # type: ignore[return-value]


def mambapy_block() -> nn.Module | None:
    try:
        from mambapy.mamba import MambaBlock, MambaConfig
    except ImportError:
        print("mambapy is not installed (pip install mambapy): no ratio against it")
        return None
    return MambaBlock(MambaConfig(d_model=D, n_layers=1, d_state=N))


def measure_op(repeats: int) -> tuple[Rows, Ratios]:
    s6, second = ([x.requires_grad_() for x in inputs] for inputs in (s6_inputs(), ssd_inputs()))
    calls: dict[str, Callable[[], object]] = {
        "s6 ours": there_and_back(lambda *x: selective_scan(*x)[0], s6),
        "ssd ours": there_and_back(lambda *x: ssd(*x)[0], second),
    }
    if (scan := mambapy_scan()) is not None:
        calls["s6 mambapy"] = there_and_back(scan, s6)
    times = time_all(calls, repeats)
    peaks = {name: peak_growth(call) for name, call in calls.items()}
    rows = [row(name, L, seconds, peak_MB=(peaks[name] or 0) / 1e6) for name, seconds in times.items()]
    ratios = {
        "s6_vs_mambapy": over(times.get("s6 mambapy"), times["s6 ours"]),
        "s6_memory_share": over(peaks["s6 ours"], peaks.get("s6 mambapy")),
    }
    return rows, ratios


# ---- blocks


def mixer(letter: str, d_model: int = D, **options: Any) -> Mixer:
    """Our block without norm and residual, as the peers' are, with random weights in the last matrix too."""
    sizes = {"n_head": 4 if d_model == D else 8, "d_state": N, "d_state2": N2, "head_dim2": P, "ssm_norm": False}
    config = ModelConfig(vocab_size=8, depth=1, d_model=d_model, pattern=letter, **{**sizes, **options})
    found = LM.build(config, seed=0).blocks[0].mixer
    assert isinstance(found, Mixer)
    with torch.no_grad():
        for p in found.parameters():
            if p.dim() == 2 and not p.any():
                p.normal_(0.0, p.size(1) ** -0.5)
    return found


def hf_mixers() -> dict[str, nn.Module]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from transformers import Mamba2Config, MambaConfig
            from transformers.models.mamba.modeling_mamba import MambaMixer
            from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
    except ImportError:
        print("transformers is not installed (pip install transformers): no ratio against it")
        return {}
    common: dict[str, Any] = {"vocab_size": 8, "hidden_size": D, "num_hidden_layers": 1, "expand": 2}
    second = Mamba2Config(**common, state_size=N2, num_heads=E // P, head_dim=P, n_groups=1)
    return {"M": MambaMixer(MambaConfig(**common, state_size=N), 0), "M2": Mamba2Mixer(second, 0)}


def training(block: nn.Module, length: int, dtype: torch.dtype = torch.float32) -> Callable[[], object]:
    """Forward and backward over (B, length, D)."""
    x = torch.randn(B, length, D, dtype=dtype, requires_grad=True)

    def step() -> None:
        y = block(x)
        (y[0] if isinstance(y, tuple) else y).float().square().mean().backward()
        x.grad = None
        block.zero_grad()

    return step


def measure_block(repeats: int) -> tuple[Rows, Ratios]:
    blocks: dict[str, nn.Module] = {f"{letter} block ours": mixer(letter) for letter in ("M", "M2")}
    if (peer := mambapy_block()) is not None:
        blocks["M block mambapy"] = peer
    theirs = hf_mixers()
    if theirs:
        blocks["M2 block transformers"] = theirs["M2"]
    times = time_all({name: training(block, L) for name, block in blocks.items()}, repeats)
    short = {"M block ours": training(mixer("M"), 256)}
    slow: float | None = None
    if theirs:
        short["M block transformers"] = training(theirs["M"], 256)
        slow = once(training(theirs["M"], L))
        times["M block transformers"] = slow
    times_256 = time_all(short, min(repeats, 2))
    rows = [row(name, L, seconds) for name, seconds in times.items()]
    rows += [row(name, 256, seconds) for name, seconds in times_256.items()]
    return rows, {
        "m_block_vs_mambapy": over(times.get("M block mambapy"), times["M block ours"]),
        "m_block_vs_hf": over(slow, times["M block ours"]),
        "m_block_vs_hf_256": over(times_256.get("M block transformers"), times_256["M block ours"]),
        "m2_block_vs_hf": over(times.get("M2 block transformers"), times["M2 block ours"]),
    }


def measure_attention(repeats: int, lengths: tuple[int, ...] = (1024, 4096)) -> tuple[Rows, Ratios]:
    rows: Rows = []
    ratios: Ratios = {}
    for dtype in (torch.float32, torch.bfloat16):
        suffix = "_bf16" if dtype == torch.bfloat16 else ""
        for length in lengths:
            name = f"m2_block_vs_attention_{length // 1024}k{suffix}"
            ratios[name] = None
            if suffix and not cpu_has_bf16():
                continue  # emulated a hundred times slower than fp32: no run would end
            found = time_all({x: training(mixer(x), length, dtype) for x in ("T", "M2")}, repeats)
            rows += [row(f"{letter} block ours{suffix}", length, seconds) for letter, seconds in found.items()]
            ratios[name] = over(found["T"], found["M2"])
    return rows, ratios


# ---- decoding


@torch.no_grad()
def decoding(letter: str, context: int, batch: int, n_tokens: int) -> Callable[[], object]:
    """One token of one layer behind `context` others, callable `n_tokens` times."""
    layer, d_model = mixer(letter, 512).requires_grad_(False), 512
    x = torch.randn(batch, 1, d_model)
    state = layer.init_state(batch, context + n_tokens + 8, x.device, x.dtype)
    if isinstance(state, KVState):  # what stands in the cache does not change the time
        state.k.normal_()
        state.v.normal_()
        state.lengths = [context] * batch

    @torch.no_grad()
    def step() -> None:
        layer(x, state)

    return step


def measure_decode(
    repeats: int, cases: tuple[tuple[int, int], ...] = ((512, 1), (4096, 1), (32768, 1), (4096, 8))
) -> tuple[Rows, Ratios]:
    rows: Rows = []
    ratios: Ratios = {}
    for context, batch in cases:
        n_tokens = 10 * repeats
        found = time_all({x: decoding(x, context, batch, n_tokens) for x in ("T", "M", "M2")}, n_tokens)
        rows += [row(f"{x} decode B={batch}", context, seconds) for x, seconds in found.items()]
        suffix = (f"{context // 1024}k" if context >= 1024 else str(context)) + (f"_b{batch}" if batch > 1 else "")
        for letter in ("M", "M2"):
            ratios[f"decode_{letter.lower()}_{suffix}"] = over(found["T"], found[letter])
    return rows, ratios


if __name__ == "__main__":
    main()
