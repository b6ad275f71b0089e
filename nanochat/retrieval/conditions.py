"""Metadata filters as one types them: `lang=en year>=1990 part!=draft`, or JSON as filters.py describes it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from nanochat.errors import UsageError
from nanochat.retrieval.document import Filter
from nanochat.retrieval.filters import OWN_FIELDS, check
from nanochat.retrieval.jsonl import json_reason

_CONDITION = re.compile(r"([^=<>!]+)(>=|<=|!=|==?|>|<)([^=<>].*|)", re.DOTALL)
_OPERATORS = {"=": "in", "==": "in", "!=": "ne", ">": "gt", ">=": "gte", "<": "lt", "<=": "lte"}


def parse_conditions(texts: Sequence[str]) -> Filter | None:
    """The filter that all of the texts make together; None for none of them. Raises UsageError.

    A value is a number, true or false where it looks like one, and with `=` the text of that form matches too; in
    double quotes it is always a text. Several `=` for one key mean any of the values."""
    conditions: dict[str, dict[str, Any]] = {}
    for text in texts:
        if text.lstrip().startswith("{"):
            for key, condition in check(_json(text)).items():
                _join(conditions, key, condition)
            continue
        match = _CONDITION.fullmatch(text)
        if not match or not match[1].strip():
            raise UsageError(
                f"--filter {text!r}: expected key=value, key!=value, key>=value or such, or JSON; the query stands "
                "before --filter"
            )
        key, operator, value = match[1].strip(), _OPERATORS[match[2]], _value(match[1].strip(), match[3])
        both = [value] if isinstance(value, str) else [value, match[3]]
        _join(conditions, key, {operator: both if operator == "in" else value})
    return conditions or None


def _join(conditions: dict[str, dict[str, Any]], key: str, more: dict[str, Any]) -> None:
    known = conditions.setdefault(key, {})
    for operator, value in more.items():
        if operator == "in" and "in" in known:
            known["in"] = [*known["in"], *value]
        elif operator in known:
            raise UsageError(f"--filter: two conditions {operator!r} on {key!r}")
        else:
            known[operator] = value


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"--filter {text}: not JSON: {json_reason(error)}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--filter {text}: not JSON: {error}") from None


def _value(key: str, text: str) -> Any:
    if key not in OWN_FIELDS or text.startswith('"'):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return text
        if isinstance(value, str | int | float):
            return value
    return text
