"""Metadata filters: which documents may be found.

    {"lang": "en"}                         equal; a field that is a list matches when it holds the value
    {"lang": ["en", "de"]}                 any of these
    {"year": {"gte": 1990, "lt": 2000}}    comparisons: eq, ne, gt, gte, lt, lte, in; numbers or texts
    {"lang": "en", "year": {"gt": 1990}}   all of them

Keys are those of the metadata's first level, or `id`, `title` and `source`. A number is compared with numbers and a
text with texts (by code points); true and false are 1 and 0. Of a list, one element must pass all of the comparisons,
and none may equal the value of `ne`. A key without a value (missing, null, an empty list or text, an object) never
matches.

`matches` is the definition, in plain Python; `sql` is the same question for a segment of the store.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from nanochat.errors import UsageError
from nanochat.retrieval.document import Document, Filter, clean_text

OWN_FIELDS = ("id", "title", "source")  # of the document itself; the rest are metadata
LARGEST = 2**63  # an integer beyond 64 bits is compared as a float
_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "gt": operator.gt,
    "gte": operator.ge,
    "lt": operator.lt,
    "lte": operator.le,
}
MOST_PARAMETERS = 500  # of a query
_SIGNS = {"eq": "=", "gt": ">", "gte": ">=", "lt": "<", "lte": "<="}
OPERATORS = ("eq", "ne", "in", *_COMPARE)

Condition = dict[str, Any]  # operator -> operand, operands made comparable


def check(filter: Filter | None) -> dict[str, Condition]:
    """The filter in one form: {key: {operator: operand}}. Raises UsageError for what is no filter."""
    if filter is None:
        return {}
    if not isinstance(filter, Mapping):
        raise UsageError(f'a filter is a mapping like {{"key": value}}, not {filter!r}')
    conditions: dict[str, Condition] = {}
    for key, wanted in filter.items():
        if not isinstance(key, str):
            raise UsageError(f"filter key {key!r} is no text")
        if not isinstance(wanted, Mapping):
            wanted = {"in" if _is_list(wanted) else "eq": wanted}
        if not wanted:
            raise UsageError(f"filter on {key!r} is empty: give a value, a list, or comparisons {', '.join(OPERATORS)}")
        conditions[clean_text(key)] = {name: _operand(key, name, value) for name, value in wanted.items()}
    return conditions


def _operand(key: str, name: Any, value: Any) -> Any:
    if name not in OPERATORS:
        raise UsageError(f"filter on {key!r}: unknown comparison {name!r}; choose from {', '.join(OPERATORS)}")
    if name == "in":
        if not _is_list(value):
            raise UsageError(f"filter on {key!r}: `in` takes a list of values, not {value!r}")
        return [_operand(key, "eq", one) for one in value]
    found = comparable(value)
    if isinstance(value, int) and isinstance(found, float) and math.isfinite(found) and int(found) != value:
        raise UsageError(
            f"filter on {key!r}: {value} takes more than 64 bits, and neighbours of numbers so large are not told "
            "apart; store such ids as texts, and ask for them as texts"
        )
    if found is None:
        raise UsageError(f"filter on {key!r}: cannot compare with {value!r}; use a number, a text, true or false")
    return found


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple | set | frozenset)


def comparable(value: Any) -> int | float | str | None:
    """A JSON scalar as what filters compare: text, int within 64 bits, or float; None for anything else."""
    if isinstance(value, str):
        return clean_text(value)
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, int):
        try:
            return value if -LARGEST <= value < LARGEST else float(value)
        except OverflowError:
            return float("inf") if value > 0 else float("-inf")
    if isinstance(value, float) and value == value:
        return value
    return None


def field_values(value: Any) -> list[int | float | str]:
    """What filters see of a metadata value: its scalars; nothing for null, objects and empty texts."""
    found = [comparable(one) for one in (value if isinstance(value, list | tuple) else (value,))]
    return [one for one in found if one is not None and one != ""]


def matches(document: Document, conditions: Mapping[str, Condition]) -> bool:
    """Whether a document passes; `conditions` come from `check`."""
    for key, condition in conditions.items():
        raw = getattr(document, key) if key in OWN_FIELDS else document.metadata.get(key)
        values = field_values(raw)
        positive = {name: operand for name, operand in condition.items() if name != "ne"}
        if not any(all(_passes(value, name, operand) for name, operand in positive.items()) for value in values):
            return False
        if "ne" in condition and condition["ne"] in values:
            return False
    return True


def _passes(value: Any, name: str, operand: Any) -> bool:
    if name == "eq":
        return bool(value == operand)
    if name == "in":
        return value in operand
    return isinstance(value, str) == isinstance(operand, str) and _COMPARE[name](value, operand)


def sql(key: str, condition: Condition) -> Iterator[tuple[str, list[Any]]]:
    """Queries, with their parameters, for the first rows of the documents of a segment (store.py) that pass the
    condition: each gives some of them, together they give all."""
    if key in OWN_FIELDS:
        table, column, exists, names = "documents", key, f"{key} != ''", []
        condition = _of_texts(condition)
    else:
        table, column, exists, names = "fields", "value", "key = (SELECT key FROM keys WHERE name = ?)", [key]
    positive = {name: operand for name, operand in condition.items() if name not in ("ne", "in")}
    tests, operands = _tests(column, positive)
    query = f"SELECT row FROM {table} WHERE {' AND '.join([exists, *tests])}"
    values = [*names, *operands]
    among = condition.get("in")
    for start in range(0, 1 if among is None else len(among), MOST_PARAMETERS):
        part = [] if among is None else among[start : start + MOST_PARAMETERS]
        one = query + (f" AND {column} IN ({', '.join('?' * len(part))})" if part else "")
        if "ne" in condition:
            one = f"{one} EXCEPT SELECT row FROM {table} WHERE {exists} AND {column} = ?"
            yield one, [*values, *part, *names, condition["ne"]]
        else:
            yield one, [*values, *part]


def _of_texts(condition: Condition) -> Condition:
    """The condition on a field that holds texts only, without numbers: SQLite would compare these as their digits, for
    the column's text affinity, but a number is no text and compares with none. An empty list matches nothing."""
    kept: Condition = {}
    for name, operand in condition.items():
        if name == "in":
            kept["in"] = [one for one in operand if isinstance(one, str)]
        elif isinstance(operand, str):
            kept[name] = operand
        elif name != "ne":
            return {"in": []}
    return kept


def _tests(column: str, condition: Condition) -> tuple[list[str], list[Any]]:
    """In SQLite every number is less than every text; the second bound keeps a comparison within its kind."""
    tests: list[str] = []
    values: list[Any] = []
    for name, operand in condition.items():
        tests.append(f"{column} {_SIGNS[name]} ?")
        values.append(operand)
        is_text = isinstance(operand, str)
        if name != "eq" and is_text == (name in ("lt", "lte")):
            tests.append(f"{column} {'>=' if is_text else '<'} ''")
    return tests, values
