"""Counter-based randomness: hashes, choices and shuffled orders with random access and no memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")
_MASK = (1 << 64) - 1


def mix(key: int, value: int) -> int:
    """64 pseudo-random bits from a key and a counter (splitmix64; Steele et al. 2014)."""
    z = (key + value * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


class Shuffle:
    """A pseudo-random bijection of range(n).

    Mixes on the next power of two, and walks on while the image falls outside of range(n).
    """

    def __init__(self, n: int, key: int) -> None:
        self.n = n
        bits = max(2, (n - 1).bit_length())
        self._mask = (1 << bits) - 1
        self._shift = (bits + 1) // 2
        self._steps = [((mix(key, 2 * k) & self._mask) | 1, mix(key, 2 * k + 1) & self._mask) for k in range(3)]

    def __call__(self, i: int) -> int:
        """The item at place i, 0 <= i < n."""
        mask, shift = self._mask, self._shift
        (a, b), (c, d), (e, f) = self._steps
        while True:
            i = (i * a + b) & mask
            i = ((i ^ (i >> shift)) * c + d) & mask
            i = ((i ^ (i >> shift)) * e + f) & mask
            i ^= i >> shift
            if i < self.n:
                return i


class Draws:
    """A small stream of random choices from one key."""

    def __init__(self, key: int) -> None:
        self._key, self._n = key, 0

    def bits(self) -> int:
        """64 random bits."""
        self._n += 1
        return mix(self._key, self._n)

    def below(self, n: int) -> int:
        """A whole number 0 <= x < n."""
        return self.bits() % n

    def choice(self, items: Sequence[T]) -> T:
        """One of the items."""
        return items[self.bits() % len(items)]
