"""Long bfloat16 runs of every kind of block at a learning rate far above the default: nothing may overflow."""

import pytest
import torch

from nanochat.model.config import ModelConfig
from nanochat.model.lm import LM
from nanochat.training.optim import Optimizers, Rates

STEPS, VOCAB, ROWS, T = 2000, 64, 4, 48
FASTER = 5  # times the default learning rates, without warmup, decay or clipping


def batch(generator: torch.Generator, device: str) -> tuple[torch.Tensor, ...]:
    """Rows of short documents that count upwards from a random token in random strides."""
    first, stride = (torch.randint(1, VOCAB, (ROWS, T + 1), generator=generator) for _ in range(2))
    document = (torch.rand(ROWS, T + 1, generator=generator) < 0.1).cumsum(1)
    ids = (first.gather(1, document) + stride.gather(1, document) * torch.arange(T + 1)) % VOCAB
    segments = document[:, :-1].to(torch.int32)
    return tuple(x.to(device) for x in (ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), segments))


@pytest.mark.parametrize(
    ("pattern", "steps"),
    [("T M M2", 8), *(pytest.param(p, STEPS, marks=pytest.mark.slow) for p in ("T", "M", "M2", "M T M2"))],
)
def test_bfloat16_survives_a_high_learning_rate(pattern: str, steps: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = ModelConfig(vocab_size=VOCAB, sequence_len=T, depth=3, d_model=32, head_dim=8, head_dim2=16,
                         d_state2=16, pattern=pattern)  # fmt: skip
    model = LM.build(config, device, seed=0)
    model.compute_dtype = torch.bfloat16
    rates = Rates()
    optimizers = Optimizers(model, rates)
    optimizers.schedule(FASTER, rates.momentum)
    generator, weights = torch.Generator().manual_seed(0), torch.ones(ROWS, T, device=device)
    losses = []
    for step in range(steps):
        inputs, targets, segments = batch(generator, device)
        loss = model.loss(inputs, targets, weights, segments) / inputs.numel()
        loss.backward()
        for name, p in model.named_parameters():
            assert p.grad is not None, name
            assert p.grad.isfinite().all(), f"step {step}: the gradient of {name} is not finite"
        optimizers.step()
        optimizers.zero_grad()
        losses.append(float(loss.detach()))
    assert all(p.isfinite().all() for p in model.parameters())
    assert all(x == x and x < float("inf") for x in losses)
    if steps == STEPS:
        assert sum(losses[-100:]) < 0.9 * sum(losses[:100])  # and it still learns
