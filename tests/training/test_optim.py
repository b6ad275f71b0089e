"""Muon against a second implementation in float64 and torch's own, AdamW's groups, state by name, schedules."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nanochat.errors import NanochatError
from nanochat.model.config import ModelConfig
from nanochat.model.layers import Linear
from nanochat.model.lm import LM
from nanochat.training import optim
from nanochat.training.optim import Muon, Optimizers, Rates, learning_rate_factor, momentum_at, orthogonalize, roles


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def model(pattern: str = "T M M2 T", **options: Any) -> LM:
    small = {"vocab_size": 50, "d_model": 32, "head_dim": 8, "d_state2": 8, "head_dim2": 16}
    config = ModelConfig(**small, depth=len(pattern.split()), pattern=pattern, **options)  # type: ignore[arg-type]
    return LM.build(config, seed=0)


# ---- the orthogonalisation


@pytest.mark.parametrize("shape", [(16, 16), (64, 16), (16, 64), (1, 8), (8, 1), (3, 40, 24)])
def test_singular_values_come_close_to_one(shape: tuple[int, ...]) -> None:
    x = random(*shape, dtype=torch.float64)
    y = orthogonalize(x)
    values = torch.linalg.svdvals(y)
    assert values.min() > 0.6
    assert values.max() < 1.25
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    # same singular vectors: y is U diag(values) V^T, and so has the direction of U V^T
    exact = u @ vh
    alike = (y * exact).sum((-2, -1)) / (y.norm(dim=(-2, -1)) * exact.norm(dim=(-2, -1)))
    assert (alike > 0.98).all()


def test_orthogonalization_ignores_the_scale_and_survives_zero() -> None:
    x = random(8, 12)
    torch.testing.assert_close(orthogonalize(1e3 * x), orthogonalize(x), rtol=1e-3, atol=1e-3)
    assert (orthogonalize(torch.zeros(8, 12)) == 0).all()


# ---- Muon


def reference_muon(
    weight: Tensor, gradients: list[Tensor], splits: list[int], lr: float, momentum: float, decay: float
) -> Tensor:
    """Written from the papers, in float64, one matrix at a time."""
    w = weight.double().clone()
    buffer = torch.zeros_like(w)
    for gradient in gradients:
        g = gradient.double()
        buffer = momentum * buffer + (1 - momentum) * g
        nesterov = (1 - momentum) * g + momentum * buffer
        start = 0
        for n in splits:
            part = nesterov[start : start + n]
            x = part / (torch.linalg.matrix_norm(part) * 1.02 + 1e-6)
            for a, b, c in optim.POLAR_EXPRESS:
                s = x @ x.T
                x = a * x + b * s @ x + c * s @ s @ x
            step = lr * max(1.0, n / weight.size(1)) ** 0.5 * x
            old = w[start : start + n]
            shrink = torch.where(step * old > 0, lr * decay * old, torch.zeros_like(old))
            w[start : start + n] = old - step - shrink
            start += n
    return w


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize(("shape", "splits"), [((12, 8), [12]), ((8, 12), [8]), ((20, 8), [8, 4, 8]), ((9, 8), [1, 8])])
def test_muon_is_step_for_step_the_reference(shape: tuple[int, int], splits: list[int], decay: float) -> None:
    weight = nn.Parameter(random(*shape))
    other = nn.Parameter(random(*shape, seed=99))  # of the same shape: both are orthogonalised in one product
    pairs = [(weight, random(*shape)), (other, random(*shape, seed=99))]
    muon = Muon([{"params": [weight, other], "splits": [splits, splits]}], lr=0.1, momentum=0.9, weight_decay=decay)
    gradients: list[list[Tensor]] = [[], []]
    for step in range(5):
        for i, (p, _) in enumerate(pairs):
            p.grad = random(*shape, seed=10 * i + step)
            gradients[i].append(p.grad.clone())
        muon.step()
        for i, (p, start) in enumerate(pairs):
            expected = reference_muon(start, gradients[i], splits, 0.1, 0.9, decay)
            torch.testing.assert_close(p.detach().double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
@pytest.mark.parametrize("shape", [(16, 8), (8, 16)])
def test_muon_is_torchs_where_the_options_coincide(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch's polynomial (Keller Jordan's, five times) and without decay; torch works in bfloat16, hence 2%."""
    monkeypatch.setattr(optim, "POLAR_EXPRESS", ((3.4445, -4.7750, 2.0315),) * 5)
    start = random(*shape)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    a = Muon([{"params": [ours], "splits": [[shape[0]]]}], lr=0.1, momentum=0.9)
    b = torch.optim.Muon([theirs], lr=0.1, momentum=0.9, weight_decay=0.0, nesterov=True, adjust_lr_fn="original")
    for step in range(4):
        ours.grad = random(*shape, seed=step)
        theirs.grad = ours.grad.clone()
        a.step()
        b.step()
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() < 0.05 * moved


