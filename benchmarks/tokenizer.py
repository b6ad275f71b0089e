"""Training and encoding on real text, beside what they rest on: rustbpe alone and tiktoken alone.

    python -m benchmarks.tokenizer --data 'DIR?on_error=skip' [--mb 150] [--vocab_size 8192] [--encode_mb 30]

The documents of DIR (as `tok_train --data` reads them) are written to one file first, so that all read the same. Every
row is a process of its own; the fastest of `--repeats` counts. CPU seconds are those of all threads, peak memory is
what the work held at most beyond what the process held before.

    rustbpe     rustbpe's train_from_iterator with its own defaults, and the same pattern and number of merges
    nanochat    Tokenizer.train
    tok_train   the whole command: directories walked, files unpacked and decoded, validation text left out
    tiktoken    Encoding.encode_ordinary_batch with the vocabulary just learnt
    nanochat    Tokenizer.encode_batch; the ids are checked to be the same

Ratios, nanochat's over the peer's: `train_seconds`, `train_cpu`, `train_memory` (goal 1.2 at most), and the speed of
encoding, `encode_speed` (goal 1).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.common import report

MB = 1_000_000
TRAINERS = ("rustbpe", "nanochat", "tok_train")
ENCODERS = ("tiktoken", "nanochat")


def main() -> None:
    parser = argparse.ArgumentParser(description="Tokenizer: training and encoding beside rustbpe and tiktoken")
    parser.add_argument("--data", required=True, help="as for tok_train: a directory or file of text")
    parser.add_argument("--mb", type=float, default=150.0, help="million bytes of it to train on")
    parser.add_argument("--encode_mb", type=float, default=30.0, help="million bytes of it to encode")
    parser.add_argument("--vocab_size", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=2, help="of encoding; rustbpe takes all cores")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(CHILDREN[args.child](args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        args.work = Path(folder)
        n_bytes = collect(args.data, args.work, args.mb * MB)
        rows = [best(args, "train", name, n_bytes) for name in TRAINERS]
        size = min(n_bytes, args.encode_mb * MB)
        rows += [best(args, "encode", name, size) for name in ENCODERS]
    report("tokenizer", rows, ratios(rows))


def collect(data: str, work: Path, most: float) -> int:
    """Write the documents for training to one file; their bytes."""
    from nanochat.data.corpus import open_corpus

    n = 0
    with (work / "texts.jsonl").open("w", encoding="utf-8") as file:
        for text in open_corpus(data).documents("train"):
            file.write(json.dumps(text, ensure_ascii=False) + "\n")
            n += len(text.encode())
            if n >= most:
                break
    return n


def best(args: argparse.Namespace, work: str, name: str, n_bytes: float) -> dict[str, Any]:
    """The fastest of several processes, as a row."""
    command = [sys.executable, "-m", "benchmarks.tokenizer", "--child", f"{work}_{name}", "--work", str(args.work)]
    for flag in ("data", "mb", "vocab_size", "threads", "encode_mb"):
        command += [f"--{flag}", str(getattr(args, flag))]
    found = []
    for _ in range(args.repeats):
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed with {done.returncode}:\n{done.stderr[-2000:]}")
        found.append(json.loads(done.stdout.splitlines()[-1]))
    fastest = min(found, key=lambda row: row["seconds"])
    return {"work": work, "by": name, "mb": n_bytes / MB, "mb_per_second": n_bytes / MB / fastest["seconds"], **fastest}


def ratios(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """nanochat's figures over those of what it rests on."""
    of = {(row["work"], row["by"]): row for row in rows}
    ours, peer = of["train", "nanochat"], of["train", "rustbpe"]
    encoded, plain = of["encode", "nanochat"], of["encode", "tiktoken"]
    if encoded["n_ids"] != plain["n_ids"] or encoded["ids_hash"] != plain["ids_hash"]:
        raise RuntimeError("nanochat and tiktoken gave different ids")
    memory = ours["peak_mb"] / peer["peak_mb"] if ours["peak_mb"] and peer["peak_mb"] else None
    return {
        "train_seconds": ours["seconds"] / peer["seconds"],
        "train_cpu": ours["cpu_seconds"] / peer["cpu_seconds"],
        "train_memory": memory,
        "command_seconds": of["train", "tok_train"]["seconds"] / peer["seconds"],
        "encode_speed": plain["seconds"] / encoded["seconds"],
        "encode_cpu": encoded["cpu_seconds"] / plain["cpu_seconds"],
    }


