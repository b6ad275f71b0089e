"""The command `doctor`: what this machine is, which device and dtype a run would use and why, and whether it works.

The check is one training step of a tiny model with every kind of block; the kernels log which implementation they took.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

from nanochat import __version__, config, runtime
from nanochat.model.config import ModelConfig
from nanochat.model.lm import LM

PACKAGES = ("tiktoken", "rustbpe", "safetensors", "pyarrow", "triton", "mamba-ssm", "wandb")


@dataclass(frozen=True)
class DoctorSettings:
    """Show this machine, the device and dtype that a run would use, and try one training step."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps"""
    dtype: str = "auto"
    """auto, float32, bfloat16 or float16"""


def main(argv: list[str] | None = None) -> None:
    settings = config.parse(DoctorSettings, argv, prog="nanochat doctor")
    print(f"nanochat {__version__}, python {sys.version.split()[0]}, torch {torch.__version__}")
    print("packages:", ", ".join(f"{name} {_version(name)}" for name in PACKAGES))
    for name, value in runtime.machine().items():
        print(f"  {name}: {value}")
    chosen = runtime.setup(settings.device, settings.dtype)
    print(chosen.reason)
    loss, seconds = try_step(chosen)
    print(f"one training step of a tiny model with T, M and M2 blocks: loss {loss:.3f}, {seconds:.2f} s: all is well")


def try_step(chosen: runtime.Runtime) -> tuple[float, float]:
    """Loss and seconds of one forward and backward pass over 2 x 64 random tokens."""
    model = LM.build(ModelConfig(vocab_size=512, sequence_len=64, depth=3, pattern="T M M2"), chosen.device, seed=0)
    model.compute_dtype = chosen.dtype
    ids = torch.randint(0, 512, (2, 65), device=chosen.device)
    weights = torch.ones(2, 64, device=chosen.device)
    segments = torch.zeros(2, 64, dtype=torch.int32, device=chosen.device)
    start = time.perf_counter()
    loss = model.loss(ids[:, :-1], ids[:, 1:], weights, segments) / weights.sum()
    loss.backward()
    return float(loss.detach()), time.perf_counter() - start


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
