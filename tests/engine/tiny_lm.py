"""Tiny models with random weights in every matrix."""

import torch

from nanochat.conversation import SPECIAL_TOKENS
from nanochat.model.config import ModelConfig
from nanochat.model.lm import LM


def build(pattern: str, **options) -> LM:
    """A model over bytes and special tokens."""
    config = {"sequence_len": 96, "depth": 4, "d_model": 48, "head_dim": 16, "head_dim2": 16, "d_state2": 16, **options}
    model = LM.build(ModelConfig(vocab_size=256 + len(SPECIAL_TOKENS), pattern=pattern, **config), seed=1)
    noise = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:  # no zero matrices: every layer must matter
                p.copy_(torch.randn(p.shape, generator=noise) * p.size(1) ** -0.5)
    return model
