"""The command `doctor`: what this machine is, what a run would use and why, whether it works, and what would help.

The check is one training step and two tokens of a tiny model with every kind of block; the kernels say which
implementation they took. Advice is a line with the exact command.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch

from nanochat import __version__, config, runtime
from nanochat.kernels import dispatch
from nanochat.kernels.attention import ATTENTION
from nanochat.kernels.conv import CAUSAL_CONV, CAUSAL_CONV_STEP
from nanochat.kernels.linear import LINEAR
from nanochat.kernels.loss import LINEAR_CROSS_ENTROPY
from nanochat.kernels.norm import GATED_RMS_NORM
from nanochat.kernels.scan import SELECTIVE_SCAN, SELECTIVE_SCAN_STEP
from nanochat.kernels.ssd import SSD, SSD_STEP
from nanochat.model.config import ModelConfig
from nanochat.model.lm import LM

PACKAGES = ("tiktoken", "rustbpe", "safetensors", "pyarrow", "triton", "numba", "flash-attn", "wandb")

KERNELS: dict[str, Collection[str]] = {
    "attention": ATTENTION,
    "selective_scan": SELECTIVE_SCAN,
    "selective_scan_step": SELECTIVE_SCAN_STEP,
    "ssd": SSD,
    "ssd_step": SSD_STEP,
    "causal_conv": CAUSAL_CONV,
    "causal_conv_step": CAUSAL_CONV_STEP,
    "gated_rms_norm": GATED_RMS_NORM,
    "linear": LINEAR,
    "linear_cross_entropy": LINEAR_CROSS_ENTROPY,
}

EXTRAS = {"rag": "tantivy", "milvus": "pymilvus", "wandb": "wandb"}  # of the package: a module that each installs


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
    try_tokens(chosen)
    print("kernels (NANOCHAT_KERNEL_<OPERATION>=name takes another):")
    for line in kernels():
        print(f"  {line}")
    for line in advice(chosen.device):
        print(line)
    print(f"one training step of a tiny model with T, M and M2 blocks: loss {loss:.3f}, {seconds:.2f} s: all is well")


def try_step(chosen: runtime.Runtime) -> tuple[float, float]:
    """Loss and seconds of one forward and backward pass over 2 x 64 random tokens."""
    model = _model(chosen)
    ids = torch.randint(0, 512, (2, 65), device=chosen.device)
    weights = torch.ones(2, 64, device=chosen.device)
    segments = torch.zeros(2, 64, dtype=torch.int32, device=chosen.device)
    start = time.perf_counter()
    loss = model.loss(ids[:, :-1], ids[:, 1:], weights, segments) / weights.sum()
    loss.backward()
    return float(loss.detach()), time.perf_counter() - start


@torch.no_grad()
def try_tokens(chosen: runtime.Runtime) -> None:
    """A prompt of eight tokens and two tokens behind it, as in a chat."""
    model = _model(chosen)
    states = model.init_states(1, 10)
    ids = torch.randint(0, 512, (1, 10), device=chosen.device)
    for part in ids.split((8, 1, 1), dim=1):
        model.logits(model(part, states))


def _model(chosen: runtime.Runtime) -> LM:
    model = LM.build(ModelConfig(vocab_size=512, sequence_len=64, depth=3, pattern="T M M2"), chosen.device, seed=0)
    model.compute_dtype = chosen.dtype
    return model


def kernels() -> Iterator[str]:
    """A line an implementation that has run in this process: why it did, and what else there is."""
    for (op, name), reason in sorted(dispatch.decisions.items()):
        others = ", ".join(sorted(other for other in KERNELS.get(op, {}) if other != name))
        yield f"{op:<21} {name:<9} {reason + '; ' if reason else ''}others: {others}"


def advice(device: torch.device) -> Iterator[str]:
    """What is missing, with the command that mends it; only what would change something on this machine."""
    if device.type != "cuda" and torch.version.cuda is None and shutil.which("nvidia-smi"):
        yield "there is an NVIDIA GPU, but this torch was built without CUDA: pip install --force-reinstall torch"
    if device.type == "cpu" and find_spec("numba") is None:
        yield "without Numba, blocks of kind M train more slowly on a CPU: pip install 'nanochat[cpu]'"
    if device.type == "cuda":
        if find_spec("triton") is None:
            package = "triton-windows" if sys.platform == "win32" else "triton"
            yield f"without Triton, Mamba blocks, the loss and the convolution are slow: pip install {package}"
        elif not (os.environ.get("CC") or any(shutil.which(name) for name in ("cc", "gcc", "clang", "cl"))):
            yield "Triton needs a C compiler to start its kernels: sudo apt-get install gcc"
    absent = [name for name, module in EXTRAS.items() if find_spec(module) is None]
    if absent:
        yield f"not installed, and needed only for {', '.join(absent)}: pip install 'nanochat[{','.join(absent)}]'"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
