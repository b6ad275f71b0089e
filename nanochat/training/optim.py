"""Optimizers: Muon for the matrices of the blocks, AdamW for everything else, and the schedule of both."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from nanochat.errors import NanochatError
from nanochat.model.layers import Linear
from nanochat.model.lm import LM
from nanochat.runtime import cpu_has_bf16

# Minimax polynomials of the Polar Express (arXiv 2505.16932, l = 1e-3, five steps): each triple (a, b, c) maps the
# singular values s of X to a*s + b*s^3 + c*s^5, and together they bring all of [1e-3, 1] close to 1.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def orthogonalize(x: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrices (U V^T of the SVD), approximately; x is (..., rows, columns)."""
    shape = x.shape
    tall = x.size(-2) > x.size(-1)
    x = (x.mT if tall else x).reshape(-1, min(shape[-2:]), max(shape[-2:]))
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).reshape(shape)


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by the Polar Express (Muon, Jordan et al. 2024), with Nesterov and cautious weight decay.

    Each parameter is a matrix, or several stacked by rows (`splits`): fused q, k, v or Mamba's z, x, B, C, dt. Matrices
    of one shape, or of its transpose, are orthogonalised in one batched product. The step is
    lr * sqrt(max(1, rows / columns)) * orthogonal matrix, so that the change of an output coordinate does not depend on
    the shape. `products`: the dtype of the orthogonalisation (None: the parameters'); its five steps tolerate bf16.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        products: torch.dtype | None = None,
    ) -> None:
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.products = products

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            momentum = group["momentum"]
            stepped = [(p, splits) for p, splits in zip(group["params"], group["splits"]) if p.grad is not None]
            if not stepped:
                continue
            for p, _ in stepped:
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            grads, buffers = [p.grad for p, _ in stepped], [self.state[p]["momentum"] for p, _ in stepped]
            torch._foreach_lerp_(buffers, grads, 1 - momentum)
            updates = torch._foreach_lerp(grads, buffers, momentum)
            stacks: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for (p, splits), update in zip(stepped, updates):
                for rows, change in zip(p.split(splits), update.split(splits)):
                    stacks[min(rows.shape), max(rows.shape)].append((rows, change))
            for pairs in stacks.values():
                self.apply(pairs, group["lr"], group["weight_decay"])

    def apply(self, pairs: list[tuple[Tensor, Tensor]], lr: float, weight_decay: float) -> None:
        """Step matrices of one shape or its transpose."""
        weights = [rows if rows.size(0) <= rows.size(1) else rows.mT for rows, _ in pairs]
        stacked = torch.stack([change if change.size(0) <= change.size(1) else change.mT for _, change in pairs])
        changes = orthogonalize(stacked.to(self.products or stacked.dtype)).to(stacked.dtype)
        scales = [lr * math.sqrt(max(1.0, rows.size(0) / rows.size(1))) for rows, _ in pairs]
        torch._foreach_mul_(list(changes.unbind(0)), scales)
        if weight_decay:  # only where the step already shrinks the weight (cautious, arXiv 2510.12402)
            held = torch.stack(weights)
            changes.add_(held * (changes * held > 0), alpha=lr * weight_decay)
        torch._foreach_sub_(weights, list(changes.unbind(0)))


@dataclass(frozen=True)
class Rates:
    """Learning rates for a model 768 wide; AdamW's are scaled by (d_model / 768) ** -0.5."""

    matrix: float = 0.02
    embedding: float = 0.3
    head: float = 0.004
    small: float = 0.004  # state-space parameters, convolutions, projections of M
    scalar: float = 0.02
    weight_decay: float = 0.1  # of the matrices
    momentum: float = 0.95


