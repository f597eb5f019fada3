"""Checks each request's host, key, rate and size before the application; adds headers and logs after it.

The log has the route's pattern, the status, the seconds and the key's name. It never has a URL, a query
string or a text, because these may name a patient.
"""

from __future__ import annotations

import asyncio
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request, cookie_parser
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from normtune.serving.engine.requests import Busy
from normtune.serving.http.errors import CLIENT_CLOSED_REQUEST, LOG, RequestRefused, to_refusal
from normtune.serving.http.limits import RateLimiter
from normtune.serving.http.prometheus import ServerMetrics
from normtune.serving.http.state import Service

COOKIE = "normtune"  # lets a browser follow links to review pages
BATCH = "/v1/batch"
CHAT = "/v1/chat/completions"
# The server reads and discards a refused body up to this many times the limit: most clients read the response
# only after they have sent the whole body.
_DISCARD_FACTOR = 4
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
# Response headers, unless the application sets its own.
_HEADERS = {
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


class RequestGate:
    """An ASGI application that checks requests and passes accepted ones to another application.

    Args:
        service: the limits, keys, accepted hosts and memory budget. A server on loopback without keys accepts
            only loopback names as Host, so that a web page cannot reach it through its own domain (DNS
            rebinding).
    """

    def __init__(self, app: ASGIApp, service: Service, metrics: ServerMetrics) -> None:
        self._app, self._limits, self._budget, self._metrics = app, service.limits, service.budget, metrics
        self._keys, self._hosts = service.settings.keys, service.settings.hosts
        self._rates = RateLimiter(self._limits.per_minute, self._limits.burst)
        self._questions = 0  # requests to CHAT that are in progress

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._request(scope, receive, send)
        elif scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1003})

    async def _request(self, scope: Scope, receive: Receive, send: Send) -> None:
        started, status, reserved, counted = time.monotonic(), 0, 0, False
        scope["state"] = dict(scope.get("state") or {}, owner="")
        # HEAD is answered wherever GET is; `scope` keeps the method, by which the ASGI server drops the body.
        app_scope = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            refused = None
            try:
                self._check(scope)
            except RequestRefused as error:
                refused = error
            body = await self._body(scope, receive, refused)
            reserved = len(body)
            if scope["path"] == CHAT:
                self._questions += 1
                counted = True
            await self._app(app_scope, _replay(body, receive), send_with_headers)
        except ClientDisconnect:
            status = CLIENT_CLOSED_REQUEST
        except asyncio.CancelledError:
            status = status or 503
            raise
        except Exception as error:
            response = to_refusal(error).response()
            if status == 0:  # no response has started
                await response(scope, receive, send_with_headers)
        finally:
            self._budget.release(reserved)
            self._questions -= counted
            seconds = time.monotonic() - started
            route = getattr(app_scope.get("route"), "path", "-")
            self._metrics.count_request(scope["method"] if route != "-" else "-", route, status, seconds)
            owner = scope["state"]["owner"] or "-"
            LOG.info("%s %s %d %.3fs %s", scope["method"][:8], route, status, seconds, owner)

    def _check(self, scope: Scope) -> None:
        """Check a request by its headers, and set the key's name as the owner of the request.

        Raises:
            RequestRefused: the request is not accepted.
        """
        headers = dict(Headers(scope=scope).items())
        if self._hosts is not None and _host(headers.get("host", "")) not in self._hosts:
            raise RequestRefused(421, "this host name is not accepted. Use the address that the server printed.")
        if len(scope["path"]) > 512 or len(scope.get("query_string", b"")) > 2048:
            raise RequestRefused(414, "the URL is too long.")
        path = scope["path"]
        if not path.startswith(("/v1/", "/reviews")):
            return
        client = (scope.get("client") or ("-", 0))[0]
        if not self._keys:
            # A page of another site can send simple requests, even though it cannot read the responses.
            if headers.get("sec-fetch-site", "none") == "cross-site" and scope["method"] not in _SAFE_METHODS:
                raise RequestRefused(403, "requests from pages of other sites are not accepted.")
            self._rates.count_request(client)
        else:
            owner = self._owner(headers, path)
            if owner is None:
                self._rates.count_request(f"unknown {client}")
                raise RequestRefused(401, "an API key is required: Authorization: Bearer KEY.", code="invalid_api_key")
            scope["state"]["owner"] = owner
            self._rates.count_request(owner)
        if path == CHAT and self._questions >= self._limits.questions:
            raise to_refusal(Busy())  # before its image is read and decoded, so that refusing costs little

    def _owner(self, headers: dict[str, str], path: str) -> str | None:
        kind, _, key = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and key:
            return self._keys.owner(key.strip())
        if path.startswith("/reviews"):  # a browser that follows a link sends no Authorization header
            return self._keys.cookie_owner(cookie_parser(headers.get("cookie", "")).get(COOKIE, ""))
        return None

    async def _body(self, scope: Scope, receive: Receive, refused: RequestRefused | None) -> bytes:
        """Read the whole body, and reserve its size in the budget.

        The body of a refused request is read and discarded, up to a few times the limit: a client that is still
        sending would not read the response.

        Args:
            refused: the error of a request that is already refused.

        Raises:
            RequestRefused: `refused`, or the body is too large or too slow, or the budget is used up.
        """
        max_bytes = self._limits.batch_bytes if scope["path"] == BATCH else self._limits.body_bytes
        seconds = self._limits.body_s if refused is None else min(self._limits.body_s, 10.0)
        chunks: list[bytes] = []
        size = reserved = 0
        try:
            async with asyncio.timeout(seconds):
                async for chunk in Request(scope, receive).stream():
                    size += len(chunk)
                    try:
                        if size > max_bytes:
                            raise RequestRefused(413, f"the request has more than {max_bytes >> 20} MiB.")
                        if refused is None:
                            self._budget.reserve(len(chunk))
                            reserved += len(chunk)
                            chunks.append(chunk)
                    except RequestRefused as error:
                        refused = refused or error
                    if size > max_bytes + _DISCARD_FACTOR * self._limits.body_bytes:
                        break
            if refused is not None:
                raise refused
        except BaseException as error:
            self._budget.release(reserved)
            if isinstance(error, TimeoutError):
                raise refused or RequestRefused(408, "the request body did not arrive in time.") from None
            raise
        return b"".join(chunks)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that first returns a body that was already read, then the server's own messages.

    After the body, the only message is that the client disconnected.
    """
    unread: list[bytes] = [body]

    async def replayed() -> Message:
        if unread:
            return {"type": "http.request", "body": unread.pop(), "more_body": False}
        return await receive()

    return replayed


def _host(header: str) -> str:
    """Return a Host header without its port, in lower case."""
    if header.startswith("["):
        return header.partition("]")[0] + "]"
    return header.partition(":")[0].lower()
