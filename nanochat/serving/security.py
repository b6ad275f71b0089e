"""What stands before every request: who may ask, from where, how often and how much. Plain ASGI, around the whole app.

- Host allow-list: a foreign name that resolves to this computer (DNS rebinding) gets nothing.
- Origin: another site's page can neither read answers (no CORS headers) nor change anything (refused).
- Keys: every route but /health and the page's own files needs one, where there are any.
- Rate: a token bucket for each key, or address. Body: its size and the time it takes.
- Errors: what nobody expected is a plain 500; the log has the rest.
- Headers: a strict Content-Security-Policy, no sniffing, no framing, no referrer, no caching of answers.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import socket
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanochat.serving.errors import ApiError, from_exception
from nanochat.serving.markdown import CONTENT_SECURITY_POLICY
from nanochat.serving.settings import ServeSettings

OPEN_PATHS = ("/", "/health")
OPEN_PREFIX = "/static/"
LIMITED_PREFIX = "/v1/"  # what counts for the rate
READING = ("GET", "HEAD", "OPTIONS")
MAX_CLIENTS = 10_000  # whose rate is remembered

HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}


class Keys:
    """The keys that open the server. Comparing takes the same time whatever the key."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._hashes = [_hash(key) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._hashes)

    def find(self, given: str) -> str | None:
        """A name for the client with this key; None: no such key."""
        hashed, found = _hash(given), None
        for known in self._hashes:
            if hmac.compare_digest(hashed, known):
                found = known.hex()[:16]
        return found


class Rate:
    """A token bucket for each client: `per_minute` requests in a row, then as many a minute. 0: no limit."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_minute, self._clock = per_minute, clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # requests left, when

    def take(self, client: str) -> float:
        """0 when the client may go on; else the seconds until it may."""
        if not self.per_minute:
            return 0.0
        now, speed = self._clock(), self.per_minute / 60
        left, then = self._buckets.pop(client, (float(self.per_minute), now))
        left = min(float(self.per_minute), left + (now - then) * speed)
        wait = 0.0 if left >= 1 else (1 - left) / speed
        self._buckets[client] = (left if wait else left - 1, now)
        if len(self._buckets) > MAX_CLIENTS:
            self._buckets.popitem(last=False)
        return wait


class Guard:
    """The middleware."""

    def __init__(self, app: ASGIApp, settings: ServeSettings) -> None:
        self.app, self.settings = app, settings
        self.keys, self.rate = Keys(settings.keys()), Rate(settings.requests_per_minute)
        self.hosts = {"localhost", socket.gethostname().lower(), *(host.lower() for host in settings.allowed_hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        shared = origin if origin in self.settings.cors_origins else None

        begun = False

        async def dressed(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                _dress(MutableHeaders(scope=message), scope["path"], shared)
            await send(message)

        try:
            self._admit(scope, headers, shared)
            if scope["method"] == "OPTIONS" and shared:
                await Response(status_code=204)(scope, receive, dressed)
                return
            body = _Body(receive, self._limit(scope), self._seconds(scope))
            body.check(headers)
            await self.app(scope, body.receive, dressed)
        except Exception as error:
            failure = from_exception(error)
            if begun:  # too late to say so
                raise
            await failure.response()(scope, receive, dressed)

    def _admit(self, scope: Scope, headers: Headers, shared: str | None) -> None:
        """Raises ApiError for a request that may not pass. Leaves the client's name in the scope."""
        host = headers.get("host", "")
        if len(headers.getlist("host")) != 1 or not self._is_host(host):
            raise ApiError(403, "this server does not answer to that Host; see --allowed_hosts", code="invalid_host")
        if not shared and scope["method"] not in READING and _is_foreign(headers, host):
            raise ApiError(403, "another site's page may not do this; see --cors_origins", code="invalid_origin")
        path, client = scope["path"], scope.get("client")
        name = client[0] if client else "local"
        if shared and scope["method"] == "OPTIONS":
            return
        if self.keys and path not in OPEN_PATHS and not path.startswith(OPEN_PREFIX):
            kind, _, given = headers.get("authorization", "").partition(" ")
            found = self.keys.find(given.strip()) if kind.lower() == "bearer" else None
            if found is None:
                raise ApiError(401, "this server needs an API key: Authorization: Bearer KEY", code="invalid_api_key")
            name = found
        scope.setdefault("state", {})["client"] = name
        if path.startswith(LIMITED_PREFIX) and (wait := self.rate.take(name)):
            raise ApiError(429, "too many requests; slow down", code="rate_limit_exceeded", retry_after=wait)

    def _is_host(self, host: str) -> bool:
        """Addresses are safe: only names can be made to point here."""
        name = (host[: host.rfind("]") + 1] if host.startswith("[") else host.partition(":")[0]).lower().rstrip(".")
        try:
            ipaddress.ip_address(name.strip("[]"))
            return True
        except ValueError:
            return name in self.hosts

    def _is_upload(self, scope: Scope) -> bool:
        return scope["path"].startswith("/v1/knowledge_bases/") and scope["path"].endswith("/documents")

    def _limit(self, scope: Scope) -> int:
        megabytes = self.settings.max_upload_mb if self._is_upload(scope) else self.settings.max_body_mb
        return int(megabytes * (1 << 20)) + (1 << 14) * self._is_upload(scope)  # the frame around the file

    def _seconds(self, scope: Scope) -> float:
        return self.settings.idle_seconds * (10 if self._is_upload(scope) else 1)


class _Body:
    """The body of one request, counted and timed as it comes."""

    def __init__(self, receive: Receive, limit: int, seconds: float) -> None:
        self._receive, self._limit = receive, limit
        self._deadline = time.monotonic() + seconds if seconds else None
        self._n, self._more = 0, True

    def check(self, headers: Headers) -> None:
        """Raises ApiError for a body that says beforehand that it is too large."""
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self._limit:
            raise self._too_large()

    async def receive(self) -> Message:
        if not self._more:
            return await self._receive()
        try:
            left = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
            message = await asyncio.wait_for(self._receive(), left)
        except asyncio.TimeoutError:
            raise ApiError(408, "the request took too long to arrive", code="timeout") from None
        self._n += len(message.get("body", b""))
        self._more = message["type"] == "http.request" and message.get("more_body", False)
        if self._n > self._limit:
            raise self._too_large()
        return message

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the request is larger than {self._limit:,} bytes", code="too_large")


def _dress(headers: MutableHeaders, path: str, shared: str | None) -> None:
    for name, value in HEADERS.items():
        headers[name] = value
    headers.setdefault("Cache-Control", "no-cache" if path.startswith(OPEN_PREFIX) else "no-store")
    if shared:
        headers["Access-Control-Allow-Origin"] = shared
        headers["Access-Control-Allow-Methods"] = "GET, POST, DELETE"
        headers["Access-Control-Allow-Headers"] = "Authorization, Content-Type"
        headers["Access-Control-Max-Age"] = "600"
        headers["Cross-Origin-Resource-Policy"] = "cross-origin"
        headers.add_vary_header("Origin")


def _is_foreign(headers: Headers, host: str) -> bool:
    """Whether a browser says that another site's page sends this."""
    if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        return True
    origin = headers.get("origin")
    return origin is not None and _place(urlsplit(origin).netloc) != _place(host)


def _place(netloc: str) -> str:
    return netloc.lower().removesuffix(":80").removesuffix(":443")


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
