"""Texts for retrieval benchmarks: documents of about 60 words, drawn by Zipf's law from 200,000 made-up words.

The same seed gives the same documents everywhere; the first n of a longer collection are those of a shorter one.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import numpy as np

N_WORDS = 200_000
N_STOP_WORDS = 100  # the most frequent words, two fifths of a text: what content queries leave out
WORDS_PER_DOCUMENT = 60
_CHUNK = 2_000
_SYLLABLES = [c + v for c in "bcdfghjklmnpqrstvwxyz" for v in "aeiou"]  # 105


@cache
def vocabulary() -> list[str]:
    """The words, the most frequent first: frequent ones are short, as in a language; no two are equal, even stemmed."""
    words = []
    for rank in range(N_WORDS):
        number, word = rank, ""
        while True:
            number, digit = divmod(number, len(_SYLLABLES))
            word += _SYLLABLES[digit]
            if not number:
                break
            number -= 1
        words.append(word + "k")  # no suffix that a stemmer would cut
    return words


@cache
def _cumulative() -> np.ndarray:
    weights = 1.0 / np.arange(1, N_WORDS + 1)
    cumulative = np.cumsum(weights)
    return cumulative / cumulative[-1]


def zipf_documents(n: int, seed: int = 0) -> Iterator[str]:
    """`n` texts, one after the other; lengths are Poisson around WORDS_PER_DOCUMENT, one word at least."""
    words = np.array(vocabulary(), dtype=object)
    cumulative = _cumulative()
    for start in range(0, n, _CHUNK):
        random = np.random.default_rng((seed, start))
        lengths = np.maximum(random.poisson(WORDS_PER_DOCUMENT, _CHUNK), 1)
        drawn = words[np.searchsorted(cumulative, random.random(lengths.sum()))].tolist()
        ends = np.cumsum(lengths).tolist()
        for begin, end in zip([0, *ends[: n - start - 1]], ends[: n - start]):
            yield " ".join(drawn[begin:end])


def zipf_queries(n: int, seed: int = 1, words: int = 4, stop_words: bool = False) -> list[str]:
    """`n` queries of `words` different words, drawn as the documents draw theirs; unless `stop_words`, without the
    N_STOP_WORDS most frequent."""
    random = np.random.default_rng((seed, 7))
    cumulative = _cumulative()
    low = 0.0 if stop_words else float(cumulative[N_STOP_WORDS - 1])
    queries = []
    while len(queries) < n:
        drawn = np.searchsorted(cumulative, low + (1 - low) * random.random(words), side="right")
        drawn = np.minimum(drawn, N_WORDS - 1)
        if len(set(drawn.tolist())) == words:
            queries.append(" ".join(vocabulary()[i] for i in drawn))
    return queries
