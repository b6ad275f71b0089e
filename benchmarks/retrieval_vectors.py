"""Seeded vectors for dense retrieval: unit vectors around random centres with isotropic noise, in blocks.

Isotropic noise is harder than real embeddings: no dimension carries less of it than another, so quantisers and graphs
find nothing to save on. `noise` is the length of the noise relative to the centre's: at 1.0 two vectors of one centre
have a cosine of about 0.5, two of different centres one of 0 +- 0.05 (d = 384).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def clustered_vectors(
    n: int, d: int = 384, seed: int = 0, centres: int = 5000, noise: float = 1.0, block: int = 10_000
) -> Iterator[np.ndarray]:
    """Blocks of (<= block, d) float32 unit vectors, `n` in all. Block i depends on `seed` and i alone."""
    middle = _unit(np.random.default_rng([seed, 0]).standard_normal((centres, d), dtype=np.float32))
    for i, start in enumerate(range(0, n, block)):
        yield _around(middle, np.random.default_rng([seed, 1, i]), min(block, n - start), noise)


def clustered_queries(
    n: int, d: int = 384, seed: int = 0, centres: int = 5000, noise: float = 1.0
) -> np.ndarray:
    """(n, d) float32 unit vectors from the same centres as `clustered_vectors(seed=seed)`, none of them among those."""
    middle = _unit(np.random.default_rng([seed, 0]).standard_normal((centres, d), dtype=np.float32))
    return _around(middle, np.random.default_rng([seed, 2]), n, noise)


def nearest(queries: np.ndarray, blocks: Iterator[np.ndarray], k: int) -> np.ndarray:
    """(n, k) positions of the exact nearest by inner product, best first: what recall is counted against."""
    best_scores = np.full((len(queries), k), -np.inf, np.float32)
    best = np.zeros((len(queries), k), np.int64)
    start = 0
    for block in blocks:
        scores = np.concatenate([best_scores, queries @ block.T], axis=1)
        here = np.broadcast_to(np.arange(start, start + len(block)), (len(queries), len(block)))
        found = np.concatenate([best, here], axis=1)
        top = np.argpartition(-scores, k - 1, axis=1)[:, :k]
        best_scores, best = np.take_along_axis(scores, top, 1), np.take_along_axis(found, top, 1)
        start += len(block)
    return np.take_along_axis(best, np.argsort(-best_scores, axis=1, kind="stable"), 1)


def _around(middle: np.ndarray, rng: np.random.Generator, n: int, noise: float) -> np.ndarray:
    d = middle.shape[1]
    vectors = rng.standard_normal((n, d), dtype=np.float32)
    vectors *= noise / np.sqrt(d)
    vectors += middle[rng.integers(0, len(middle), n)]
    return _unit(vectors)


def _unit(vectors: np.ndarray) -> np.ndarray:
    vectors /= np.sqrt(np.einsum("ij,ij->i", vectors, vectors))[:, None]
    return vectors
