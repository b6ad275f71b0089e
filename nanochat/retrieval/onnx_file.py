"""Writing an ONNX model without the onnx package: the few protobuf messages it takes (onnx.proto, IR version 8).

A message is a run of fields: (number << 3 | wire type), then a varint (type 0), four bytes (5), or a length and that
many bytes (2). Graphs are built node by node; names of values are made up where none is given.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

Attribute: TypeAlias = "int | float | str | Sequence[int]"

MICROSOFT = "com.microsoft"  # ONNX Runtime's own operators
_TYPES = {"float32": 1, "uint8": 2, "int8": 3, "int32": 6, "int64": 7, "float16": 10}


class Graph:
    """Nodes and constants of a model on the way to bytes."""

    def __init__(self, opset: int = 17) -> None:
        self._opset = opset
        self._nodes: list[bytes] = []
        self._constants: list[bytes] = []
        self._inputs: list[bytes] = []
        self._outputs: list[bytes] = []
        self._n = 0

    def input(self, name: str, dtype: str, shape: Sequence[int | str]) -> str:
        """An input; a dimension is a number, or a name for one that varies."""
        self._inputs.append(_value(name, dtype, shape))
        return name

    def output(self, name: str, dtype: str, shape: Sequence[int | str]) -> None:
        self._outputs.append(_value(name, dtype, shape))

    def constant(self, array: np.ndarray | Sequence[float] | float, dtype: str = "float32") -> str:
        """A constant tensor; returns its name."""
        data = np.ascontiguousarray(array, dtype=dtype) if np.ndim(array) else np.array(array, dtype=dtype)
        name = self._fresh("c")
        dims = b"".join(_integer(1, size) for size in data.shape)
        self._constants.append(dims + _integer(2, _TYPES[dtype]) + _text(8, name) + _bytes(9, data.tobytes()))
        return name

    def node(
        self, kind: str, *inputs: str, n: int = 1, name: str = "", domain: str = "", **attributes: Attribute
    ) -> str:
        """An operator; returns the name of its first output. `n` > 1: further outputs are called <first>_1 and so on;
        "" stands for an input that is left out."""
        first = name or self._fresh("v")
        outputs = [first, *(f"{first}_{i}" for i in range(1, n))]
        body = b"".join(_text(1, one) for one in inputs) + b"".join(_text(2, one) for one in outputs)
        body += _text(4, kind) + (_text(7, domain) if domain else b"")
        self._nodes.append(body + b"".join(_bytes(5, _attribute(*one)) for one in attributes.items()))
        return first

    def serialize(self) -> bytes:
        """The whole model."""
        graph = b"".join(_bytes(1, one) for one in self._nodes) + _text(2, "graph")
        graph += b"".join(_bytes(5, one) for one in self._constants)
        graph += b"".join(_bytes(11, one) for one in self._inputs) + b"".join(_bytes(12, one) for one in self._outputs)
        opsets = _bytes(8, _integer(2, self._opset)) + _bytes(8, _text(1, MICROSOFT) + _integer(2, 1))
        return _integer(1, 8) + _text(2, "nanochat") + _bytes(7, graph) + opsets

    def _fresh(self, prefix: str) -> str:
        self._n += 1
        return f"{prefix}{self._n}"


def _value(name: str, dtype: str, shape: Sequence[int | str]) -> bytes:
    dims = b"".join(_bytes(1, _integer(1, d) if isinstance(d, int) else _text(2, d)) for d in shape)
    tensor = _integer(1, _TYPES[dtype]) + _bytes(2, dims)
    return _text(1, name) + _bytes(2, _bytes(1, tensor))


def _attribute(name: str, value: Attribute) -> bytes:
    if isinstance(value, str):
        return _text(1, name) + _text(4, value) + _integer(20, 3)
    if isinstance(value, float):
        return _text(1, name) + _varint(2 << 3 | 5) + struct.pack("<f", value) + _integer(20, 1)
    if isinstance(value, int):
        return _text(1, name) + _integer(3, value) + _integer(20, 2)
    return _text(1, name) + b"".join(_integer(8, one) for one in value) + _integer(20, 7)


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1  # negative numbers are two's complement
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _integer(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, data: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(data)) + data


def _text(field: int, text: str) -> bytes:
    return _bytes(field, text.encode())
