"""Transformer, Mamba, Mamba-2 and hybrids at equal parameters: speed, memory, and what they learn.

    python -m benchmarks.architectures [--patterns transformer mamba mamba2 hybrid ...] [--depth 4] [--d_model 256]
        [--parts training prefill decode quality] [--contexts 512 4096 32768] [--device cpu]
        [--threads 0] [--steps 200] [--sequence_len 256] [--data world:seed=0,known=200] [--passkey 256 512 1024]

All have the same depth and width; the MLP behind M and M2 blocks is sized so that the blocks of every pattern hold as
many parameters (within 1%). Training: fastest step of 1 row of each length, and the peak memory of a step. Prefill: one
prompt; decode: one token behind a context, in turns. Quality: every pattern is trained on the same rows (state carried
nowhere), then measured: bits per byte after equal tokens and after equal time (that of the fastest run), the loss by
position up to four times the training length, and passkeys. Ratios (of the transformer, at 8k tokens):

    training_<pattern>    tokens/s over the transformer's
    inference_<pattern>   the same of a prompt of 8k and 256 tokens generated behind it
    memory_<pattern>      peak of a training step over the transformer's
    state_<pattern>       bytes of state over the transformer's
    bpb_<pattern>         bits per byte after equal tokens over the transformer's
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import report
from benchmarks.mamba import over, time_all
from benchmarks.memory import peak_growth
from nanochat import checkpoint
from nanochat.engine import cache
from nanochat.engine.generate import PREFILL_TOKENS
from nanochat.evaluation.commands import BaseEvalSettings, evaluate_base
from nanochat.model.attention import KVState
from nanochat.model.config import ModelConfig
from nanochat.model.lm import LM
from nanochat.model.mixer import State
from nanochat.report import read_log
from nanochat.runtime import setup
from nanochat.training.commands import TokenizerSettings, train_base, train_tokenizer
from nanochat.training.settings import BaseSettings

PATTERNS = ("transformer", "mamba", "mamba2", "hybrid", "1in8")
PARTS = ("training", "prefill", "decode", "quality")
CLAIMED = 8192  # tokens at which the published claims are compared
GENERATED = 256  # tokens after a prompt of so many
Rows, Ratios = list[dict[str, Any]], dict[str, float | None]


def main() -> None:
    args = arguments().parse_args()
    device = setup(args.device, threads=args.threads).device
    models = {name: config_at_equal_size(name, args.depth, args.d_model, args.vocab_size) for name in args.patterns}
    rows: Rows = [{"what": f"MLP {mlp(c)}", "pattern": name, "parameters": sized(c)} for name, c in models.items()]
    ratios: Ratios = {}
    measured: dict[str, dict[str, dict[int, float]]] = {}
    for part in [part for part in args.parts if part != "quality"]:
        lengths = [n for n in args.contexts if part == "decode" or n <= args.longest_pass]
        found, times = {"training": training, "prefill": prefill, "decode": decode}[part](models, lengths, device)
        rows += found
        measured |= times
    ratios |= claims(measured, args.patterns)
    if "quality" in args.parts:
        found, compared = quality(models, args)
        rows += found
        ratios |= compared
    report("architectures", rows, ratios)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Architectures at equal parameters")
    parser.add_argument("--patterns", nargs="*", default=list(PATTERNS))
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--d_model", type=int, default=256)
    parser.add_argument("--vocab_size", type=int, default=4096)
    parser.add_argument("--contexts", nargs="*", type=int, default=[512, 2048, CLAIMED, 32768])
    parser.add_argument("--longest_pass", type=int, default=CLAIMED, help="longest row to train and to prefill")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="on a CPU (0: all cores)")
    parser.add_argument("--steps", type=int, default=200, help="of the training for quality")
    parser.add_argument("--rows", type=int, default=8, help="of a step of it")
    parser.add_argument("--sequence_len", type=int, default=256, help="tokens of such a row")
    parser.add_argument("--data", default="world:seed=0,known=200", help="text to train on, as in base_train")
    parser.add_argument("--eval_tokens", type=int, default=65536, help="to evaluate on")
    parser.add_argument("--passkey", nargs="*", type=int, default=[256, 512, 1024], help="lengths of the texts")
    return parser


# ---- models of one size


def config_at_equal_size(name: str, depth: int, d_model: int, vocab_size: int) -> ModelConfig:
    """The pattern with the MLP behind its M and M2 blocks such that its blocks hold what a transformer's do."""
    plain = ModelConfig(vocab_size=vocab_size, depth=depth, d_model=d_model, sequence_len=CLAIMED)
    wanted = sized(replace(plain, pattern="transformer"))
    low, high = 0.0, 8.0
    for _ in range(30):  # parameters grow with the width of the MLP
        middle = (low + high) / 2
        config = replace(plain, pattern=name, mlp_m=middle, mlp_m2=middle)
        low, high = (middle, high) if sized(config) < wanted else (low, middle)
    return replace(plain, pattern=name, mlp_m=low, mlp_m2=low).resolved()


