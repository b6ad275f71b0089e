"""Run by torchrun in test_policy.py: reinforcement learning in ROOT over two processes."""

import sys
from pathlib import Path

from policies import train_rl

from nanochat import runtime


def main() -> None:
    train_rl(Path(sys.argv[1]), num_iterations=2, lr_scale=0.005)
    runtime.finish()


if __name__ == "__main__":
    main()
