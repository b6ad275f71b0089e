"""The same logits as transformers' Mamba, Mamba-2 and Llama, with their random weights copied in.

Our norms have no gain: theirs is folded into the matrix that follows.
"""

import warnings

import pytest
import torch
from models import noise
from torch import Tensor, nn

from nanochat.model.attention import Attention
from nanochat.model.config import ModelConfig
from nanochat.model.lm import LM, Block
from nanochat.model.mamba import Mamba
from nanochat.model.mamba2 import Mamba2

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        Mamba2Config,
        Mamba2ForCausalLM,
        MambaConfig,
        MambaForCausalLM,
    )

V, D, DEPTH = 96, 64, 3
PLAIN = {
    "vocab_size": V, "d_model": D, "depth": DEPTH, "sequence_len": 128, "softcap": 0.0, "x0_residual": False,
    "embed_norm": False, "norm_eps": 1e-5,
}  # fmt: skip


@torch.no_grad()
def shake(model: nn.Module) -> None:
    """Random weights and norm gains; the tables of decays stay near what they were."""
    for i, (name, p) in enumerate(model.named_parameters()):
        step = noise(*p.shape, seed=i).to(p.dtype)
        spread = p.size(1) ** -0.5 if p.dim() == 2 and "A_log" not in name else 0.2
        p.add_(step * spread)


def bare(**options: object) -> LM:
    return LM.build(ModelConfig(**{**PLAIN, **options}), seed=0).eval()  # type: ignore[arg-type]


def blocks(ours: LM) -> list[Block]:
    return [block for block in ours.blocks if isinstance(block, Block)]


def copy_ends(ours: LM, embedding: nn.Module, gain: Tensor, head: nn.Module) -> None:
    assert ours.head is not None
    ours.embed.weight.copy_(embedding.weight)
    ours.head.weight.copy_(head.weight * gain)


@torch.no_grad()
def copy_mamba(theirs: MambaForCausalLM, ours: LM) -> None:
    copy_ends(ours, theirs.backbone.embeddings, theirs.backbone.norm_f.weight, theirs.lm_head)
    for block, layer in zip(blocks(ours), theirs.backbone.layers):
        mine, its = block.mixer, layer.mixer
        assert isinstance(mine, Mamba)
        mine.in_proj.weight.copy_(its.in_proj.weight * layer.norm.weight)
        mine.conv_weight.copy_(its.conv1d.weight[:, 0])
        mine.conv_bias.copy_(its.conv1d.bias)
        mine.x_proj.weight.copy_(its.x_proj.weight)
        mine.dt_proj.weight.copy_(its.dt_proj.weight)
        mine.dt_bias.copy_(its.dt_proj.bias)
        mine.A_log.copy_(its.A_log)
        mine.D.copy_(its.D)
        mine.out_proj.weight.copy_(its.out_proj.weight)


@torch.no_grad()
def copy_mamba2(theirs: Mamba2ForCausalLM, ours: LM) -> None:
    copy_ends(ours, theirs.backbone.embeddings, theirs.backbone.norm_f.weight, theirs.lm_head)
    for block, layer in zip(blocks(ours), theirs.backbone.layers):
        mine, its = block.mixer, layer.mixer
        assert isinstance(mine, Mamba2)
        mine.in_proj.weight.copy_(its.in_proj.weight * layer.norm.weight)
        mine.conv_weight.copy_(its.conv1d.weight[:, 0])
        mine.conv_bias.copy_(its.conv1d.bias)
        mine.dt_bias.copy_(its.dt_bias)
        mine.A_log.copy_(its.A_log)
        mine.D.copy_(its.D)
        mine.out_proj.weight.copy_(its.out_proj.weight * its.norm.weight)


@torch.no_grad()
def copy_llama(theirs: LlamaForCausalLM, ours: LM) -> None:
    copy_ends(ours, theirs.model.embed_tokens, theirs.model.norm.weight, theirs.lm_head)
    for block, layer in zip(blocks(ours), theirs.model.layers):
        mine, its = block.mixer, layer.self_attn
        assert isinstance(mine, Attention)
        assert block.mlp is not None
        qkv = torch.cat((its.q_proj.weight, its.k_proj.weight, its.v_proj.weight))
        mine.qkv.weight.copy_(qkv * layer.input_layernorm.weight)
        mine.out.weight.copy_(its.o_proj.weight)
        up = torch.cat((layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight))
        block.mlp.up.weight.copy_(up * layer.post_attention_layernorm.weight)
        block.mlp.down.weight.copy_(layer.mlp.down_proj.weight)


def assert_same_logits(theirs: nn.Module, ours: LM) -> None:
    """In one pass and token by token, at lengths around and beyond a chunk."""
    ids = torch.randint(0, V, (2, 75), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(ids, use_cache=False).logits
        assert expected.std() > 0.3  # weights large enough for a difference to show
        torch.testing.assert_close(ours.logits(ours(ids)), expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(ours.logits(ours(ids[:, :1])), expected[:, :1], rtol=0, atol=1e-4)
        states = ours.init_states(2)
        steps = torch.cat([ours.logits(ours(part, states)) for part in ids[:, :9].split(1, dim=1)], 1)
        torch.testing.assert_close(steps, expected[:, :9], rtol=0, atol=1e-4)


def test_mamba() -> None:
    config = MambaConfig(
        vocab_size=V, hidden_size=D, state_size=8, num_hidden_layers=DEPTH, conv_kernel=4, expand=2, time_step_rank=4,
        use_bias=False, use_conv_bias=True, tie_word_embeddings=False, layer_norm_epsilon=1e-5,
    )  # fmt: skip
    theirs = MambaForCausalLM(config).eval()
    shake(theirs)
    ours = bare(pattern="mamba", d_state=8, dt_rank=4, ssm_norm=False, mlp_m=0)
    copy_mamba(theirs, ours)
    assert_same_logits(theirs, ours)


@pytest.mark.parametrize("n_groups", [1, 2])
def test_mamba2(n_groups: int) -> None:
    config = Mamba2Config(
        vocab_size=V, hidden_size=D, state_size=16, num_hidden_layers=DEPTH, conv_kernel=4, expand=2, head_dim=32,
        num_heads=4, n_groups=n_groups, chunk_size=32, use_bias=False, use_conv_bias=True, tie_word_embeddings=False,
        layer_norm_epsilon=1e-5,
    )  # fmt: skip
    theirs = Mamba2ForCausalLM(config).eval()
    shake(theirs)
    ours = bare(pattern="mamba2", d_state2=16, head_dim2=32, n_groups=n_groups, mlp_m2=0)
    copy_mamba2(theirs, ours)
    assert_same_logits(theirs, ours)


@pytest.mark.parametrize("n_kv_head", [4, 2, 1])
def test_llama(n_kv_head: int) -> None:
    config = LlamaConfig(
        vocab_size=V, hidden_size=D, intermediate_size=3 * D, num_hidden_layers=DEPTH, num_attention_heads=4,
        num_key_value_heads=n_kv_head, max_position_embeddings=128, rms_norm_eps=1e-5, tie_word_embeddings=False,
        attention_bias=False, mlp_bias=False, rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
    )  # fmt: skip
    theirs = LlamaForCausalLM(config).eval()
    shake(theirs)
    ours = bare(
        pattern="transformer", n_kv_head=n_kv_head, head_dim=16, activation="swiglu", mlp_t=3.0, qk_norm=False,
        rope_base=5000.0, key_offset=False,
    )  # fmt: skip
    copy_llama(theirs, ours)
    assert_same_logits(theirs, ours)
