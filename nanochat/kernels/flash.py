"""FlashAttention (arXiv 2307.08691), from whichever package has it: called alike, checked once, never required.

    flash_attn_interface   FlashAttention 3, for Hopper
    flash_attn             FlashAttention 2
    torch                  `torch.nn.attention.varlen`, torch's own copy of FlashAttention 2 (newer versions of torch)

Letters: B batch, T query time, S source (key) positions, H heads, G key/value heads, P head width, L = B * T.
"""

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from nanochat.kernels.segments import document_starts

MAX_WIDTH = 256
TOLERANCE = 2e-2  # of bfloat16 results in the check


def find(device: str, n_width: int) -> tuple[str, str]:
    """The package to use on this CUDA device for heads of this width ("" for none), and why."""
    if n_width > MAX_WIDTH or n_width % 8:
        return "", f"FlashAttention takes no heads of width {n_width}"
    return _find(device)


find._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as in dispatch.py


@functools.cache
def _find(device: str) -> tuple[str, str]:
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return "", f"FlashAttention needs compute capability 8.0, not {capability[0]}.{capability[1]}"
    problems = ["FlashAttention is not installed: pip install flash-attn"]
    for package in ("flash_attn_interface", "flash_attn", "torch.nn.attention.varlen"):
        if package == "flash_attn_interface" and capability[0] != 9:
            continue
        if importlib.util.find_spec(package) is None:
            continue
        problem = _problem(package, device)
        if not problem:
            return package, f"{package}, checked on this GPU"
        problems.append(f"{package} failed its check: {problem}")
    return "", problems[-1]


def _problem(package: str, device: str) -> str:
    """What is wrong with a package on a device: compared with the oracle in every way that it will be called."""
    from nanochat.kernels.attention import attention_ref

    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 40, n, 64, generator=g).to(device, torch.bfloat16) for n in (4, 2, 2))
    segments = torch.tensor([[0] * 7 + [1] * 33, [0] * 40], device=device)
    start = torch.tensor([3, 30], device=device)
    calls: list[tuple[Tensor, dict[str, Any]]] = [(q, {}), (q, {"window": 5}), (q, {"segments_BT": segments})]
    calls += [(q[:, :9], {}), (q[:, :1], {"start": start})]
    try:
        for query, options in calls:
            if takes(query, k, options.get("segments_BT"), None, options.get("start"), package):
                found = attention(query, k, v, **options, package=package).float()
                wanted = attention_ref(query, k, v, **options).float()
                distance = float((found - wanted).norm() / wanted.norm())
                if not distance < TOLERANCE:
                    return f"off by {distance:.1e} with {', '.join(options) or 'plain causality'}"
    except Exception as error:  # whatever a package built for another torch raises
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return ""


def takes(
    q_BTHP: Tensor,
    k_BSGP: Tensor,
    segments_BT: Tensor | None,
    lengths: Tensor | None,
    start: Tensor | None,
    package: str | None = None,
) -> bool:
    """Whether `attention` can do such a call."""
    package = find(str(q_BTHP.device), q_BTHP.shape[3])[0] if package is None else package
    same = q_BTHP.shape[1] == k_BSGP.shape[1]
    if not package or lengths is not None or (segments_BT is not None and not (same and start is None)):
        return False
    if package == "torch.nn.attention.varlen":  # it wants rows laid end to end: no cache with spare room
        return same and start is None
    return start is None or not (torch.is_grad_enabled() and q_BTHP.requires_grad)


def attention(
    q_BTHP: Tensor,
    k_BSGP: Tensor,
    v_BSGP: Tensor,
    segments_BT: Tensor | None = None,
    window: int = 0,
    start: Tensor | None = None,
    scale: float | None = None,
    package: str | None = None,
) -> Tensor:
    """The contract of `kernels.attention.attention`, for calls that `takes` accepts."""
    package = find(str(q_BTHP.device), q_BTHP.shape[3])[0] if package is None else package
    module = importlib.import_module(package)
    # (left, right): how many keys beside its own a query sees
    options: dict[str, Any] = {"window_size": (window - 1 if window else -1, 0)}
    if segments_BT is not None or package == "torch.nn.attention.varlen":
        ends, longest = _rows(segments_BT, q_BTHP)
        flat = (x.flatten(0, 1) for x in (q_BTHP, k_BSGP, v_BSGP))
        return _varlen(module)(*flat, ends, ends, longest, longest, scale, options).view(q_BTHP.shape)
    options |= {"softmax_scale": scale, "causal": True}
    if start is None:
        y = module.flash_attn_func(q_BTHP, k_BSGP, v_BSGP, **options)
    else:
        used = (start + q_BTHP.shape[1]).to(torch.int32)
        y = module.flash_attn_with_kvcache(q_BTHP, k_BSGP, v_BSGP, cache_seqlens=used, **options)
    return _output(y)


def _output(y: Any) -> Tensor:
    return y[0] if isinstance(y, tuple) else y  # some versions add the log-sum-exp


def _varlen(module: ModuleType) -> Callable[..., Tensor]:
    """Attention over rows of different lengths laid end to end: (q, k, v, ends, ends, longest, longest, ...)."""
    if not module.__name__.endswith("varlen"):
        return lambda *x: _output(module.flash_attn_varlen_func(*x[:-2], softmax_scale=x[-2], causal=True, **x[-1]))
    known = inspect.signature(module.varlen_attn).parameters
    grouped = {"enable_gqa": True} if "enable_gqa" in known else {}
    return lambda *x: _output(module.varlen_attn(*x[:-2], scale=x[-2], **grouped, **x[-1]))


def _rows(segments_BT: Tensor | None, q_BTHP: Tensor) -> tuple[Tensor, int]:
    """Where the documents (or rows) begin and end, int32, and the longest; one answer serves all layers."""
    n_batch, n_time = q_BTHP.shape[:2]
    if segments_BT is None:
        every = torch.arange(0, (n_batch + 1) * n_time, n_time, dtype=torch.int32, device=q_BTHP.device)
        return every, n_time
    if _last and _last[0] is segments_BT and _last[1] == segments_BT._version:
        return _last[2], _last[3]
    starts = document_starts(segments_BT)
    _last[:] = segments_BT, segments_BT._version, starts.to(torch.int32), int(starts.diff().max())
    return _last[2], _last[3]


_last: list[Any] = []  # the segments of the last call, their version, and what `_rows` said of them
