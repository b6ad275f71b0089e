"""Nested state as JSON: a nest of dict, list, tuple, number, text, tensor and array <-> plain JSON values and tensors.

Tensors and arrays leave the nest for a flat dict, and {"__tensor__": name} behind; what JSON would change (tuples,
integer keys) is marked, so that `unpack` gives back what `pack` got.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanochat.errors import UsageError

_TENSOR, _TUPLE, _PAIRS = "__tensor__", "__tuple__", "__pairs__"


def pack(value: Any, tensors: dict[str, Tensor], where: str) -> Any:
    """JSON values for `value`; tensors and arrays go to `tensors`, named by their place. `where` begins these names and
    the message of the UsageError for what cannot be saved."""
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str | int) or isinstance(key, bool) or key in (_TENSOR, _TUPLE, _PAIRS):
                raise UsageError(f"{where}: key {key!r} cannot be saved; use text or int")
        if any(isinstance(key, int) for key in value):  # JSON would turn them into text: an optimizer's param ids
            return {_PAIRS: [[key, pack(item, tensors, f"{where}.{key}")] for key, item in value.items()]}
        return {key: pack(item, tensors, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, tuple):
        return {_TUPLE: [pack(item, tensors, f"{where}.{i}") for i, item in enumerate(value)]}
    if isinstance(value, list):
        return [pack(item, tensors, f"{where}.{i}") for i, item in enumerate(value)]
    if isinstance(value, Tensor):
        return {_TENSOR: _add(value, tensors, where), "kind": "torch"}
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "biuf":
            raise UsageError(f"{where}: an array of {value.dtype} cannot be saved")
        native = np.array(value, dtype=value.dtype.newbyteorder("="), order="C")
        return {_TENSOR: _add(torch.from_numpy(native), tensors, where), "kind": "numpy"}
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, str | int | float):
        return value
    raise UsageError(f"{where}: {type(value).__name__} cannot be saved; use numbers, text, lists, dicts or tensors")


def _add(tensor: Tensor, tensors: dict[str, Tensor], where: str) -> str:
    name = f"{len(tensors)}:{where}"  # numbered: {"a.b": ...} and {"a": {"b": ...}} have one place name
    tensors[name] = tensor
    return name


def unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The nest that `pack` got; its tensors are on the CPU."""
    if isinstance(value, list):
        return [unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        tensor = tensors[value[_TENSOR]]
        return tensor.numpy() if value["kind"] == "numpy" else tensor
    if _TUPLE in value:
        return tuple(unpack(item, tensors) for item in value[_TUPLE])
    if _PAIRS in value:
        return {key: unpack(item, tensors) for key, item in value[_PAIRS]}
    return {key: unpack(item, tensors) for key, item in value.items()}
