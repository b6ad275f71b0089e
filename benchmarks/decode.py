"""Decoding and prefill speed by batch size and weight format, against the memory bandwidth and karpathy/nanochat.

    python -m benchmarks.decode [--shape d12|d4] [--pattern transformer] [--weights fp32 bf16 int8] [--peer CHECKOUT]

Random weights, vocabulary 32768, prompt of 512 tokens, temperature 1, tokens/s of the fastest step on both sides (what
else runs on the machine can only add time). Ratios:

    share_of_read_bandwidth_b1   bytes of weights and states read for a token / time / measured read bandwidth (fp32)
    batch8_over_batch1           tokens/s of 8 rows over 1 row (fp32)
    <weights>_b<n>_vs_nanochat   decode, and <weights>_prefill_vs_nanochat, over nanochat's Engine in fp32
    <weights>_loss_bits_per_byte what the format adds to the loss of a trained model (--loss_of) on new text
    ragged64_waste               time of 64 prompts of 1 to 512 tokens over that of as many tokens in equal prompts
"""

from __future__ import annotations

import argparse
import math
import random
import time
from typing import Any

import torch

from benchmarks.common import report, run_peer, time_best
from nanochat import runtime
from nanochat.data.corpus import open_corpus
from nanochat.engine import cache
from nanochat.engine.generate import Engine, prefill
from nanochat.engine.load import load_checkpoint
from nanochat.engine.quantize import FORMATS, prepare
from nanochat.engine.sampling import Sampling
from nanochat.model.config import ModelConfig
from nanochat.model.lm import LM
from nanochat.tokenizer import Tokenizer

SHAPES = {"d12": (12, 768), "d4": (4, 256)}
BATCHES = (1, 8, 32)
PROMPT = 512


