"""Tiny models with random weights in every matrix."""

from collections.abc import Callable

import pytest
import torch

from nanochat.conversation import SPECIAL_TOKENS
from nanochat.model.config import ModelConfig
from nanochat.model.lm import LM


@pytest.fixture(scope="session")
def random_lm() -> Callable[..., LM]:
    """random_lm(pattern, **sizes): a model over bytes and special tokens."""
    return build


def build(pattern: str, **sizes: int) -> LM:
    config = {"sequence_len": 160, "depth": 4, "d_model": 48, "head_dim": 16, "head_dim2": 16, "d_state2": 16, **sizes}
    model = LM.build(ModelConfig(vocab_size=256 + len(SPECIAL_TOKENS), pattern=pattern, **config), seed=1)
    noise = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:  # no zero matrices: every layer must matter
                p.copy_(torch.randn(p.shape, generator=noise) * p.size(1) ** -0.5)
    return model.eval().requires_grad_(False)
