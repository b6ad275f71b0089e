"""JSON bodies, read strictly: what is no JSON, or too much of it, is refused before objects are made of it.

Python's own reader takes NaN and Infinity, makes infinity of 1e400, halves of characters of \\ud800, and dies of deep
nesting; FastAPI turns some of these into an internal error.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from nanochat.serving.errors import ApiError

MAX_DEPTH = 32
MAX_VALUES = 50_000  # commas and brackets outside of strings
MAX_DIGITS = 30
_STRING = re.compile(rb'"[^"]*"?')
_STRUCTURE = re.compile(rb"[][{},]")
_HALF_CHARACTER = re.compile(rb"\\u[dD][89a-fA-F]")


def loads(data: bytes) -> Any:
    """The value of a JSON text in UTF-8. Raises ApiError (400)."""
    _check_size(data)
    try:
        value = json.loads(
            data.decode("utf-8"),
            parse_constant=_refuse,
            parse_float=_finite,
            parse_int=_whole,
            object_pairs_hook=_object,
        )
        if _HALF_CHARACTER.search(data):
            _check_text(value)
    except UnicodeDecodeError as error:
        raise _bad(f"not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise _bad(f"{error.msg.rstrip(': ').removesuffix(' at')} at character {error.pos}") from None
    except (ValueError, RecursionError) as error:
        raise _bad(str(error)) from None
    return value


class StrictRequest(Request):
    """A request whose JSON is read by `loads`."""

    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            self._json = loads(await self.body())
        return self._json


class StrictRoute(APIRoute):
    """A route whose requests are StrictRequests."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def strict(request: Request) -> Response:
            return await handler(StrictRequest(request.scope, request.receive))

        return strict


def _check_size(data: bytes) -> None:
    """Nesting and number of values. Strings go first, each step in linear time, whatever the text."""
    bare = _STRING.sub(b"", data.replace(b"\\\\", b"").replace(b'\\"', b""))
    depth = 0
    for n, match in enumerate(_STRUCTURE.finditer(bare)):
        mark = match[0]
        if mark in b"[{":
            depth += 1
        elif mark in b"]}":
            depth -= 1
        if depth > MAX_DEPTH:
            raise _bad(f"nested deeper than {MAX_DEPTH} levels")
        if n >= MAX_VALUES:
            raise _bad(f"more than {MAX_VALUES} values")


def _check_text(value: Any) -> None:
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError("half a character (a lone surrogate)") from None
    elif isinstance(value, dict):
        for key, inner in value.items():
            _check_text(key)
            _check_text(inner)
    elif isinstance(value, list):
        for inner in value:
            _check_text(inner)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("an object names a key twice")
    return made


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("a number is too large")
    return number


def _whole(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError("a number is too large")
    return int(text)


def _bad(why: str) -> ApiError:
    return ApiError(400, f"the body is not valid JSON: {why}", code="invalid_json")
