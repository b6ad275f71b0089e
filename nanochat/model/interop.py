"""Mamba and Mamba-2 checkpoints of others, and ours for them: the layouts of `state-spaces` and of `transformers`.

Both are a directory of config.json and weights with the same names, but for the embedding's. Their norms have gains and
ours have none: a gain is folded into the matrix behind it (exactly), so that a head tied to the embedding becomes one
of its own.
"""

from __future__ import annotations

import json
import pickle  # for the name of torch.load's error alone: nothing is unpickled here
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanochat.errors import NanochatError, UsageError
from nanochat.model.config import ModelConfig
from nanochat.model.lm import LM, Block

LAYOUTS = ("state-spaces", "transformers")
TRAINED_LEN = 2048  # tokens a row of the public checkpoints; no config says so
PLAIN: dict[str, Any] = {  # what these architectures are made of, as our options
    "softcap": 0.0, "x0_residual": False, "embed_norm": False, "ssm_norm": False, "mlp_m": 0.0, "mlp_m2": 0.0,
}  # fmt: skip


def read(directory: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and the weights (model*.safetensors, or pytorch_model.bin read without running code) of a directory.

    Raises NanochatError when a file is missing or damaged.
    """
    directory = Path(directory)
    try:
        config = json.loads((directory / "config.json").read_bytes())
        tensors: dict[str, Tensor] = {}
        if files := sorted(directory.glob("model*.safetensors")):
            for file in files:
                tensors |= load_file(file)
        else:
            tensors = torch.load(directory / "pytorch_model.bin", map_location="cpu", weights_only=True)
        if not isinstance(config, dict) or not isinstance(config.get("ssm_cfg", {}), dict):
            raise ValueError("config.json holds no settings of a model")
        if not isinstance(tensors, dict) or not all(isinstance(x, Tensor) for x in tensors.values()):
            raise ValueError("pytorch_model.bin holds other things than tensors by name")
    except FileNotFoundError as error:
        wanted = "config.json and model.safetensors or pytorch_model.bin"
        raise UsageError(f"{error.filename} is missing: a checkpoint is a directory of {wanted}") from None
    except (OSError, ValueError, RuntimeError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        raise NanochatError(f"{directory} is no checkpoint, or it is damaged ({error})") from None
    return config, tensors


@torch.no_grad()
def from_layout(config: Mapping[str, Any], tensors: Mapping[str, Tensor], sequence_len: int = TRAINED_LEN) -> LM:
    """Our model with their weights, in fp32. Raises UsageError for an architecture that ours has no place for."""
    left = {name: x.float() for name, x in tensors.items()}
    if "backbone.embeddings.weight" in left:  # as transformers calls it
        left["backbone.embedding.weight"] = left.pop("backbone.embeddings.weight")

    def take(name: str) -> Tensor:
        if name not in left:
            raise UsageError(f"no Mamba or Mamba-2 language model: {name} is not among the weights")
        return left.pop(name)

    embedding, gain = take("backbone.embedding.weight"), take("backbone.norm_f.weight")
    head = left.pop("lm_head.weight", embedding)
    tied = torch.equal(head, embedding) and bool((gain == 1).all())
    model = LM.build(_our_config(config, left, embedding, tied, sequence_len))
    model.embed.weight.copy_(embedding)
    if model.head is not None:
        model.head.weight.copy_(head * gain)
    for i, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        _fill(block, f"backbone.layers.{i}.", take)
    if left:
        names = ", ".join(sorted(left)[:3])
        raise UsageError(f"the checkpoint has parts that these architectures do not have here: {names}…")
    return model


def _our_config(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], embedding: Tensor, tied: bool, sequence_len: int
) -> ModelConfig:
    """Sizes from the tensors; from config.json only what no shape tells."""
    options = {**config, **config.get("ssm_cfg", {})}
    low, high = options.get("dt_limit", options.get("time_step_limit", (0.0, float("inf"))))
    limited = float(low) > 0 or not (isinstance(high, dict) or float(high) == float("inf"))  # {"__float__": "Infinity"}
    for bad, reason in (
        (config.get("attn_layer_idx"), "attention layers"),
        (options.get("norm_before_gate"), "a norm before the gate"),
        (limited, "limits on the step size"),
        (config.get("rms_norm") is False, "LayerNorm"),
    ):
        if bad:
            raise UsageError(f"the checkpoint has {reason}: only plain Mamba and Mamba-2 models can be imported")
    first = "backbone.layers.0.mixer."
    try:
        A_log, out, conv = (tensors[first + n] for n in ("A_log", "out_proj.weight", "conv1d.weight"))
    except KeyError as error:
        raise UsageError(f"no Mamba or Mamba-2 language model: {error.args[0]} is not among the weights") from None
    (D, E), depth = out.shape, 0
    while f"backbone.layers.{depth}.mixer.A_log" in tensors:
        depth += 1
    sizes: dict[str, Any] = {}
    if A_log.dim() == 2:
        sizes = {"pattern": "mamba", "d_state": A_log.size(1), "dt_rank": tensors[first + "dt_proj.weight"].size(1)}
    else:
        groups = int(options.get("ngroups", options.get("n_groups", 1)))
        sizes = {"pattern": "mamba2", "head_dim2": E // A_log.size(0), "n_groups": groups}
        sizes["d_state2"] = (conv.size(0) - E) // (2 * groups)
    if E % D:
        raise UsageError(f"the inner width {E} is no multiple of the width {D}")
    return ModelConfig(
        vocab_size=embedding.size(0), sequence_len=sequence_len, depth=depth, d_model=D, expand=E // D,
        d_conv=conv.size(2), norm_eps=float(config.get("layer_norm_epsilon", 1e-5)), tie_embeddings=tied,
        **PLAIN, **sizes,
    )  # fmt: skip


def _names(block: Block) -> dict[str, str]:
    """Our parameters of a mixer: their names, without those whose gains are folded."""
    common = {"conv_weight": "conv1d.weight", "conv_bias": "conv1d.bias", "A_log": "A_log", "D": "D"}
    if block.letter == "M":
        own = {"x_proj.weight": "x_proj.weight", "dt_proj.weight": "dt_proj.weight", "dt_bias": "dt_proj.bias"}
    else:
        own = {"dt_bias": "dt_bias"}
    return {"in_proj.weight": "in_proj.weight", "out_proj.weight": "out_proj.weight", **common, **own}


def _fill(block: Block, prefix: str, take: Any) -> None:
    """One block's weights; `take` hands out a tensor by its full name."""
    ours = dict(block.mixer.named_parameters())
    theirs = {name: take(f"{prefix}mixer.{there}") for name, there in _names(block).items()}
    theirs["in_proj.weight"] = theirs["in_proj.weight"] * take(f"{prefix}norm.weight")
    theirs["conv_weight"] = theirs["conv_weight"].flatten(1)
    if block.letter == "M2":
        theirs["out_proj.weight"] = theirs["out_proj.weight"] * take(f"{prefix}mixer.norm.weight")
    for name, value in theirs.items():
        if value.shape != ours[name].shape:
            shapes = f"{tuple(value.shape)}, not {tuple(ours[name].shape)}"
            raise UsageError(f"{prefix}mixer.{_names(block)[name]} has the shape {shapes}: a variant unknown here")
        ours[name].copy_(value)


# ---- ours for others


def to_layout(model: LM, layout: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and weights of our model in one of `LAYOUTS`.

    Raises UsageError naming every option of the architecture that they do not have.
    """
    if layout not in LAYOUTS:
        raise UsageError(f"--layout {layout}: expected {' or '.join(LAYOUTS)}")
    c = model.config
    obstacles = [f"--{name} {getattr(c, name)} (it would have to be {value})" for name, value in _wanted(c).items()
                 if getattr(c, name) != value]  # fmt: skip
    if len(set(c.blocks)) > 1 or "T" in c.blocks:
        obstacles.insert(0, f"the blocks {' '.join(c.blocks)} (only M, or only M2)")
    if obstacles:
        raise UsageError(f"the layout of {layout} has no place for {'; '.join(obstacles)}")
    embedding = "embedding" if layout == "state-spaces" else "embeddings"
    ones = torch.ones(c.d_model)
    tensors = {f"backbone.{embedding}.weight": model.embed.weight, "backbone.norm_f.weight": ones}
    if model.head is not None or layout == "state-spaces":
        tensors["lm_head.weight"] = model.head_weight
    for i, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        prefix = f"backbone.layers.{i}."
        parameters = dict(block.mixer.named_parameters())
        tensors[f"{prefix}norm.weight"] = ones
        tensors |= {f"{prefix}mixer.{there}": parameters[name] for name, there in _names(block).items()}
        tensors[f"{prefix}mixer.conv1d.weight"] = parameters["conv_weight"][:, None]
        if block.letter == "M2":
            tensors[f"{prefix}mixer.norm.weight"] = torch.ones(c.d_inner)
    plain = {name: x.detach().float().cpu().contiguous().clone() for name, x in tensors.items()}
    return (_state_spaces_config(c) if layout == "state-spaces" else _transformers_config(c)), plain


def _wanted(c: ModelConfig) -> dict[str, Any]:
    """The options that these architectures fix, as far as this pattern uses them."""
    unused = {"M": ("mlp_m2",), "M2": ("mlp_m", "ssm_norm")}.get(c.blocks[0], ())
    return {**{name: value for name, value in PLAIN.items() if name not in unused}, "norm_eps": 1e-5}


def _state_spaces_config(c: ModelConfig) -> dict[str, Any]:
    ssm: dict[str, Any] = {"d_conv": c.d_conv, "expand": c.expand}
    if c.blocks[0] == "M":
        ssm |= {"layer": "Mamba1", "d_state": c.d_state, "dt_rank": c.dt_rank}
    else:
        ssm |= {"layer": "Mamba2", "d_state": c.d_state2, "headdim": c.head_dim2, "ngroups": c.n_groups}
    return {
        "d_model": c.d_model, "d_intermediate": 0, "n_layer": c.depth, "vocab_size": c.vocab_size, "ssm_cfg": ssm,
        "attn_layer_idx": [], "attn_cfg": {}, "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True,
        "pad_vocab_size_multiple": 1, "tie_embeddings": c.tie_embeddings,
    }  # fmt: skip


def _transformers_config(c: ModelConfig) -> dict[str, Any]:
    name = "mamba" if c.blocks[0] == "M" else "mamba2"
    config: dict[str, Any] = {
        "architectures": [f"{name.capitalize()}ForCausalLM"], "model_type": name, "hidden_size": c.d_model,
        "num_hidden_layers": c.depth, "vocab_size": c.vocab_size, "expand": c.expand, "conv_kernel": c.d_conv,
        "use_bias": False, "use_conv_bias": True, "hidden_act": "silu", "layer_norm_epsilon": c.norm_eps,
        "residual_in_fp32": True, "tie_word_embeddings": c.tie_embeddings, "dtype": "float32",
    }  # fmt: skip
    if name == "mamba":
        return config | {"state_size": c.d_state, "time_step_rank": c.dt_rank, "intermediate_size": c.d_inner}
    heads = c.d_inner // c.head_dim2
    return config | {"state_size": c.d_state2, "num_heads": heads, "head_dim": c.head_dim2, "n_groups": c.n_groups}


def write(directory: str | Path, model: LM, layout: str) -> Path:
    """Write the model as one of `LAYOUTS`: pytorch_model.bin for `state-spaces`, which reads nothing else, and
    model.safetensors for `transformers`. Raises UsageError as `to_layout`, NanochatError when writing fails."""
    config, tensors = to_layout(model, layout)
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        if layout == "state-spaces":
            torch.save(tensors, directory / "pytorch_model.bin")
        else:
            save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    except (OSError, RuntimeError, SafetensorError) as error:
        raise NanochatError(f"could not write the model to {directory}: {error}") from error
    return directory
