"""Reinforcement learning on sums, from a model that has seen a few: what it gains, and whether a ruined run is noticed.

    python -m benchmarks.reinforce [--seeds 5] [--steps 100] [--out DIR]

A transformer of 0.4M parameters reads some text of the tiny world, is shown 80 batches of two-digit sums whose
solutions call the calculator, and is then rewarded for right answers. Each seed is a model of its own. The last run of
each seed starts anew with 20 times the learning rate. `first` and `last` are mean rewards of the sampled answers over
the first and last tenth of the rounds; `greedy` is the accuracy on held-out expressions without sampling. Ratios:

    arithmetic_rl_gain    mean over seeds of last - first
    smallest_gain         the same of the worst seed
    collapsed             share of the seeds whose normal run was stopped as collapsed
    poisoned_noticed      share of the seeds whose ruined run was stopped and rolled back to the start's accuracy
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.common import report
from nanochat.report import read_log
from nanochat.training.commands import TokenizerSettings, train_base, train_sft, train_tokenizer
from nanochat.training.rl_commands import ChatRLSettings, train_chat_rl
from nanochat.training.settings import BaseSettings, SFTSettings

WORLD = "world:seed=0,known=10,wordings=4"
POISON = 20.0


def start_model(where: dict[str, Any]) -> None:
    """Tokenizer, base and SFT of one seed."""
    train_tokenizer(TokenizerSettings(where["run"], where["out_dir"], data=WORLD, vocab_size=400))
    train_base(
        BaseSettings(
            **where, data=WORLD, depth=2, d_model=128, head_dim=32, pattern="transformer", sequence_len=128,
            device_batch_size=4, num_iterations=2, eval_tokens=512,
        )
    )  # fmt: skip
    tasks = (f"arithmetic:digits=2,tool=1,seed={where['seed']}",)
    train_sft(
        SFTSettings(
            **where, source="base", tasks=tasks, num_iterations=80, device_batch_size=4, lr_scale=0.5,
            eval_tokens=2048, eval_every=0,
        )
    )  # fmt: skip


def one_seed(seed: int, steps: int, out: Path) -> list[dict[str, Any]]:
    """Rows of the normal and the ruined run."""
    where: dict[str, Any] = {"run": f"seed{seed}", "out_dir": str(out), "seed": seed, "device": "cpu",
                             "dtype": "float32"}  # fmt: skip
    start_model(where)
    settings = ChatRLSettings(
        **where, tasks=(f"arithmetic:digits=2,seed={seed}",), val=(f"arithmetic:digits=2,part=heldout,seed={seed}",),
        tool="calculator", max_tokens=24, num_iterations=steps, eval_every=max(1, steps // 4), resume=False,
    )  # fmt: skip
    rows = []
    for name, given in (("normal", settings), ("ruined", replace(settings, lr_scale=POISON * settings.lr_scale))):
        metrics = train_chat_rl(given)
        records = read_log(out / where["run"] / "rl" / "log.jsonl")
        rewards = [record["reward"] for record in records if "reward" in record]
        tenth = max(1, len(rewards) // 10)
        greedy = [record["val_accuracy"] for record in records if "val_accuracy" in record]
        rows.append(
            {
                "seed": seed, "run": name, "first": fmean(rewards[:tenth]), "last": fmean(rewards[-tenth:]),
                "greedy before": greedy[0], "greedy after": metrics["val_accuracy"], "collapsed": metrics["collapsed"],
                "rounds": len(rewards), "seconds": metrics["train_seconds"],
            }
        )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", type=Path, help="keep the runs here (default: a directory that is deleted)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        out = args.out or Path(temporary)
        rows = [row for seed in range(args.seeds) for row in one_seed(seed, args.steps, out)]
    normal, ruined = ([row for row in rows if row["run"] == name] for name in ("normal", "ruined"))
    gains = [row["last"] - row["first"] for row in normal]
    noticed = [row["collapsed"] == 1.0 and row["greedy after"] >= row["greedy before"] for row in ruined]
    ratios = {
        "arithmetic_rl_gain": fmean(gains),
        "smallest_gain": min(gains),
        "collapsed": fmean(row["collapsed"] for row in normal),
        "poisoned_noticed": fmean(noticed),
    }
    report("reinforce", rows, ratios)


if __name__ == "__main__":
    main()
