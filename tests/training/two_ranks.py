"""Run by torchrun in test_distributed.py: ROOT_A whole, ROOT_B resumed, ROOT_C and, with carried states, ROOT_D until
step 7."""

import contextlib
import sys
from pathlib import Path

from tiny import train

from nanochat import runtime
from nanochat.training.loop import Trainer


def main() -> None:
    whole, begun, cut, carried = map(Path, sys.argv[1:])
    options = {"device_batch_size": 1, "total_batch_size": 2 * 32, "weight_decay": 0.0, "lr_scale": 0.005}
    train("base", whole, **options)
    train("base", begun, **options)
    original = Trainer.after_step

    def after_step(self: Trainer) -> None:
        original(self)
        if self.progress.step == 7:
            raise KeyboardInterrupt

    Trainer.after_step = after_step  # type: ignore[method-assign]
    for root, more in ((cut, {}), (carried, {"carry_state": True})):
        with contextlib.suppress(KeyboardInterrupt):
            train("base", root, **options, **more)
    runtime.finish()


if __name__ == "__main__":
    main()