# ---- in processes of their own


def measured(fn: Callable[[], object]) -> dict[str, Any]:
    """Seconds, CPU seconds of all threads, and the peak of memory of one call."""
    from benchmarks.memory import peak_growth

    spent: dict[str, float] = {}

    def timed() -> None:
        began, cpu = time.perf_counter(), time.process_time()
        fn()
        spent.update(seconds=time.perf_counter() - began, cpu_seconds=time.process_time() - cpu)

    peak = peak_growth(timed)
    if not spent:  # where memory cannot be measured, nothing has run
        timed()
    return {**spent, "peak_mb": None if peak is None else peak / MB}


def texts(work: Path, most: float = float("inf")) -> Iterator[str]:
    n = 0
    with (work / "texts.jsonl").open(encoding="utf-8") as file:
        for line in file:
            text = json.loads(line)
            yield text
            n += len(text.encode()) if most < float("inf") else 0
            if n >= most:
                return


def train_rustbpe(args: argparse.Namespace) -> dict[str, Any]:
    import rustbpe

    from nanochat.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN

    trainer, n = rustbpe.Tokenizer(), args.vocab_size - len(SPECIAL_TOKENS)
    return measured(lambda: trainer.train_from_iterator(texts(args.work), n, pattern=SPLIT_PATTERN))


def train_nanochat(args: argparse.Namespace) -> dict[str, Any]:
    from nanochat.tokenizer import Tokenizer

    return measured(lambda: Tokenizer.train(texts(args.work), args.vocab_size).save(args.work / "tokenizer"))


def train_command(args: argparse.Namespace) -> dict[str, Any]:
    from nanochat.training.commands import TokenizerSettings, train_tokenizer

    where = {"run": "bench", "out_dir": str(args.work)}
    settings = TokenizerSettings(
        **where, data=args.data, vocab_size=args.vocab_size, max_chars=int(args.mb * MB), doc_cap=1 << 62
    )
    return measured(lambda: train_tokenizer(settings))


def encode(args: argparse.Namespace, own: bool) -> dict[str, Any]:
    import tiktoken

    from nanochat.tokenizer import FILE_NAME, SPLIT_PATTERN, Tokenizer

    assert (args.work / "tokenizer" / FILE_NAME).exists()
    tokenizer = Tokenizer.load(args.work / "tokenizer")
    given, found = list(texts(args.work, args.encode_mb * MB)), []
    ranks = {tokenizer.decode_bytes([i]): i for i in range(tokenizer.vocab_size) if not tokenizer.is_special(i)}
    plain = tiktoken.Encoding("plain", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={})
    spent = measured(
        lambda: found.extend(
            tokenizer.encode_batch(given, args.threads)
            if own
            else plain.encode_ordinary_batch(given, num_threads=args.threads)
        )
    )
    ids = [i for some in found for i in some]
    return {**spent, "n_ids": len(ids), "ids_hash": hash(tuple(ids))}  # numbers hash the same in every process


CHILDREN: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "train_rustbpe": train_rustbpe,
    "train_nanochat": train_nanochat,
    "train_tok_train": train_command,
    "encode_tiktoken": lambda args: encode(args, own=False),
    "encode_nanochat": lambda args: encode(args, own=True),
}

if __name__ == "__main__":
    main()
