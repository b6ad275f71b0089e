"""Small models for the tests of this folder: every option in some of them, every weight random."""

import torch
from torch import Tensor

from nanochat.model.config import ModelConfig
from nanochat.model.lm import LM
from nanochat.model.mixer import Mixer

SMALL = {
    "vocab_size": 61, "d_model": 32, "head_dim": 8, "d_state": 5, "d_state2": 6, "head_dim2": 16, "dt_rank": 3,
    "d_conv": 3, "sequence_len": 64,
}  # fmt: skip

# One model a row: the contract holds for each of them.
MODELS: dict[str, dict[str, object]] = {
    "T": {"pattern": "T", "depth": 2},
    "M": {"pattern": "M", "depth": 2},
    "M2": {"pattern": "M2", "depth": 2},
    "hybrid": {"pattern": "M T M2 T", "depth": 4},
    "window": {"pattern": "T", "depth": 3, "window": 5, "window_pattern": "SSL"},
    "window-gqa": {"pattern": "T M2", "depth": 2, "window": 3, "n_kv_head": 2},
    "gqa": {"pattern": "T", "depth": 2, "n_kv_head": 2, "activation": "swiglu"},
    "mqa": {"pattern": "T", "depth": 2, "n_kv_head": 1, "activation": "gelu"},
    "nope": {"pattern": "T M", "depth": 2, "rope": False, "qk_norm": False},
    "values": {"pattern": "T", "depth": 3, "value_embeds": True, "n_kv_head": 2},
    "tied": {"pattern": "M2 T", "depth": 2, "tie_embeddings": True, "softcap": 0.0},
    "bare": {"pattern": "M M2", "depth": 2, "mlp_m": 0, "mlp_m2": 0, "x0_residual": False, "embed_norm": False,
             "ssm_norm": False},
    "groups": {"pattern": "M2", "depth": 2, "n_groups": 2, "d_conv": 1},
}  # fmt: skip


def config(**options: object) -> ModelConfig:
    return ModelConfig(**{**SMALL, "depth": 1, **options}).resolved()  # type: ignore[arg-type]


@torch.no_grad()
def randomize(module: torch.nn.Module, seed: int = 0) -> None:
    """Noise on every parameter, so that no zero or constant initial value hides a fault."""
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        if p.dim() == 2 and not p.any():
            p.copy_(noise * p.size(1) ** -0.5)
        else:
            p.add_(noise * 0.1 * p.std(correction=0).clamp(min=0.5))


def model(name: str, seed: int = 0, **options: object) -> LM:
    """The model of that row, with random weights."""
    built = LM.build(config(**{**MODELS[name], **options}), seed=seed)
    randomize(built, seed)
    return built.eval()


def mixer(letter: str, layer: int = 0, seed: int = 0, **options: object) -> Mixer:
    """One mixer with random weights."""
    block = LM.build(config(**{"pattern": letter, "depth": layer + 1, **options}), seed=seed).blocks[layer]
    randomize(block, seed)
    assert isinstance(block.mixer, Mixer)
    return block.mixer


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, SMALL["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
