"""From a checkpoint on disk to a model and its tokenizer, ready for inference."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from nanochat import checkpoint, runtime
from nanochat.engine.quantize import prepare
from nanochat.errors import UsageError
from nanochat.model.config import ModelConfig
from nanochat.model.layers import Linear
from nanochat.model.lm import LM
from nanochat.tokenizer import Tokenizer


class Loaded(NamedTuple):
    """`meta` is the checkpoint's meta.json; its `stage` tells a base model from a chat model."""

    model: LM
    tokenizer: Tokenizer
    meta: dict[str, Any]
    path: Path


def load_checkpoint(
    source: str | Path,
    run: str | None = None,
    out_dir: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    quantize: str | None = None,
) -> Loaded:
    """The model and tokenizer of `source`: a stage (`base`, `mid`, `sft`), or a path to a checkpoint, stage or run.

    run None: the run that wrote this stage last. dtype `auto` computes in fp32 on a CPU (decoding is limited by the
    bytes of the weights, which `quantize` chooses: see `engine.quantize`) and in the GPU's best dtype elsewhere.
    Raises NanochatError when the checkpoint or tokenizer is damaged, UsageError when one is missing or they do not
    belong together, and for a device, dtype or format that there is not.
    """
    runtime.start_log()  # which checkpoint was found is a line of the log
    path = checkpoint.find(source, out_dir or runtime.out_root(), run)
    rt = _setup(device, dtype)
    saved = checkpoint.load(path)
    tokenizer = Tokenizer.load(path.parent.parent / "tokenizer")
    if saved.meta["tokenizer_hash"] != tokenizer.hash:
        raise UsageError(
            f"{path} was trained with another tokenizer ({saved.meta['tokenizer_hash'][:12]}) than the one in "
            f"{path.parent.parent / 'tokenizer'} ({tokenizer.hash[:12]}): put the right one back, or train again"
        )
    model = _fill(ModelConfig.from_dict(saved.meta["model_config"]), saved.tensors["model"], path)
    model = model.to(rt.device).eval().requires_grad_(False)
    set_compute_dtype(model, rt.dtype)
    if quantize is not None:
        prepare(model, quantize)
    return Loaded(model, tokenizer, saved.meta, path)


def set_compute_dtype(model: LM, dtype: torch.dtype) -> None:
    """Compute in `dtype` from now on, with the matrices cast once instead of at each use. For inference."""
    model.compute_dtype = dtype
    for module in model.modules():
        if isinstance(module, Linear):
            module.weight.data = module.weight.data.to(dtype)


def _setup(device: str, dtype: str) -> runtime.Runtime:
    random_state = runtime.rng_state()
    rt = runtime.setup(device=device, dtype=dtype, inference=True)
    runtime.set_rng_state(random_state)  # loading a model leaves the caller's random numbers alone
    return rt


def _fill(config: ModelConfig, tensors: dict[str, torch.Tensor], path: Path) -> LM:
    with torch.device("meta"):
        model = LM(config)
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise UsageError(f"{path} does not hold the weights that its architecture needs: {error}") from None
    return model
