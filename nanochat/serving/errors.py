"""What goes wrong, as clients see it: OpenAI's error object, without paths, stack traces or echoes of the input.

    {"error": {"message": "...", "type": "invalid_request_error", "param": "temperature", "code": null}}
"""

from __future__ import annotations

import math
import re
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from nanochat.errors import NanochatError, UsageError
from nanochat.runtime import log

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}
_PATH = re.compile(r"(?<![\w.])(?:[A-Za-z]:)?[\\/](?:[^\s\\/:'\",;()]+[\\/])*([^\s\\/:'\",;()]*)")
_EXTRA = "Unrecognized request argument"


class ApiError(HTTPException):
    """An answer other than 200. `param`: the field at fault; `code`: a name for programs; `retry_after`: seconds."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None, retry_after: float = 0.0
    ) -> None:
        headers = {"Retry-After": str(max(1, math.ceil(retry_after)))} if retry_after else {}
        if status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        super().__init__(status, message, headers or None)
        self.body = error_body(status, message, code, param)

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status_code, headers=dict(self.headers or {}))


def error_body(status: int, message: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    kind = TYPES.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def without_paths(message: str) -> str:
    """The message with each absolute path shortened to its last name."""
    return _PATH.sub(lambda match: match[1] or "…", message)


def from_exception(error: Exception) -> ApiError:
    """What a failure inside the library means to a client: 429 when it says when to come back, 400 for a wrong call,
    and 500 for all the rest, which the log explains."""
    if isinstance(error, ApiError):
        return error
    retry_after = getattr(error, "retry_after", None)
    if retry_after is not None:
        return ApiError(429, str(error), code="overloaded", retry_after=float(retry_after))
    if isinstance(error, UsageError):
        return ApiError(400, without_paths(str(error)).replace("--", ""))
    log.error("a request failed: %s", error, exc_info=None if isinstance(error, NanochatError) else error)
    return ApiError(500, "the server could not do this; its log says why", code="internal_error")


def install(app: FastAPI) -> None:
    """Every error of this application in that form."""

    async def http(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        if isinstance(error, ApiError):
            return error.response()
        body = error_body(error.status_code, str(error.detail))
        return JSONResponse(body, error.status_code, headers=dict(error.headers or {}))

    async def invalid(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return _invalid(error).response()

    async def nanochat(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, NanochatError)
        return from_exception(error).response()

    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(NanochatError, nanochat)


def _invalid(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong with the fields of a request."""
    first = error.errors()[0]
    where = [str(part) for part in first["loc"][1:] if not str(part).startswith(("list[", "function-", "constrained"))]
    param = ".".join(where)[:200].encode("utf-8", "replace").decode()
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{_EXTRA} supplied: {param}", param=param, code="unknown_parameter")
    if first["type"] == "missing":
        return ApiError(400, f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter")
    message = str(first["msg"]).removeprefix("Value error, ")
    return ApiError(400, f"Invalid '{param}': {message}" if param else message, param=param or None)
