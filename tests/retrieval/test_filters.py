"""Filters: SQLite's answer equals the definition in Python, on whatever metadata and conditions."""

import sqlite3
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nanochat.errors import UsageError
from nanochat.retrieval.document import Document
from nanochat.retrieval.filters import MOST_PARAMETERS, check, comparable, field_values, matches, sql

SCALARS = st.one_of(
    st.sampled_from(["a", "b", "ab", "B", "é", "\U0001f600", "1", ""]),
    st.sampled_from([0, 1, 2, -1, 10, 2**53, 2**53 + 1, 2**63 - 1, 2**63, 2**70, -(2**63), 10**400]),
    st.sampled_from([0.0, -0.0, 1.0, 1.5, -2.5, float(2**53), 1e300]),
    st.booleans(),
)
VALUES = st.one_of(SCALARS, st.lists(SCALARS, max_size=3), st.none(), st.just({"deep": 1}))
METADATA = st.dictionaries(st.sampled_from(["x", "y", "title"]), VALUES, max_size=3)
DOCUMENTS = st.builds(
    Document,
    st.sampled_from(["1", "a", "../b"]),
    st.just(""),
    st.sampled_from(["", "a", "B"]),
    st.sampled_from(["", "s"]),
    METADATA,
)
COMPARISONS = st.dictionaries(
    st.sampled_from(["eq", "ne", "gt", "gte", "lt", "lte"]), SCALARS, min_size=1, max_size=3
) | st.fixed_dictionaries({"in": st.lists(SCALARS, max_size=3)}, optional={"ne": SCALARS})
CONDITIONS = SCALARS | st.lists(SCALARS, max_size=3) | COMPARISONS
FILTERS = st.dictionaries(st.sampled_from(["x", "y", "id", "title", "source"]), CONDITIONS, max_size=2)


@pytest.fixture(scope="module")
def database() -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(":memory:")
    connection.executescript(
        "CREATE TABLE documents (row INTEGER PRIMARY KEY, id TEXT, title TEXT, source TEXT);"
        "CREATE TABLE keys (key INTEGER PRIMARY KEY, name TEXT UNIQUE);"
        "INSERT INTO keys VALUES (0, 'x'), (1, 'y'), (2, 'title');"
        "CREATE TABLE fields (key INTEGER, value, row INTEGER, PRIMARY KEY (key, value, row)) WITHOUT ROWID;"
    )
    yield connection
    connection.close()


def by_sql(database: sqlite3.Connection, documents: list[Document], filter: dict[str, Any]) -> set[int]:
    database.execute("DELETE FROM documents")
    database.execute("DELETE FROM fields")
    for row, document in enumerate(documents):
        values = (row, document.id, document.title, document.source)
        database.execute("INSERT INTO documents VALUES (?, ?, ?, ?)", values)
        for key, value in document.metadata.items():
            for one in field_values(value):
                number = ["x", "y", "title"].index(key)
                database.execute("INSERT OR IGNORE INTO fields VALUES (?, ?, ?)", (number, one, row))
    found = set(range(len(documents)))
    for key, condition in check(filter).items():
        found &= {row for query, values in sql(key, condition) for (row,) in database.execute(query, values)}
    return found


@example([Document("1", "")], {"id": 1})
@example([Document("1", "")], {"id": [1, "2"]})
@example([Document("1", "", "5")], {"title": {"lt": 6}})
@example([Document("a", "")], {"id": {"lt": 5, "in": ["a"]}})
@example([Document("1", "", "5")], {"title": {"gte": 4, "ne": 5}})
@given(st.lists(DOCUMENTS, max_size=4), FILTERS)
def test_sql_equals_the_definition(database: sqlite3.Connection, documents: list[Document], filter: dict) -> None:
    expected = {row for row, document in enumerate(documents) if matches(document, check(filter))}
    assert by_sql(database, documents, filter) == expected


def test_long_lists_are_asked_in_parts(database: sqlite3.Connection) -> None:
    documents = [Document("a", "", metadata={"x": i}) for i in (3, MOST_PARAMETERS + 5, 5000)]
    wanted = list(range(2 * MOST_PARAMETERS))
    assert by_sql(database, documents, {"x": wanted}) == {0, 1}
    assert by_sql(database, documents, {"x": {"in": wanted, "ne": 3}}) == {1}


EXAMPLE = Document("d", "", "Moon", "book", {"year": 1969, "tags": ["a", "b"], "no": None, "none": [], "flag": True})


@pytest.mark.parametrize(
    ("filter", "passes"),
    [
        ({"year": 1969}, True),
        ({"year": 1969.0}, True),
        ({"year": "1969"}, False),
        ({"year": [1968, 1969]}, True),
        ({"year": []}, False),
        ({"year": {"gte": 1969, "lt": 1970}}, True),
        ({"year": {"gt": 1969}}, False),
        ({"year": {"gt": "1"}}, False),
        ({"tags": "b"}, True),
        ({"tags": {"ne": "b"}}, False),
        ({"tags": {"ne": "c"}}, True),
        ({"tags": {"gt": "a", "lt": "b"}}, False),
        ({"missing": {"ne": 1}}, False),
        ({"no": {"ne": 1}}, False),
        ({"none": {"ne": 1}}, False),
        ({"flag": 1}, True),
        ({"id": "d", "title": "Moon", "source": ["x", "book"]}, True),
        ({"id": "d", "title": "Sun"}, False),
        ({}, True),
    ],
)
def test_what_passes(filter: dict, passes: bool) -> None:
    assert matches(EXAMPLE, check(filter)) is passes


@pytest.mark.parametrize(
    "bad",
    ["x", {"x": None}, {"x": {}}, {"x": {"above": 1}}, {"x": {"gt": [1]}}, {"x": [[1]]}, {"x": {"in": 1}}, {1: 2},
     {"x": float("nan")}, {"x": object()}],
)  # fmt: skip
def test_what_is_no_filter_is_refused(bad: Any) -> None:
    with pytest.raises(UsageError, match="filter"):
        check(bad)


def test_comparable_stays_within_sqlite() -> None:
    assert comparable(True) == 1
    assert comparable(2**64) == 2.0**64
    assert check({"h": 2**64}) == {"h": {"eq": 2.0**64}}
    for filter in ({"h": 2**64 - 1}, {"h": {"gt": 2**64 - 2}}, {"h": [1, -(2**63) - 1]}):
        with pytest.raises(UsageError, match=r"filter on 'h': -?[0-9]+ takes more than 64 bits.*as texts"):
            check(filter)
    assert comparable(-(10**400)) == -np.inf
    assert comparable(float("nan")) is None
    assert comparable({}) is None
