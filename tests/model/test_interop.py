"""Checkpoints of transformers and in the layout of state-spaces: the same logits here as there, both ways."""

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from models import noise
from torch import nn

from nanochat.errors import NanochatError, UsageError
from nanochat.model.config import ModelConfig
from nanochat.model.interop import PLAIN, from_layout, read, to_layout, write
from nanochat.model.lm import LM

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

V, D, DEPTH = 96, 64, 2
COMMON: dict[str, Any] = {
    "vocab_size": V, "hidden_size": D, "num_hidden_layers": DEPTH, "conv_kernel": 4, "expand": 2, "use_bias": False,
    "use_conv_bias": True, "layer_norm_epsilon": 1e-5,
}  # fmt: skip


@torch.no_grad()
def theirs(kind: str, tied: bool = False, gains: bool = True) -> nn.Module:
    """A tiny random model of transformers, every weight and gain shaken."""
    if kind == "mamba":
        config = MambaConfig(**COMMON, state_size=8, time_step_rank=4, tie_word_embeddings=tied)
        model: nn.Module = MambaForCausalLM(config)
    else:
        heads = {"num_heads": 4, "head_dim": 32, "n_groups": 2 if kind == "mamba2-groups" else 1}
        sizes = {"state_size": 16, "chunk_size": 32, **heads}
        model = Mamba2ForCausalLM(Mamba2Config(**COMMON, **sizes, tie_word_embeddings=tied))
    for i, (name, p) in enumerate(model.named_parameters()):
        if gains or "norm" not in name:
            p.add_(noise(*p.shape, seed=i) * (p.size(1) ** -0.5 if p.dim() == 2 and "A_log" not in name else 0.2))
    return model.eval()


def in_state_spaces_layout(model: Any, kind: str, directory: Path) -> Path:
    """What mamba_ssm's save_pretrained would have written."""
    ssm = {"d_state": 8, "dt_rank": 4} if kind == "mamba" else {
        "layer": "Mamba2", "d_state": 16, "headdim": 32, "ngroups": model.config.n_groups,
    }  # fmt: skip
    config = {"d_model": D, "n_layer": DEPTH, "vocab_size": V - 3, "ssm_cfg": ssm, "rms_norm": True,
              "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 8}  # fmt: skip
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    state = {name.replace("embeddings", "embedding"): x for name, x in model.state_dict().items()}
    torch.save(state, directory / "pytorch_model.bin")
    return directory


def assert_same(model: Any, ours: LM) -> None:
    ids = torch.randint(0, V, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        assert expected.std() > 0.3
        torch.testing.assert_close(ours.logits(ours(ids)), expected, rtol=0, atol=1e-4)


KINDS = ["mamba", "mamba2", "mamba2-groups"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("tied", "gains"), [(False, True), (True, True), (True, False)])
def test_a_checkpoint_of_transformers(kind: str, tied: bool, gains: bool, tmp_path: Path) -> None:
    model = theirs(kind, tied, gains)
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    ours = from_layout(*read(tmp_path))
    assert ours.config.tie_embeddings == (tied and not gains)
    assert_same(model, ours)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_in_the_layout_of_state_spaces(kind: str, tmp_path: Path) -> None:
    model = theirs(kind, tied=True)
    ours = from_layout(*read(in_state_spaces_layout(model, kind, tmp_path / "there")))
    assert ours.config.vocab_size == V  # padded rows are kept
    assert_same(model, ours)


def ours(kind: str, **options: Any) -> LM:
    sizes = {"d_state": 8, "dt_rank": 4} if kind == "mamba" else {"d_state2": 16, "head_dim2": 32}
    shape = {"vocab_size": V, "sequence_len": 64, "depth": DEPTH, "d_model": D, "pattern": kind, **sizes}
    model = LM.build(ModelConfig(**{**shape, **PLAIN, **options}), seed=0)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.add_(noise(*p.shape, seed=i) * 0.1)
    return model.eval()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_ours_in_transformers(kind: str, tied: bool, tmp_path: Path) -> None:
    mine = ours(kind, tie_embeddings=tied)
    write(tmp_path, mine, "transformers")
    kinds = {"mamba": MambaForCausalLM, "mamba2": Mamba2ForCausalLM}
    assert_same(kinds[kind].from_pretrained(tmp_path).eval(), mine)


@pytest.mark.parametrize("layout", ["state-spaces", "transformers"])
@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
@pytest.mark.parametrize("options", [{}, {"tie_embeddings": True}, {"expand": 3, "d_conv": 2}])
def test_there_and_back_again(kind: str, layout: str, options: dict[str, Any], tmp_path: Path) -> None:
    mine = ours(kind, **options)
    again = from_layout(*read(write(tmp_path / "deep", mine, layout)), sequence_len=64)
    assert again.config == mine.config
    assert all(torch.equal(x, mine.state_dict()[name]) for name, x in again.state_dict().items())


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"pattern": "M T"}, "the blocks M T"),
        ({"pattern": "M M2"}, "the blocks M M2"),
        ({"softcap": 15.0, "mlp_m": 2.0}, "--softcap 15.0 .it would have to be 0.0.; --mlp_m 2.0"),
        ({"ssm_norm": True}, "--ssm_norm"),
        ({"norm_eps": 1e-6}, "--norm_eps"),
        ({"x0_residual": True, "embed_norm": True}, "--x0_residual.*--embed_norm"),
    ],
)
def test_what_they_have_no_place_for(options: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        to_layout(ours("mamba", **options), "state-spaces")


def test_what_a_pattern_does_not_use_is_no_obstacle() -> None:
    to_layout(ours("mamba", mlp_m2=2.0), "state-spaces")
    to_layout(ours("mamba2", mlp_m=2.0, ssm_norm=True), "transformers")
    with pytest.raises(UsageError, match="--layout gguf"):
        to_layout(ours("mamba"), "gguf")


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"attn_layer_idx": [3]}, "attention layers"),
        ({"ssm_cfg": {"norm_before_gate": True}}, "norm before the gate"),
        ({"time_step_limit": [0.0, 0.5]}, "limits on the step size"),
        ({"rms_norm": False}, "LayerNorm"),
    ],
)
def test_variants_are_refused_by_name(config: dict[str, Any], named: str) -> None:
    _, tensors = to_layout(ours("mamba"), "state-spaces")
    with pytest.raises(UsageError, match=named):
        from_layout(config, tensors)