def roles(model: LM) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Which optimizer gets which parameter, each once: matrix (Muon); embedding, head, small, scalar (AdamW)."""
    muon = {}
    for name, module in model.blocks.named_modules():
        if isinstance(module, Linear) and name.rsplit(".", 1)[-1] not in ("x_proj", "dt_proj"):
            muon[f"blocks.{name}.weight"] = module
    found: dict[str, list[tuple[str, nn.Parameter]]] = defaultdict(list)
    for name, p in model.named_parameters():
        if name in muon:
            found["matrix"].append((name, p))
        elif name.startswith(("embed.", "values.")):
            found["embedding"].append((name, p))
        elif name.startswith("head."):
            found["head"].append((name, p))
        elif name in ("stream_scale", "x0_scale"):
            found["scalar"].append((name, p))
        else:
            found["small"].append((name, p))
    return found


class Optimizers:
    """Muon and AdamW over one model, stepped, scheduled and saved together."""

    def __init__(self, model: LM, rates: Rates) -> None:
        self.model, self.rates = model, rates
        found = roles(model)
        adam_scale = (model.config.d_model / 768) ** -0.5
        adam = []
        for role in ("embedding", "head", "small", "scalar"):
            if found[role]:
                adam.append({"params": [p for _, p in found[role]], "lr": getattr(rates, role) * adam_scale})
        fused = model.device.type in ("cpu", "cuda")
        self.adam = torch.optim.AdamW(adam, lr=1e-3, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.0, fused=fused)
        self.steps_on_device = fused  # the fused AdamW counts steps beside the parameter, others on the CPU
        modules = dict(model.named_modules())
        splits = []
        for name, p in found["matrix"]:
            module = modules[name.removesuffix(".weight")]
            assert isinstance(module, Linear)
            splits.append(list(module.splits) or [p.size(0)])
        self.muon: Muon | None = None
        if found["matrix"]:
            group = {"params": [p for _, p in found["matrix"]], "splits": splits}
            fast = model.device.type == "cuda" or (model.device.type == "cpu" and cpu_has_bf16())
            products = torch.bfloat16 if fast else None
            self.muon = Muon([group], rates.matrix, rates.momentum, rates.weight_decay, products)
        for optimizer in self.all:
            for group in optimizer.param_groups:
                group["initial_lr"] = group["lr"]
                group["initial_decay"] = group["weight_decay"]

    @property
    def all(self) -> list[torch.optim.Optimizer]:
        return [self.adam] if self.muon is None else [self.adam, self.muon]

    def schedule(self, factor: float, momentum: float) -> None:
        """Scale every learning rate by `factor` of its initial value (weight decay follows), set Muon's momentum."""
        for optimizer in self.all:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
        if self.muon is not None:
            for group in self.muon.param_groups:
                group["momentum"] = momentum

    def step(self) -> None:
        for optimizer in self.all:
            optimizer.step()

    def zero_grad(self) -> None:
        self.model.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Tensor]:
        """Every state tensor by parameter name: a checkpoint loads whatever the grouping or number of processes."""
        names: dict[Tensor, str] = {p: name for name, p in self.model.named_parameters()}
        out = {}
        for optimizer in self.all:
            for p, state in optimizer.state.items():
                for key, value in state.items():
                    out[f"{names[p]}:{key}"] = value if isinstance(value, Tensor) else torch.tensor(value)
        return out

    def load_state_dict(self, saved: dict[str, Tensor]) -> None:
        """Raises NanochatError when the saved state is not this model's."""
        owner = {p: optimizer for optimizer in self.all for group in optimizer.param_groups for p in group["params"]}
        params = dict(self.model.named_parameters())
        for key, value in saved.items():
            name, _, field = key.rpartition(":")
            p = params.get(name)
            if p is None or (value.dim() and value.shape != p.shape):
                raise NanochatError(
                    f"the optimizer state of {name!r} does not fit this model: resume with the same configuration"
                )
            on_device = value.dim() or self.steps_on_device
            owner[p].state[p][field] = value.to(p.device) if on_device else value


def learning_rate_factor(progress: float, warmup: float, warmdown: float, final: float) -> float:
    """Trapezoid over `progress` in [0, 1]: linear up during `warmup`, 1, linear down to `final` during `warmdown`."""
    if progress < warmup:
        return max(progress, 1e-3 * warmup) / warmup if warmup else 1.0
    if progress > 1 - warmdown:
        left = (1 - progress) / warmdown
        return left + (1 - left) * final
    return 1.0


def momentum_at(progress: float, momentum: float) -> float:
    """Muon's momentum rises from 0.85 during the first tenth of the run: early gradients are stale soon."""
    share = min(1.0, progress / 0.1)
    return (1 - share) * min(0.85, momentum) + share * momentum