def test_a_parameter_without_gradient_stays() -> None:
    p = nn.Parameter(random(4, 4))
    before = p.detach().clone()
    Muon([{"params": [p], "splits": [[4]]}], lr=0.1).step()
    assert torch.equal(p, before)


# ---- groups


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tie_embeddings": True},
        {"value_embeds": True},
        {"x0_residual": False},
        {"activation": "swiglu"},
        {"mlp_m": 0.0},
    ],
    ids=str,
)
def test_every_parameter_is_in_exactly_one_group(options: dict[str, Any]) -> None:
    lm = model(**options)
    optimizers = Optimizers(lm, Rates())
    held = [p for optimizer in optimizers.all for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len({id(p) for p in held})
    assert {id(p) for p in held} == {id(p) for p in lm.parameters()}
    matrices = {name for name, _ in roles(lm)["matrix"]}
    assert all(lm.get_parameter(name).dim() == 2 for name in matrices)
    assert all(name.startswith("blocks.") for name in matrices)
    small = {
        name.rsplit(".", 2)[-2] if name.endswith(".weight") else name.rsplit(".", 1)[-1]
        for name, _ in roles(lm)["small"]
    }
    assert small == {"conv_weight", "conv_bias", "x_proj", "dt_proj", "dt_bias", "A_log", "D"}


def test_fused_matrices_are_split_as_they_are_used() -> None:
    lm = model(n_kv_head=2, activation="swiglu", n_groups=2)
    muon = Optimizers(lm, Rates()).muon
    assert muon is not None
    group = muon.param_groups[0]
    names = {id(p): name for name, p in lm.named_parameters()}
    splits = {names[id(p)]: rows for p, rows in zip(group["params"], group["splits"])}
    for name, rows in splits.items():
        assert sum(rows) == lm.get_parameter(name).size(0), name
    assert splits["blocks.0.mixer.qkv.weight"] == [32, 16, 16]  # q, k, v
    assert splits["blocks.1.mixer.in_proj.weight"] == [64, 64]  # x, gate
    assert splits["blocks.2.mixer.in_proj.weight"] == [64, 64, 16, 16, 4]  # gate, x, B, C, dt
    assert splits["blocks.0.mlp.up.weight"] == [128, 128]  # gate, value
    assert splits["blocks.0.mlp.down.weight"] == [32]
    for module in lm.modules():
        if isinstance(module, Linear) and module.splits:
            assert sum(module.splits) == module.out_features


def test_adamw_is_torchs_with_the_rates_of_each_role() -> None:
    lm, other = model(), model()
    rates = Rates(embedding=0.1, head=0.02, small=0.01, scalar=0.005)
    optimizers = Optimizers(lm, rates)
    scale = (32 / 768) ** -0.5
    groups = [
        {
            "params": [p for name, p in other.named_parameters() if name in {n for n, _ in roles(lm)[role]}],
            "lr": lr * scale,
        }
        for role, lr in (("embedding", 0.1), ("head", 0.02), ("small", 0.01), ("scalar", 0.005))
    ]
    expected = torch.optim.AdamW(groups, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.0)
    for step in range(3):
        for i, (a, b) in enumerate(zip(lm.parameters(), other.parameters())):
            a.grad = random(*a.shape, seed=100 * step + i)
            b.grad = a.grad.clone()
        optimizers.step()
        expected.step()
    matrices = {name for name, _ in roles(lm)["matrix"]}
    for (name, a), b in zip(lm.named_parameters(), other.parameters()):
        if name not in matrices:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)
        else:
            assert not torch.equal(a, b)


def test_no_matrix_at_all() -> None:
    """Every block kind has matrices, so this is a model cut down; the code must not assume them."""
    lm = model("T")
    del lm.blocks[0]
    optimizers = Optimizers(lm, Rates())
    assert optimizers.muon is None
    optimizers.schedule(0.5, 0.9)
    assert len(optimizers.all) == 1


# ---- state


