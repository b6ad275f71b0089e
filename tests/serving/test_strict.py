"""JSON read strictly: the same as Python's own where that is right, 400 everywhere else."""

from __future__ import annotations

import contextlib
import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.serving import strict
from nanochat.serving.errors import ApiError
from nanochat.serving.strict import loads

PLAIN = st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False, allow_infinity=False)
TEXT = st.text(st.characters(exclude_categories=["Cs"]))
VALUES = st.recursive(PLAIN | TEXT, lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner), max_leaves=8)


@settings(max_examples=100, deadline=None)
@given(VALUES, st.booleans())
def test_json_is_read_as_it_was_written(value, ascii_only):
    assert loads(json.dumps(value, ensure_ascii=ascii_only).encode()) == value


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60) | st.text('[]{}",:\\u0d8 1eE+-.aNn', max_size=40).map(str.encode))
def test_all_else_is_refused_with_400(data):
    with contextlib.suppress(ApiError):  # anything else is a bug
        json.dumps(loads(data), allow_nan=False).encode()


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 60), st.text('ab[{"\\', max_size=8))
def test_nesting_is_counted_outside_of_strings(depth, text):
    data = (("[" * depth) + json.dumps(text) + ("]" * depth)).encode()
    if depth > strict.MAX_DEPTH:
        with pytest.raises(ApiError, match="nested"):
            loads(data)
    else:
        loads(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"NaN", "NaN"), (b"[-Infinity]", "Infinity"), (b"1e400", "too large"), (b"-1e999", "too large"),
        (b"9" * 31, "too large"), (b'"\\ud800"', "half a character"), (b'{"\\udfff": 1}', "half a character"),
        (b'{"a": 1, "a": 1}', "twice"), (b"\xff", "UTF-8"), (b"", "character 0"), (b"[1,]", "character"),
        (b"[" + b"1," * strict.MAX_VALUES + b"1]", "values"), (b"[" * 5000, "nested"),
    ],
)  # fmt: skip
def test_messages(data, message):
    with pytest.raises(ApiError) as error:
        loads(data)
    assert message in error.value.detail


def test_pairs_of_halves_are_characters():
    assert loads(b'"\\ud83d\\ude00"') == "\U0001f600"


@pytest.mark.parametrize("data", [b'"' + b"\\" * 999_999, b'\\"' * 500_000, b'"' * 999_999, b'"a' * 500_000])
def test_a_megabyte_of_quotes_takes_no_longer_than_any_other(data):
    began = time.process_time()
    with pytest.raises(ApiError):
        loads(data)
    assert time.process_time() - began < 2  # quadratic would be hours
