"""Kill -9 at random moments, resume, compare: do all stages end with the very bits of an uninterrupted run?

    python dev/kill_test.py --kills 50

One run is left alone; it is the reference. Then rounds of the same run in new directories: each stage (tokenizer, base,
mid, sft) is started and killed again and again until it comes through, and what it leaves is compared with the
reference, file by file. After every kill the newest checkpoint, if there is one, must be whole. Ends with one line; the
exit code is 0 when all is identical.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

STAGES = ("tokenizer", "base", "mid", "sft")
AT_ONCE = 5  # kills of one stage in a round
WORLD = "world:seed=0,known=20,wordings=4"
TASKS = ("world-qa:seed=0,known=20,limit=60",)


def train(stage: str, root: str) -> None:
    """One stage of the tiny run, in a process of its own, with a checkpoint every two steps: it may die in a save."""
    import torch

    from nanochat.training import commands
    from nanochat.training.settings import BaseSettings, MidSettings, SFTSettings

    torch.set_num_threads(1)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    place: dict[str, Any] = {"out_dir": root, "run": "kill"}
    common: dict[str, Any] = place | {
        "device": "cpu", "dtype": "float32", "device_batch_size": 2, "num_iterations": 24, "save_every": 2,
        "eval_every": 5, "eval_tokens": 256, "log_every": 1,
    }  # fmt: skip
    shape: dict[str, Any] = {"depth": 3, "pattern": "M M2 T", "d_model": 64, "head_dim": 32, "sequence_len": 64}
    if stage == "tokenizer":
        commands.train_tokenizer(commands.TokenizerSettings(**place, data=WORLD, vocab_size=400))
    elif stage == "base":
        commands.train_base(BaseSettings(**common, **shape, data=WORLD))
    elif stage == "mid":
        commands.train_mid(MidSettings(**common, data=WORLD, tasks=TASKS))
    else:
        commands.train_sft(SFTSettings(**common, tasks=TASKS))


def run(stage: str, root: Path, seconds: float | None) -> bool:
    """Start a stage; kill it after so many seconds. True when it came to its end before."""
    process = CONTEXT.Process(target=train, args=(stage, str(root)))
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
    if process.exitcode not in (0, -9):
        raise SystemExit(f"{stage} in {root} failed with exit code {process.exitcode}")
    return process.exitcode == 0


def check_whole(directory: Path) -> int:
    """Load the newest checkpoint with all checksums; its step, 0 when there is none. Raises when it is damaged."""
    from nanochat import checkpoint

    path = checkpoint.latest(directory)
    if path is None:
        return 0
    found = checkpoint.load(path, files=("model", "optim"))
    assert found.state is not None
    return found.step


def content(root: Path, stage: str) -> dict[str, bytes]:
    """What a finished stage has left: weights, optimizer and loader state, byte for byte."""
    directory = root / "kill" / stage
    if stage == "tokenizer":
        return {"bpe.json": (directory / "bpe.json").read_bytes()}
    from nanochat import checkpoint

    path = checkpoint.latest(directory)
    assert path is not None
    names = ("model.safetensors", "optim.safetensors", "state.safetensors")
    return {f"{path.name}/{name}": (path / name).read_bytes() for name in names}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draws, began = random.Random(options.seed), time.time()
    kills: Counter[str] = Counter()
    resumed = finished = different = 0
    lives: list[float | None]
    with tempfile.TemporaryDirectory() as scratch:
        reference, duration = Path(scratch) / "reference", {}
        run("tokenizer", Path(scratch) / "warm", None)  # the server that processes are forked from has started
        for stage in STAGES:
            start = time.time()
            assert run(stage, reference, None)
            duration[stage] = time.time() - start
        n_round = 0
        while kills.total() < options.kills:
            root = Path(scratch) / f"round{n_round}"
            n_round += 1
            for stage in STAGES:
                n = min(AT_ONCE, options.kills - kills.total())
                lives = [draws.uniform(0, 0.8 * duration[stage]) for _ in range(n)] + [None]
                while not run(stage, root, lives.pop(0)):
                    kills[stage] += 1
                    resumed += check_whole(root / "kill" / stage) > 0
                finished += 1
                expected, found = content(reference, stage), content(root, stage)
                wrong = sorted(name for name in {**expected, **found} if expected.get(name) != found.get(name))
                different += bool(wrong)
                print(f"round {n_round} {stage}: {kills[stage]} kills so far; {wrong or 'identical'}", flush=True)
    where = ", ".join(f"{stage} {n}" for stage, n in kills.items())
    print(
        f"kill_test: {kills.total()} kills ({where}), {resumed} resumed from a checkpoint, {finished} stages finished, "
        f"{different} not bit-identical to the uninterrupted run, {time.time() - began:.0f} s"
    )
    return int(different > 0)


os.environ["NANOCHAT_KERNEL_SELECTIVE_SCAN"] = "chunked"  # Numba would compile for most of so short a life
os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")  # killed processes leave tqdm's semaphores behind
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["nanochat.training.commands"])

if __name__ == "__main__":
    sys.exit(main())