def train_step(lm: LM, optimizers: Optimizers, step: int) -> None:
    for i, p in enumerate(lm.parameters()):
        p.grad = random(*p.shape, seed=1000 * step + i)
    optimizers.schedule(0.5 + 0.1 * step, 0.9)
    optimizers.step()
    optimizers.zero_grad()


def test_state_goes_round_by_name() -> None:
    lm, optimizers = (one := model()), Optimizers(one, Rates())
    for step in range(3):
        train_step(lm, optimizers, step)
    saved = {name: tensor.clone() for name, tensor in optimizers.state_dict().items()}
    fields = {name.rpartition(":")[2] for name in saved}
    assert fields == {"momentum", "step", "exp_avg", "exp_avg_sq"}
    assert {name.rpartition(":")[0] for name in saved} == {name for name, _ in lm.named_parameters()}

    copy = model()
    copy.load_state_dict(lm.state_dict())
    others = Optimizers(copy, Rates())
    others.load_state_dict(saved)
    for step in range(3, 5):
        train_step(lm, optimizers, step)
        train_step(copy, others, step)
    for (name, a), b in zip(lm.named_parameters(), copy.parameters()):
        assert torch.equal(a, b), name
    assert others.state_dict().keys() == saved.keys()


def test_state_of_another_model_is_refused() -> None:
    lm = model("T T")
    optimizers = Optimizers(lm, Rates())
    train_step(lm, optimizers, 0)
    saved = optimizers.state_dict()
    with pytest.raises(NanochatError, match=r"'blocks\.0\.mixer\.\w+\.weight' does not fit this model"):
        Optimizers(model("M2 T"), Rates()).load_state_dict(saved)
    with pytest.raises(NanochatError, match=r"'blocks\.0\.mlp\.up\.weight' does not fit this model"):
        Optimizers(model("T T", mlp_t=2.0), Rates()).load_state_dict(saved)


# ---- schedules


def test_the_schedule_scales_every_rate() -> None:
    optimizers = Optimizers(model(), Rates())
    first = [group["lr"] for optimizer in optimizers.all for group in optimizer.param_groups]
    optimizers.schedule(0.25, 0.87)
    now = [group["lr"] for optimizer in optimizers.all for group in optimizer.param_groups]
    assert now == pytest.approx([0.25 * lr for lr in first])
    assert optimizers.muon is not None
    assert optimizers.muon.param_groups[0]["momentum"] == 0.87
    optimizers.schedule(1.0, 0.95)
    assert [group["lr"] for optimizer in optimizers.all for group in optimizer.param_groups] == pytest.approx(first)


@pytest.mark.parametrize(
    ("progress", "expected"),
    [(0.0, 0.001), (0.05, 0.5), (0.1, 1.0), (0.4, 1.0), (0.5, 1.0), (0.75, 0.55), (0.9, 0.28), (1.0, 0.1)],
)
def test_trapezoid(progress: float, expected: float) -> None:
    assert learning_rate_factor(progress, warmup=0.1, warmdown=0.5, final=0.1) == pytest.approx(expected)


@pytest.mark.parametrize("warmup", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("warmdown", [0.0, 0.5, 1.0])
def test_the_factor_is_positive_until_the_end_and_at_most_one(warmup: float, warmdown: float) -> None:
    for i in range(100):
        assert 0 < learning_rate_factor(i / 100, warmup, warmdown, 0.0) <= 1
    assert learning_rate_factor(0.0, 0.0, 0.0, 0.0) == 1.0


def test_momentum_rises() -> None:
    assert momentum_at(0.0, 0.95) == pytest.approx(0.85)
    assert momentum_at(0.05, 0.95) == pytest.approx(0.9)
    assert momentum_at(0.1, 0.95) == momentum_at(1.0, 0.95) == pytest.approx(0.95)
    assert momentum_at(0.0, 0.5) == momentum_at(1.0, 0.5) == 0.5


def test_a_step_has_the_size_that_the_rate_says() -> None:
    """Whatever the scale of the gradient: lr * sqrt(rows / columns) in each of the `columns` singular directions."""
    p = nn.Parameter(torch.zeros(64, 32))
    muon = Muon([{"params": [p], "splits": [[64]]}], lr=0.1)
    p.grad = 1e-4 * random(64, 32)
    muon.step()
    assert float(p.detach().norm()) == pytest.approx(0.1 * math.sqrt(2) * math.sqrt(32), rel=0.1)
