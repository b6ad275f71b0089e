"""How much of the rows is padding where conversations stay whole: the quickstart's tasks, alone and mixed.

    python dev/padding.py --lengths 256 512 2048
"""

from __future__ import annotations

import argparse

from nanochat.data.batches import Packer
from nanochat.data.corpus import open_corpus
from nanochat.pipeline import QuickstartSettings, plan
from nanochat.tokenizer import Tokenizer
from nanochat.training.commands import open_tasks, split_task
from nanochat.training.supervised import ChatSource

ROWS = 8


def padded(specs: tuple[str, ...], tokenizer: Tokenizer, sequence_len: int, n_batches: int) -> tuple[float, float]:
    """Shares of tokens that are padding, and that were cut off, over a training run's rows."""
    train, _ = split_task(open_tasks(specs))
    source = ChatSource(train, tokenizer, sequence_len, seed=0)
    packer = Packer(source, sequence_len, split=False, pad_id=tokenizer.bos)
    for _ in range(n_batches):
        packer.batch(ROWS)
    return packer.report.padded_share, packer.report.cropped_share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256], help="tokens of a row")
    parser.add_argument("--batches", type=int, default=150, help=f"of {ROWS} rows")
    options = parser.parse_args()
    todo = plan(QuickstartSettings(profile="cpu"))
    tokenizer = Tokenizer.train(open_corpus(todo.tokenizer.data).documents("train"), todo.tokenizer.vocab_size)
    print(f"{'tasks':<20} {'T':>6} {'padded':>9} {'cut off':>9}")
    kinds = {spec.partition(":")[0] + f" {i}": (spec,) for i, spec in enumerate(todo.sft.tasks)}
    for name, specs in {**kinds, "all, mixed": todo.sft.tasks}.items():
        for length in options.lengths:
            shares = padded(specs, tokenizer, length, options.batches)
            print(f"{name:<20} {length:>6} {shares[0]:>9.3%} {shares[1]:>9.3%}", flush=True)


if __name__ == "__main__":
    main()
