"""Numbers with their uncertainty: what every evaluation and every retrieval figure is written as.

Intervals are 95%: Wilson's for shares (Wilson 1927; it stays inside [0, 1] and is honest at 0 and 1), percentile
bootstrap for means and ratios (Efron 1979), resampling whole rows, since tokens of one row are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nanochat.errors import NanochatError

Z95 = 1.959963984540054  # the standard normal's 97.5% quantile
N_RESAMPLES = 2000


@dataclass(frozen=True)
class Metric:
    """A measured value, the number of independent things it was measured on, and its 95% interval."""

    value: float
    n: int
    low: float
    high: float

    def __str__(self) -> str:
        if self.low == self.high:
            return f"{self.value:.4g}"
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}] (n={self.n:,})"


def exact(value: float, n: int = 1) -> Metric:
    """What has no sampling error, such as a time or a size."""
    return Metric(float(value), n, float(value), float(value))


def wilson(n_right: int, n: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval of the share n_right / n. Raises NanochatError when n is 0."""
    if n < 1 or not 0 <= n_right <= n:
        raise NanochatError(f"no share of {n_right} in {n}: there was nothing to evaluate")
    p, z2 = n_right / n, z * z
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    # At 0 and n an end of the interval is exactly 0 or 1; rounding would put it beside.
    return (0.0 if n_right == 0 else middle - half), (1.0 if n_right == n else middle + half)


def share(n_right: int, n: int) -> Metric:
    """n_right of n, with Wilson's interval. It takes the n things for independent draws."""
    low, high = wilson(n_right, n)
    return Metric(n_right / n, n, low, high)


def mean(values: Sequence[float] | np.ndarray, seed: int = 0) -> Metric:
    """The mean of values, bootstrapped."""
    return ratio(values, np.ones(len(values)), seed)


def ratio(
    above: Sequence[float] | np.ndarray, below: Sequence[float] | np.ndarray, seed: int = 0
) -> Metric:
    """sum(above) / sum(below) over pairs that belong together, such as the nats and bytes of a row; bootstrapped over
    the pairs. One pair alone gives no interval: low = high = value. Raises NanochatError when there is nothing."""
    top, bottom = np.asarray(above, dtype=np.float64), np.asarray(below, dtype=np.float64)
    assert top.shape == bottom.shape
    n, total = len(top), float(bottom.sum())
    if not n or not total:
        raise NanochatError("there was nothing to evaluate")
    value = float(top.sum()) / total
    if n == 1:
        return exact(value)
    random = np.random.default_rng(seed)
    chunk = max(1, min(N_RESAMPLES, 4_000_000 // n))  # resamples held at once: at most 32 MB
    found: list[np.ndarray] = []
    for start in range(0, N_RESAMPLES, chunk):
        counts = random.multinomial(n, np.full(n, 1 / n), size=min(chunk, N_RESAMPLES - start))
        drawn = counts @ bottom
        found.append((counts @ top)[drawn > 0] / drawn[drawn > 0])
    low, high = np.quantile(np.concatenate(found), [0.025, 0.975])
    return Metric(value, n, float(low), float(high))