def main() -> None:
    parser = argparse.ArgumentParser(description="Decoding and prefill speed")
    parser.add_argument("--shape", nargs="*", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--pattern", default="transformer")
    parser.add_argument("--weights", nargs="*", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--batch", nargs="*", type=int, default=list(BATCHES))
    parser.add_argument("--tokens", type=int, default=12, help="decoded for each measurement")
    parser.add_argument("--ragged", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--loss_of", help="a trained stage or checkpoint: also state what each format adds to its loss")
    parser.add_argument("--text", default="world:seed=0,known=200", help="corpus for --loss_of, as in base_train")
    parser.add_argument("--peer", help="checkout of karpathy/nanochat to measure in the same run")
    args = parser.parse_args()
    runtime.setup("cpu", inference=True)
    rows: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    bandwidth = read_bandwidth()
    for shape in args.shape:
        prefix = f"{shape}_" if len(args.shape) > 1 and shape != args.shape[0] else ""
        found, compared = measure_shape(shape, args, bandwidth)
        rows += found
        ratios |= {prefix + name: value for name, value in compared.items()}
    if args.ragged:
        ratios["ragged64_waste"] = ragged_waste(build(args.shape[-1], args.pattern))
    if args.loss_of:
        losses = {w: loss_of(args.loss_of, args.text, w) for w in dict.fromkeys(["fp32", *args.weights])}
        rows += [{"shape": args.loss_of, "weights": w, "bits_per_byte": loss} for w, loss in losses.items()]
        ratios |= {f"{w}_loss_bits_per_byte": loss - losses["fp32"] for w, loss in losses.items() if w != "fp32"}
    rows.append({"shape": "read bandwidth", "engine": f"{bandwidth / 1e9:.1f} GB/s"})
    report("decode", rows, ratios)


def measure_shape(
    shape: str, args: argparse.Namespace, bandwidth: float
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Rows and ratios of one shape: the peer first, then every weight format."""
    peer = {row["batch"]: row for row in measure_peer(shape, args)} if args.peer else {}
    rows: list[dict[str, Any]] = [{"shape": shape, "engine": "nanochat", "weights": "fp32", **r} for r in peer.values()]
    ratios: dict[str, float] = {}
    for weights in args.weights:
        model = prepare(build(shape, args.pattern), weights)
        measured = {batch: measure(model, batch, args.tokens) for batch in args.batch}
        rows += [{"shape": shape, "engine": "ours", "weights": weights, **row} for row in measured.values()]
        if weights == "fp32" and 1 in measured:
            ratios["share_of_read_bandwidth_b1"] = bytes_read(model) * measured[1]["decode"] / bandwidth
            if 8 in measured:
                ratios["batch8_over_batch1"] = measured[8]["decode"] / measured[1]["decode"]
        for batch in peer:
            ratios[f"{weights}_b{batch}_vs_nanochat"] = measured[batch]["decode"] / peer[batch]["decode"]
        if peer:
            best = max(row["prefill"] for row in peer.values())
            ratios[f"{weights}_prefill_vs_nanochat"] = max(r["prefill"] for r in measured.values()) / best
    return rows, ratios


def build(shape: str, pattern: str) -> LM:
    depth, width = SHAPES[shape]
    config = ModelConfig(vocab_size=32768, sequence_len=2048, depth=depth, d_model=width, pattern=pattern)
    model = LM.build(config, seed=0)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2 and not p.any():
                p.normal_(0.0, 0.02)
    return model.requires_grad_(False)


def measure(model: LM, batch: int, n_tokens: int) -> dict[str, Any]:
    """Prefill one prompt, then decode `batch` samples of it, as the peer does. Tokens/s."""
    engine = Engine(model, Tokenizer([bytes([i]) for i in range(256)]), eos=())
    engine.tokenizer.decode_bytes = lambda ids: b"x"  # type: ignore[method-assign]  (the vocabulary is made up)
    prompt = torch.randint(0, 32768, (PROMPT,)).tolist()
    steps = engine._run([prompt], Sampling(max_tokens=n_tokens, temperature=1.0, seed=1), batch)
    times = []
    for _ in range(n_tokens):
        began = time.perf_counter()
        next(steps)
        times.append(time.perf_counter() - began)
    return {"batch": batch, "prefill": PROMPT / times[0], "decode": batch / min(times[2:])}


def measure_peer(shape: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    depth, width = SHAPES[shape]
    batches = ",".join(map(str, args.batch))
    return run_peer("decode", args.peer, [str(depth), str(width), str(PROMPT), str(args.tokens), batches])


def bytes_read(model: LM) -> float:
    """Bytes that one row must read for a token: every matrix once, and its states."""
    weights = sum(p.numel() * p.element_size() for p in model.blocks.parameters()) + model.head_weight.numel() * 4
    with torch.no_grad():
        states, _ = prefill(model, [[1] * PROMPT])
    return weights + cache.nbytes(states)


def loss_of(source: str, text: str, weights: str, n_tokens: int = 40_000) -> float:
    """Bits per byte of a trained model with these weights on held-back text, document by document."""
    loaded = load_checkpoint(source, device="cpu", quantize=weights)
    nats, n_bytes, seen = 0.0, 0, 0
    for document in open_corpus(text).documents("val"):
        ids = torch.tensor([loaded.tokenizer.encode(document, bos=True)[: loaded.model.config.sequence_len + 1]])
        nats += float(loaded.model.nll(ids[:, :-1], ids[:, 1:]).double().sum())
        n_bytes += int(loaded.tokenizer.token_bytes[ids[0, 1:].numpy()].sum())
        seen += ids.size(1)
        if seen >= n_tokens:
            break
    return nats / math.log(2) / n_bytes


def read_bandwidth() -> float:
    """Bytes/s of summing 256 MB."""
    x = torch.ones(64 << 20)
    return x.numel() * 4 / time_best(x.sum, 10)


@torch.no_grad()
def ragged_waste(model: LM) -> float:
    """Seconds of prefilling 64 prompts of 1 to 512 tokens over those of equally many tokens in equal prompts."""
    rng = random.Random(0)
    lengths = [rng.randint(1, PROMPT) for _ in range(64)]
    ragged = [[1] * n for n in lengths]
    equal = [[1] * (sum(lengths) // 64) for _ in lengths]
    return time_best(lambda: prefill(model, ragged), 1) / time_best(lambda: prefill(model, equal), 1)


if __name__ == "__main__":
    main()
