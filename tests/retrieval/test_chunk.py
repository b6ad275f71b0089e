"""Passages: nothing between them is lost, they overlap as told, each has the size it may have."""

import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.errors import UsageError
from nanochat.retrieval.chunk import LONGEST_WORD, check_chunking, spans

PARTS = ["a", "moon", "\n", "  ", " ", "x" * (LONGEST_WORD + 3), "日本語", "é", "\u3000", "\x1c", "\x00"]
TEXTS = st.lists(st.sampled_from(PARTS), max_size=60).map(" ".join) | st.text(max_size=200)
SIZES = st.integers(1, 9).flatmap(lambda chunk: st.tuples(st.just(chunk), st.integers(0, chunk - 1)))


def words(text: str) -> list[str]:
    """The definition: ideographs and kana one by one, the rest between white space, cut when very long."""
    single = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
    found = []
    for piece in re.findall(rf"[{single}]|[^\s{single}]+", text):
        found += [piece[i : i + LONGEST_WORD] for i in range(0, len(piece), LONGEST_WORD)]
    return found


@given(TEXTS, SIZES)
def test_passages_are_runs_of_words(text: str, sizes: tuple[int, int]) -> None:
    chunk, overlap = sizes
    found, expected = spans(text, chunk, overlap), words(text)
    if len(expected) <= chunk:
        assert found == [(0, len(text))]
        return
    step = chunk - overlap
    for i, (start, end) in enumerate(found):
        assert words(text[start:end]) == expected[i * step : i * step + chunk]
    assert words(text[found[-1][0] :])[-1] == expected[-1]
    assert len(found) == 1 + -(-(len(expected) - chunk) // step)  # the last one was needed
    assert all(a < b for a, b in pairwise(found))


def test_zero_words_keeps_documents_whole() -> None:
    assert spans("a b c " * 1000, 0, 0) == [(0, 6000)]


def test_short_and_empty_texts_stay_whole() -> None:
    assert spans("", 5, 2) == [(0, 0)]
    assert spans(" a  b ", 2, 1) == [(0, 6)]
    assert spans("one two three", 2, 1) == [(0, 7), (4, 13)]


@pytest.mark.parametrize("bad", [(-1, 0), (5, 5), (5, 6), (5, -1), (0, 1)])
def test_impossible_sizes_are_refused(bad: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match="overlap"):
        check_chunking(*bad)