def sized(config: ModelConfig) -> int:
    """Parameters of the blocks."""
    with torch.device("meta"):
        return LM(config.resolved()).n_params()["blocks"]


def mlp(config: ModelConfig) -> str:
    return " ".join(f"{letter} {config.mlp_ratio(letter):.2f}" for letter in dict.fromkeys(config.blocks))


def built(config: ModelConfig, device: torch.device) -> LM:
    """Random weights in every matrix; in bf16 on a GPU."""
    model = LM.build(config, device, seed=0)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2 and not p.any():
                p.normal_(0.0, 0.02)
    model.compute_dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return model


def waited(fn: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """The call, over only when the GPU is done."""

    def call() -> None:
        fn()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return call


# ---- speed and memory


def training(models: dict[str, ModelConfig], lengths: list[int], device: torch.device) -> tuple[Rows, Any]:
    rows, rates, peaks = [], {name: {} for name in models}, {name: {} for name in models}  # type: ignore[var-annotated]
    for length in lengths:
        steps = {name: waited(training_step(built(c, device), length), device) for name, c in models.items()}
        for name, seconds in time_all(steps, 2).items():
            peak = peak_growth(steps[name], device.type)
            rates[name][length], peaks[name][length] = length / seconds, peak
            rows.append({"what": "training", "pattern": name, "tokens": length, "tok/s": length / seconds,
                         "peak_MB": (peak or 0) / 1e6})  # fmt: skip
    return rows, {"training": rates, "memory": peaks}


def training_step(model: LM, length: int) -> Callable[[], object]:
    ids = torch.randint(0, model.config.vocab_size, (1, length + 1), device=model.device)
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    weights = torch.ones(1, length, device=model.device)
    segments = torch.zeros(1, length, dtype=torch.int32, device=model.device)

    def step() -> None:
        (model.loss(inputs, targets, weights, segments) / length).backward()
        for p in model.parameters():
            p.grad = None

    return step


def prefill(models: dict[str, ModelConfig], lengths: list[int], device: torch.device) -> tuple[Rows, Any]:
    rows, seconds_of = [], {name: {} for name in models}  # type: ignore[var-annotated]
    for length in lengths:
        calls = {name: waited(reading(built(c, device), length), device) for name, c in models.items()}
        for name, seconds in time_all(calls, 2).items():
            seconds_of[name][length] = seconds
            rows.append({"what": "prefill", "pattern": name, "tokens": length, "tok/s": length / seconds})
    return rows, {"prefill": seconds_of}


def reading(model: LM, length: int) -> Callable[[], object]:
    ids = torch.randint(0, model.config.vocab_size, (1, length), device=model.device)

    @torch.no_grad()
    def read() -> None:
        states = model.init_states(1, length)
        for chunk in ids.split(PREFILL_TOKENS, dim=1):
            model(chunk, states)

    return read


def decode(models: dict[str, ModelConfig], lengths: list[int], device: torch.device) -> tuple[Rows, Any]:
    rows, seconds_of, bytes_of = [], {name: {} for name in models}, {name: {} for name in models}  # type: ignore[var-annotated]
    n_tokens = 30
    for length in lengths:
        begun = {name: behind(built(c, device), length, n_tokens) for name, c in models.items()}
        calls = {name: waited(one_token(*pair), device) for name, pair in begun.items()}
        for name, (_, states) in begun.items():
            bytes_of[name][length] = cache.nbytes(states)
        for name, seconds in time_all(calls, n_tokens).items():
            seconds_of[name][length] = seconds
            rows.append({"what": "decode", "pattern": name, "tokens": length, "tok/s": 1 / seconds,
                         "state_MB": bytes_of[name][length] / 1e6})  # fmt: skip
    return rows, {"decode": seconds_of, "state": bytes_of}


def behind(model: LM, context: int, room: int) -> tuple[LM, list[State]]:
    """States as after `context` tokens: what stands in them does not change the time."""
    states = model.init_states(1, context + room + 8)
    for state in states:
        if isinstance(state, KVState):
            state.k.normal_()  # zeros that nobody wrote would all be one page of memory, which stays in the cache
            state.v.normal_()
            state.lengths = [context]
    return model, states


def one_token(model: LM, states: list[State]) -> Callable[[], object]:
    ids = torch.zeros(1, 1, dtype=torch.int64, device=model.device)

    @torch.no_grad()
    def step() -> None:
        model.logits(model(ids, states))

    return step


def claims(measured: dict[str, dict[str, dict[int, float]]], patterns: list[str]) -> Ratios:
    """Each pattern over the transformer at `CLAIMED` tokens, for whatever was measured."""
    ratios: Ratios = {}

    def at(what: str, name: str) -> float | None:
        return measured.get(what, {}).get(name, {}).get(CLAIMED)

    def inference(name: str) -> float | None:
        first, each = at("prefill", name), at("decode", name)
        return first + GENERATED * each if first and each else None

    for name in patterns:
        if name == "transformer" or "transformer" not in patterns:
            continue
        ratios |= {
            f"training_{name}": over(at("training", name), at("training", "transformer")),
            f"inference_{name}": over(inference("transformer"), inference(name)),
            f"memory_{name}": over(at("memory", name), at("memory", "transformer")),
            f"state_{name}": over(at("state", name), at("state", "transformer")),
        }
    return {name: value for name, value in ratios.items() if value is not None}


# ---- what they learn


def quality(models: dict[str, ModelConfig], args: argparse.Namespace) -> tuple[Rows, Ratios]:
    """Train every pattern alike in a directory that is thrown away, and evaluate it."""
    found: dict[str, dict[str, float]] = {}
    logs: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as root:
        for name, config in models.items():
            train_tokenizer(TokenizerSettings(run=name, out_dir=root, data=args.data, vocab_size=args.vocab_size))
            logs[name] = trained(name, config, root, args)
            path = checkpoint.latest(Path(root) / name / "base")
            evaluate_base(evaluation(str(path), args))
            metrics = json.loads((Path(root) / name / "base_eval_base.json").read_text())["metrics"]
            found[name] = {key: metric["value"] for key, metric in metrics.items()}
    shortest = min(log[-1]["time"] for log in logs.values())
    for name, log in logs.items():
        found[name]["val_bpb_equal_time"] = bpb_at(log, shortest)
    rows = [{"what": key, "pattern": name, "value": value} for name, m in found.items() for key, value in m.items()]
    first = found.get("transformer")
    others = [] if first is None else [name for name in found if name != "transformer"]
    return rows, {f"bpb_{name}": over(found[name]["val_bpb"], first["val_bpb"]) for name in others if first}


def trained(name: str, config: ModelConfig, root: str, args: argparse.Namespace) -> list[dict[str, float]]:
    """Train for --steps; the evaluations in order, with the seconds of training before each."""
    settings = BaseSettings(
        run=name, out_dir=root, data=args.data, device=args.device, depth=config.depth, d_model=config.d_model,
        pattern=config.pattern, mlp_m=config.mlp_m, mlp_m2=config.mlp_m2, sequence_len=args.sequence_len,
        device_batch_size=args.rows, num_iterations=args.steps, eval_every=max(1, args.steps // 10), log_every=1,
        save_every=0,
    )  # fmt: skip
    train_base(settings)
    evaluations: list[dict[str, float]] = []
    now = 0.0
    for record in read_log(Path(root) / name / "base" / "log.jsonl"):
        now = record.get("time", now)
        if "val_bpb" in record:
            evaluations.append({"time": now, "val_bpb": record["val_bpb"]})
    return evaluations


def evaluation(path: str, args: argparse.Namespace) -> BaseEvalSettings:
    return BaseEvalSettings(
        source=path, data=args.data, device=args.device, samples=0, by_position=True,
        passkey=tuple(args.passkey), batch_size=4, eval_tokens=args.eval_tokens,
    )  # fmt: skip


def bpb_at(log: list[dict[str, float]], seconds: float) -> float:
    """Bits per byte after so much training, between the evaluations around it."""
    for before, after in pairwise(log):
        if before["time"] <= seconds <= after["time"]:
            share = (seconds - before["time"]) / max(1e-9, after["time"] - before["time"])
            return before["val_bpb"] + share * (after["val_bpb"] - before["val_bpb"])
    return log[-1]["val_bpb"] if seconds > log[-1]["time"] else log[0]["val_bpb"]


if __name__ == "__main__":
    main()
