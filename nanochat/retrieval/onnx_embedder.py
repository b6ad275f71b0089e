"""Sentence encoders through ONNX Runtime: tokenise, sort by length, run small batches on all cores, keep the order.

A batch holds texts of exactly one length, up to `TOKENS` tokens: no padding, activations that stay in the cache, and a
vector that does not depend on which texts came along. Batches run side by side, each on one thread: that scales better
than cutting every product in two, and a busy core delays only itself. Memory grows with the number of texts by their
vectors alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from nanochat.errors import NanochatError, UsageError
from nanochat.retrieval.document import clean_text
from nanochat.retrieval.embed import normalised

TOKENS = 768  # of a batch
WINDOW = 2048  # texts tokenised and sorted at a time
CHARACTERS = 64  # of a text that are read for each token it may have: a 50 MB line is not tokenised to its end


class OnnxEmbedder:
    """An encoder from `directory`: `model.onnx`, or a BERT's `model.safetensors` (converted when it is loaded, see
    encoder.py), with `tokenizer.json`.

    `name` is by default the directory's name and the start of the weights' SHA-256: it stays when the directory is
    moved. `threads`: 0 for all cores, or as many as OMP_NUM_THREADS says. Raises UsageError where something is missing.
    """

    def __init__(self, directory: Path, name: str = "", quantise: bool = True, threads: int = 0) -> None:
        self._runtime = _import_runtime()
        self._threads = threads or _threads()
        weights = _weights_file(directory)
        self._session = self._load(weights, directory, quantise)
        self._inputs = {one.name for one in self._session.get_inputs()}
        self._tokenizer, self._max_tokens = _tokenizer(directory)
        if not name:
            with open(weights, "rb") as file:
                digest = sha256(file.read()).hexdigest()[:12]
            name = f"{directory.resolve().name}-{'int8-' if quantise and weights.suffix != '.onnx' else ''}{digest}"
        self.name = name
        self.dimension = int(self._run([self._tokenizer.encode("dimension").ids]).shape[1])

    def _load(self, weights: Path, directory: Path, quantise: bool) -> Any:
        from nanochat.retrieval.encoder import convert

        options = self._runtime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        model: str | bytes = str(weights) if weights.suffix == ".onnx" else convert(directory, quantise)
        try:
            return self._runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's exceptions share no class but this
            raise NanochatError(f"ONNX Runtime cannot load {weights}: {str(error).splitlines()[0]}") from error

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """(n, dimension) float32 of unit length; zeros for a blank text."""
        vectors = np.zeros((len(texts), self.dimension), np.float32)
        for start in range(0, len(texts), WINDOW):
            window = texts[start : start + WINDOW]
            here = vectors[start : start + WINDOW]
            worded = [i for i, text in enumerate(window) if text.strip()]
            tokens = self._tokens([window[i] for i in worded])
            batches = list(_batches([len(ids) for ids in tokens]))
            if len(batches) < 2 or self._threads < 2:
                _fill(here, worded, batches, map(self._run, ([tokens[i] for i in batch] for batch in batches)))
            else:
                with ThreadPoolExecutor(self._threads) as pool:
                    _fill(here, worded, batches, pool.map(self._run, [[tokens[i] for i in b] for b in batches]))
        return normalised(vectors)

    embed_queries = embed

    def _tokens(self, texts: list[str]) -> list[list[int]]:
        limit = CHARACTERS * self._max_tokens
        encoded = self._tokenizer.encode_batch_fast([clean_text(text.strip()[:limit]) for text in texts])
        return [one.ids for one in encoded]

    def _run(self, tokens: list[list[int]]) -> np.ndarray:
        """(n, width) vectors of texts with the same number of tokens, before normalisation."""
        ids = np.array(tokens, np.int64)
        feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        out = self._session.run(None, {name: value for name, value in feed.items() if name in self._inputs})[0]
        return np.asarray(out.mean(axis=1) if out.ndim == 3 else out, np.float32)  # a vector for each token: their mean


def _fill(vectors: np.ndarray, worded: list[int], batches: list[np.ndarray], done: Iterator[np.ndarray]) -> None:
    places = np.array(worded, np.int64)
    for batch, made in zip(batches, done):
        vectors[places[batch]] = made


def _batches(lengths: Sequence[int]) -> Iterator[np.ndarray]:
    """Positions of texts of one length, up to `TOKENS` tokens or one text a batch; the longest first."""
    every = np.array(lengths, np.int64)
    order = np.argsort(-every, kind="stable")
    start = 0
    while start < len(order):
        length = every[order[start]]
        same = int(np.count_nonzero(every[order[start : start + max(1, TOKENS // length)]] == length))
        yield order[start : start + same]
        start += same


def _weights_file(directory: Path) -> Path:
    for name in ("model.onnx", "model.safetensors"):
        if (directory / name).is_file():
            return directory / name
    raise UsageError(f"{directory} holds no sentence encoder: neither model.onnx nor model.safetensors")


def _tokenizer(directory: Path) -> tuple[Any, int]:
    """The tokenizer, cutting at the model's length, and that length."""
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise UsageError("sentence encoders need tokenizers: pip install 'nanochat[rag]'") from error
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise UsageError(f"{directory} has no tokenizer.json: save the model with a fast tokenizer")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exceptions
        raise NanochatError(f"cannot read {path}: {error}") from error
    limit = (tokenizer.truncation or {}).get("max_length", 512)
    for name, key in (("sentence_bert_config.json", "max_seq_length"), ("config.json", "max_position_embeddings")):
        if (directory / name).is_file():
            limit = json.loads((directory / name).read_bytes()).get(key) or limit
            break
    tokenizer.enable_truncation(max_length=limit)
    tokenizer.no_padding()
    return tokenizer, limit


def _threads() -> int:
    asked = os.environ.get("OMP_NUM_THREADS", "")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(int(asked), cores) if asked.isdecimal() and int(asked) else cores


def _import_runtime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise UsageError("sentence encoders need onnxruntime: pip install 'nanochat[rag]'") from error
    return onnxruntime
