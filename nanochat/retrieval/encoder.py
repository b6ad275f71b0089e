"""A BERT sentence encoder (safetensors, as sentence-transformers stores it) as an ONNX model with 8-bit products.

Weights are rounded to 7 bits with a scale for each column: 255 * 64 * 2 is the largest pair of products that AVX2's
multiply-add does not clip, so that every processor computes the same. Activations are rounded to 8 bits with a scale
for each token, so that what a text becomes does not depend on the texts beside it, as it does with the one scale for a
whole batch that dynamic quantisation of ONNX Runtime uses. Sums, LayerNorm, softmax and GELU stay in float32.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from nanochat.errors import NanochatError, UsageError
from nanochat.retrieval.onnx_file import MICROSOFT, Graph

LEVELS = 63  # of a weight, either side of zero
FORMAT = 1  # of the model this file makes: part of the name under which it is cached


def convert(directory: Path, quantise: bool = True) -> bytes:
    """The ONNX model of the BERT encoder in `directory`: input_ids (batch, length) int64, texts of one length without
    padding, to sentence_embedding (batch, width), of unit length. Raises UsageError for another kind of model."""
    config = _json(directory / "config.json")
    if config.get("model_type") != "bert" or config.get("hidden_act") != "gelu":
        raise UsageError(
            f"{directory} holds a {config.get('model_type')!r} model with {config.get('hidden_act')!r}: only BERT with "
            f"'gelu' is converted; export it to model.onnx, or use sentence-transformers:{directory}"
        )
    path = directory / "1_Pooling" / "config.json"
    pooling = _json(path) if path.exists() else {"pooling_mode_mean_tokens": True}
    modes = [name for name, on in pooling.items() if name.startswith("pooling_mode") and on is True]
    if modes not in (["pooling_mode_mean_tokens"], ["pooling_mode_cls_token"]):
        raise UsageError(f"{path}: pooling by {modes or 'nothing'}; only mean or CLS is converted")
    return _Converter(config, _weights(directory / "model.safetensors"), quantise).model("mean" in modes[0])


class _Converter:
    def __init__(self, config: Mapping[str, int], weights: Mapping[str, np.ndarray], quantise: bool) -> None:
        self.graph = Graph()
        self.weights, self.quantise = weights, quantise
        self.layers, self.heads = config["num_hidden_layers"], config["num_attention_heads"]
        self.width, self.epsilon = config["hidden_size"], float(config.get("layer_norm_eps", 1e-12))

    def model(self, mean: bool) -> bytes:
        """The whole graph; `mean` pooling, or else the first token."""
        graph = self.graph
        ids = graph.input("input_ids", "int64", ["batch", "length"])
        x = self._embedding(ids)
        for i in range(self.layers):
            x = self._layer(x, f"encoder.layer.{i}.")
        if mean:
            pooled = graph.node("ReduceMean", x, axes=[1], keepdims=0)
        else:
            pooled = graph.node("Gather", x, graph.constant(0, "int64"), axis=1)
        graph.node("LpNormalization", pooled, axis=-1, p=2, name="sentence_embedding")
        graph.output("sentence_embedding", "float32", ["batch", self.width])
        return graph.serialize()

    def _embedding(self, ids: str) -> str:
        graph = self.graph
        words = self.weights["embeddings.word_embeddings.weight"]
        if self.quantise:  # a scale for each word: a quarter of the memory
            scale = np.maximum(np.abs(words).max(axis=1, keepdims=True), 1e-9) / 127
            codes = graph.node("Gather", graph.constant(np.round(words / scale), "int8"), ids)
            x = graph.node("Cast", codes, to=1)
            x = graph.node("Mul", x, graph.node("Gather", graph.constant(scale), ids))
        else:
            x = graph.node("Gather", graph.constant(words), ids)
        places = self.weights["embeddings.position_embeddings.weight"]
        places = places + self.weights["embeddings.token_type_embeddings.weight"][0]
        length = graph.node("Slice", graph.node("Shape", ids), *(graph.constant([i], "int64") for i in (1, 2)))
        here = graph.node("Slice", graph.constant(places), graph.constant([0], "int64"), length)
        return self._norm(graph.node("Add", x, here), "embeddings.LayerNorm.")

    def _norm(self, x: str, prefix: str) -> str:
        gamma, beta = (self._constant(prefix + name) for name in ("weight", "bias"))
        return self.graph.node("LayerNormalization", x, gamma, beta, axis=-1, epsilon=self.epsilon)

    def _layer(self, x: str, prefix: str) -> str:
        """A block with its norms after the sums, as BERT has them."""
        graph = self.graph
        parts = [prefix + f"attention.self.{name}." for name in ("query", "key", "value")]
        qkv = self._product(x, np.concatenate([self.weights[part + "weight"] for part in parts]))
        bias = graph.constant(np.concatenate([self.weights[part + "bias"] for part in parts]))
        sizes = graph.constant([self.width] * 3, "int64")
        q = graph.node("Split", qkv, sizes, n=3, axis=2)
        attended = graph.node(
            "MultiHeadAttention", q, f"{q}_1", f"{q}_2", bias, domain=MICROSOFT, num_heads=self.heads
        )
        x = self._residual(attended, x, prefix + "attention.output.")
        wide = self._product(x, self.weights[prefix + "intermediate.dense.weight"])
        wide = graph.node("BiasGelu", wide, self._constant(prefix + "intermediate.dense.bias"), domain=MICROSOFT)
        return self._residual(wide, x, prefix + "output.")

    def _residual(self, x: str, before: str, prefix: str) -> str:
        """LayerNorm(before + x W + b). In three operators: ONNX Runtime's fused one is slower on CPUs."""
        y = self._product(x, self.weights[prefix + "dense.weight"])
        y = self.graph.node("Add", y, self._constant(prefix + "dense.bias"))
        return self._norm(self.graph.node("Add", y, before), prefix + "LayerNorm.")

    def _product(self, x: str, weight: np.ndarray) -> str:
        """x W^T for a weight (out, in), without the bias."""
        graph = self.graph
        if not self.quantise:
            return graph.node("MatMul", x, graph.constant(weight.T))
        scale = np.maximum(np.abs(weight).max(axis=1), 1e-9) / LEVELS
        codes = graph.constant(np.round(weight / scale[:, None]).T, "int8")
        highest, lowest = (graph.node(kind, x, axes=[-1], keepdims=1) for kind in ("ReduceMax", "ReduceMin"))
        largest = graph.node("Max", highest, graph.node("Neg", lowest), graph.constant([1e-9]))  # of each token
        step, zero = graph.constant(1 / 127), graph.constant(128, "uint8")
        rounded = graph.node("Mul", x, graph.node("Reciprocal", largest))
        rounded = graph.node("QuantizeLinear", rounded, step, zero)
        product = graph.node(
            "MatMulIntegerToFloat", rounded, codes, step, graph.constant(scale), zero, domain=MICROSOFT
        )
        return graph.node("Mul", product, largest)

    def _constant(self, name: str) -> str:
        return self.graph.constant(self.weights[name])


def _weights(path: Path) -> dict[str, np.ndarray]:
    """The tensors, in float32, without the prefix that some files put before every name."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise NanochatError(f"cannot read {path}: {error}") from error
    return {name.removeprefix("bert."): value.astype(np.float32, copy=False) for name, value in tensors.items()}


def _json(path: Path) -> dict[str, int]:
    try:
        values: dict[str, int] = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise NanochatError(f"cannot read {path}: {error}") from error
    return values
