"""Filters as one types them."""

import pytest

from nanochat.errors import UsageError
from nanochat.retrieval.conditions import parse_conditions
from nanochat.retrieval.document import Document
from nanochat.retrieval.filters import check, matches

DOCUMENTS = [
    {"id": "moon", "title": "The Moon", "content": "The Moon has no air. Its days last a month.", "year": 1969},
    {"id": "mars", "title": "Mars", "content": "Mars has thin air and two moons.", "year": 1976, "kind": "planet"},
    {"id": "a/../b c", "content": "Bread is baked from flour, water, salt and yeast.", "kind": "food"},
]


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["kind=planet"], ["mars"]),
        (["kind!=planet"], ["a/../b c"]),
        (["year=1969"], ["moon"]),
        (['year="1969"'], []),
        (["year>=1969", "year<1976"], ["moon"]),
        (["year==1976"], ["mars"]),
        (["year>1969"], ["mars"]),
        (["kind=planet", "kind=food"], ["mars", "a/../b c"]),
        (['{"kind": ["planet", "food"]}', "year<=1976"], ["mars"]),
        (["id=a/../b c"], ["a/../b c"]),
        (["title=The Moon"], ["moon"]),
        (["nothing=1"], []),
    ],
)
def test_conditions(texts: list[str], expected: list[str]) -> None:
    conditions = check(parse_conditions(texts))
    documents = [
        Document(d["id"], d["content"], d.get("title", ""), metadata={k: d[k] for k in ("year", "kind") if k in d})
        for d in DOCUMENTS
    ]
    assert [d.id for d in documents if matches(d, conditions)] == expected


@pytest.mark.parametrize("text", ["=x", "", "year=>5", "{}x", '{"a": {}}', '{"a": {"b": 1}}', "[1]"])
def test_what_is_no_condition(text: str) -> None:
    with pytest.raises(UsageError):
        check(parse_conditions([text]))


def test_two_bounds_of_a_kind() -> None:
    with pytest.raises(UsageError, match="two conditions"):
        parse_conditions(["year>1", "year>2"])
    assert parse_conditions([]) is None
