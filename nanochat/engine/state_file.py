"""States in a file: what a model has read, to go on from days later.

One safetensors file: a tensor a layer and name (`3.h`, `3.conv`, `7.k`…) and, as metadata, what they belong to. It is
refused by any other model, weight format or tokenizer, and when a byte of it has changed. It is written in one rename.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nanochat.errors import NanochatError, UsageError
from nanochat.model.lm import LM
from nanochat.model.mixer import State

FORMAT_VERSION = 1
SAMPLES = 64  # numbers of each weight that go into a model's fingerprint


def fingerprint(model: LM) -> str:
    """A digest of the architecture, the compute dtype, and a few numbers of every weight: another one after any
    training step and for any other weight format. It takes milliseconds, whatever the size."""
    digest = hashlib.sha256(json.dumps([model.config.to_dict(), str(model.compute_dtype)], sort_keys=True).encode())
    for name, weight in model.state_dict().items():
        flat = weight.detach().reshape(-1)
        every = max(1, flat.numel() // SAMPLES)
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype} ".encode())
        digest.update(flat[::every][:SAMPLES].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def save_states(
    path: str | Path, states: Sequence[State], model: LM, tokenizer_hash: str, about: dict[str, Any], **more: Tensor
) -> Path:
    """Write the states of a batch's layers. about: anything that JSON holds, given back by `load_states`, as are the
    tensors in `more`. Raises NanochatError when the file cannot be written; an older one is then still there."""
    path = Path(path)
    tensors = {f"{i}.{name}": x for i, state in enumerate(states) for name, x in state.tensors().items()}
    tensors = {name: x.detach().to("cpu").contiguous().clone() for name, x in {**tensors, **more}.items()}
    record = {
        "format_version": FORMAT_VERSION,
        "model": fingerprint(model),
        "tokenizer": tokenizer_hash,
        "blocks": " ".join(model.config.blocks),
        "about": about,
        "sha256": _digest(tensors, about),
    }
    new = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, new, metadata={"nanochat_states": json.dumps(record)})
        os.replace(new, path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            new.unlink()
        raise NanochatError(f"could not write the states to {path}: {error}") from error
    return path


def load_states(
    path: str | Path, model: LM, tokenizer_hash: str
) -> tuple[list[State], dict[str, Any], dict[str, Tensor]]:
    """The states, the `about` and the other tensors that `save_states` got, on the model's device.

    Raises UsageError when they belong to another model or tokenizer, NanochatError when the file is missing, damaged,
    or written by a newer nanochat.
    """
    path = Path(path)
    tensors, record = _read(path)
    if record["format_version"] != FORMAT_VERSION:
        raise NanochatError(f"{path} has format version {record['format_version']}, this nanochat reads "
                            f"{FORMAT_VERSION}: update nanochat")  # fmt: skip
    if record["sha256"] != _digest(tensors, record["about"]):
        raise NanochatError(f"{path} is damaged: its sha256 does not match its content; read the text again")
    if record["tokenizer"] != tokenizer_hash:
        raise UsageError(
            f"{path} was read with another tokenizer ({record['tokenizer'][:12]}, here {tokenizer_hash[:12]}): load "
            "the model that wrote it"
        )
    if record["model"] != fingerprint(model):
        raise UsageError(
            f"{path} holds states of another model ({record['blocks']}), other weights, or the same weights in another "
            "--dtype or --quantize: load the model as it was when they were saved"
        )
    states = []
    for i, empty in enumerate(model.init_states(1)):
        # `State.map` visits the tensors in the order of `State.tensors`
        whole = iter([tensors.pop(f"{i}.{name}").to(x.device) for name, x in empty.tensors().items()])
        states.append(empty.map(lambda _, whole=whole: next(whole)))  # type: ignore[misc]
    return states, record["about"], {name: x.to(model.device) for name, x in tensors.items()}


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not path.is_file():
        raise UsageError(f"there is no file of states {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        record = json.loads(metadata["nanochat_states"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise NanochatError(f"{path} is no file of states, or it is damaged ({error!r})") from None
    return tensors, record


def _digest(tensors: dict[str, Tensor], about: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name in sorted(tensors):
        x = tensors[name]
        digest.update(f"{name} {tuple(x.shape)} {x.dtype} ".encode())
        digest.update(x.reshape(-1).view(torch.uint8).numpy().tobytes() if x.numel() else b"")
    return digest.hexdigest()
