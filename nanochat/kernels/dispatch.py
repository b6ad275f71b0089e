"""Choose one implementation of an operation, say which and why, and trust a GPU kernel only after it has been checked.

Every kernel file holds a plain dict of implementations, name to function, and calls `choose`. The order of authority:

1. `NANOCHAT_KERNEL_<OP>=name`, whatever it costs; UsageError where that implementation cannot run;
2. on a CUDA device "triton", where Triton is installed, the GPU recent enough, and the kernel's own check passes:
   at its first use it is compared with the reference on that GPU, and a kernel that fails is never used;
3. the default, in plain torch, which runs everywhere.

The choice and its reason are one line in the log, once a process; a GPU that has to do without its kernel is a warning.
"""

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from nanochat.errors import UsageError

Op = TypeVar("Op", bound=Callable[..., object])

logger = logging.getLogger("nanochat")
decisions: dict[tuple[str, str], str] = {}  # what has run in this process: (operation, implementation) -> why

# which module of nanochat.kernels holds an operation's Triton kernel; its `self_check(device)` compares it with the
# reference and raises where they differ
TRITON = {
    "selective_scan": "triton_scan",
    "selective_scan_step": "triton_decode",
    "ssd": "triton_ssd",
    "ssd_step": "triton_decode",
    "causal_conv": "triton_conv",
    "causal_conv_step": "triton_decode",
    "gated_rms_norm": "triton_norm",
    "linear_cross_entropy": "triton_loss",
}
MIN_CAPABILITY = (8, 0)  # Ampere: bf16 in hardware


def choose(op: str, table: Mapping[str, Op], default: str, like: Tensor | None = None, unfit: str = "") -> Op:
    """The implementation of `op` for tensors such as `like` (None: the default, unless the environment says else).

    `unfit`: why the Triton kernel cannot take this very call (empty: it can), or of an operation that has none, why
    the default is what it is. Raises UsageError when `NANOCHAT_KERNEL_<OP>` names no implementation, or one that cannot
    run here.
    """
    device = "cpu" if like is None or like.device.type != "cuda" else str(like.device)
    if device != "cpu" and like is not None and like.dtype == torch.float64:
        unfit = unfit or "float64"
    return table[_decide(op, tuple(table), default, device, unfit)]


def _decide(op: str, names: tuple[str, ...], default: str, device: str, unfit: str) -> str:
    """The name of the implementation, logged at its first use."""
    variable = f"NANOCHAT_KERNEL_{op.upper()}"
    named = os.environ.get(variable)
    if named:
        if named not in names:
            choices = ", ".join(sorted(names))
            raise UsageError(f"{variable}={named}: no such implementation of {op}; choose from {choices}")
        if named == "triton":
            _insist(variable, device, unfit)
        return _log(op, named, f"by {variable}")
    if device == "cpu" or "triton" not in names:
        return _log(op, default, "" if device == "cpu" else unfit)
    problem = unfit or triton_problem(device) or check_problem(op, device)
    return _log(op, default, problem, logging.WARNING) if problem else _log(op, "triton", "checked on this GPU")


# torch.compile calls `_decide` while it traces and takes the name as a constant: no log, no check in the graph. The
# public way to say so, torch.compiler.assume_constant_result, sets this attribute too, but imports dynamo (1.4 s).
_decide._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _log(op: str, name: str, reason: str, level: int = logging.INFO) -> str:
    if (op, name) not in decisions:
        decisions[op, name] = reason
        logger.log(level, "kernel %s: %s%s", op, name, f" ({reason})" if reason else "")
    return name


def _insist(variable: str, device: str, unfit: str) -> None:
    """UsageError unless the Triton kernel can run: on a GPU, or in Triton's interpreter."""
    problem = unfit or (triton_problem(device) if device != "cpu" else interpreter_problem())
    if problem:
        raise UsageError(f"{variable}=triton: {problem}")


def interpreter_problem() -> str:
    """Why Triton's kernels cannot run on the CPU; empty when they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "these tensors are not on a GPU: take --device cuda, or set TRITON_INTERPRET=1 (its interpreter: slow)"
    return ""


@functools.cache
def triton_problem(device: str) -> str:
    """Why Triton's kernels cannot run on this CUDA device, with what to do about it; empty when they can."""
    if importlib.util.find_spec("triton") is None:
        return "slow: Triton is not installed: pip install triton"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        have, want = (".".join(map(str, x)) for x in (capability, MIN_CAPABILITY))
        return f"slow: {torch.cuda.get_device_name(device)} has compute capability {have}, the kernels need {want}"
    return ""


@functools.cache
def check_problem(op: str, device: str) -> str:
    """Run the self-check of an operation's Triton kernel on this device, once a process; empty when it passes."""
    try:
        module = importlib.import_module(f"nanochat.kernels.{TRITON[op]}")
        with torch.inference_mode(False), torch.enable_grad():  # gradients too, wherever the first use is
            module.self_check(torch.device(device))
    except Exception as error:  # a compiler that crashes and a wrong number alike: go on without the kernel
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        insist = f"NANOCHAT_KERNEL_{op.upper()}=triton takes it all the same"
        return f"slow: the Triton kernel failed its check on {device}: {first}; {insist}"
    return ""