def test_weights_that_are_unknown_or_missing_are_refused_by_name() -> None:
    config, tensors = to_layout(ours("mamba2"), "state-spaces")
    with pytest.raises(UsageError, match=r"in_proj\.bias"):
        from_layout(config, {**tensors, "backbone.layers.0.mixer.in_proj.bias": torch.ones(3)})
    for name in tensors:
        if name != "lm_head.weight":
            last = name == "backbone.layers.1.mixer.A_log"  # a layer less, and its other weights too many
            with pytest.raises(UsageError, match="layers.1" if last else re.escape(name)):
                from_layout(config, {k: v for k, v in tensors.items() if k != name})
    wrong = {**tensors, "backbone.layers.0.mixer.D": torch.ones(128)}
    with pytest.raises(UsageError, match=r"mixer\.D has the shape \(128,\)"):
        from_layout(config, wrong)


def test_files_that_are_missing_or_damaged(tmp_path: Path) -> None:
    with pytest.raises(NanochatError, match=r"config\.json is missing"):
        read(tmp_path)
    write(tmp_path, ours("mamba"), "state-spaces")
    weights = tmp_path / "pytorch_model.bin"
    whole = weights.read_bytes()
    for content in (b"", b"x" * 100, whole[:1000]):
        weights.write_bytes(content)
        with pytest.raises(NanochatError, match="damaged"):
            read(tmp_path)
    for other in ([1], {"a": 1}):
        torch.save(other, weights)
        with pytest.raises(NanochatError, match=r"damaged.*tensors by name"):
            read(tmp_path)
    weights.write_bytes(whole)
    config = (tmp_path / "config.json").read_text()
    for text in ("[]", '{"ssm_cfg": null}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(NanochatError, match=r"damaged.*config\.json"):
            read(tmp_path)
    (tmp_path / "config.json").write_text(config)
    weights.unlink()
    with pytest.raises(NanochatError, match=r"pytorch_model\.bin is missing"):
        read(tmp_path)


class Harmful:
    """What a pickle could make a careless reader call."""

    def __reduce__(self) -> Any:
        return (print, ("code ran",))


def test_no_code_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, ours("mamba"), "state-spaces")
    torch.save({"a": Harmful()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(NanochatError):
        read(tmp_path)
    assert "code ran" not in capsys.readouterr().out
