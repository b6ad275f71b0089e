"""One-line descriptions of corpora and tasks: `name:key=value,key=value`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from nanochat.errors import UsageError


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint with the nearest known word, or with all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known are: {', '.join(known)}"


def split_spec(spec: str) -> tuple[str, dict[str, str]]:
    """`"a:b=c,d=e"` as `("a", {"b": "c", "d": "e"})`. A value ends at the next comma, so it holds none itself."""
    name, _, rest = spec.partition(":")
    options: dict[str, str] = {}
    for item in filter(None, rest.split(",")):
        key, equals, value = item.partition("=")
        if not equals or not key.strip() or not value.strip():
            raise UsageError(f"{spec!r}: expected key=value, got {item!r}")
        if key.strip() in options:
            raise UsageError(f"{spec!r}: {key.strip()!r} is given twice")
        options[key.strip()] = value.strip()
    return name.strip(), options


def read_options(spec: str, options: Mapping[str, str], kinds: Mapping[str, type]) -> dict[str, Any]:
    """The options converted to the types that `kinds` names. Raises UsageError for unknown names and bad values."""
    result: dict[str, Any] = {}
    for key, value in options.items():
        if key not in kinds:
            raise UsageError(f"{spec!r}: unknown option {key!r}; {nearest(key, kinds)}")
        try:
            result[key] = kinds[key](value)
        except ValueError:
            raise UsageError(f"{spec!r}: {key}={value!r} is not {_SAID[kinds[key]]}") from None
    return result


_SAID: dict[type, str] = {int: "a whole number", float: "a number", str: "a text"}
