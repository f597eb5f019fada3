"""What every request passes: host, key, rate and size before the application, headers and log after it.

The log has the route's pattern, status, seconds and the key's name: no address asked for, no query, no text.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterable
from http.cookies import CookieError, SimpleCookie
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from normtune.serving.engine.requests import Busy
from normtune.serving.http.errors import GONE, LOG, ClientGone, RequestRefused, refusal
from normtune.serving.http.limits import ApiKeys, Budget, Limits, Rates
from normtune.serving.http.prometheus import Counts

COOKIE = "normtune"
BATCH = "/v1/batch"
CHAT = "/v1/chat/completions"
_PATIENCE = 4  # times the limit are read of a body that is refused: its client reads when it has written
_SAFE = ("GET", "HEAD", "OPTIONS")
_HEADERS = {
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


class RequestGate:
    """An ASGI application around another one.

    Args:
        hosts: names that requests may be addressed to, None for any. A server on loopback without keys takes
            its own names alone: a page elsewhere could otherwise reach it under a name of its own (DNS
            rebinding).
    """

    def __init__(
        self, app: ASGIApp, *, keys: ApiKeys, limits: Limits, budget: Budget, hosts: Iterable[str] | None
    ) -> None:
        self._app, self._keys, self._limits, self._budget = app, keys, limits, budget
        self._hosts = None if hosts is None else frozenset(hosts)
        self._rates = Rates(limits.per_minute, limits.burst)
        self._questions = 0  # that have arrived and are not answered
        self.counts = Counts()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._request(scope, receive, send)
        elif scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1003})

    async def _request(self, scope: Scope, receive: Receive, send: Send) -> None:
        started, status, taken, counted = time.monotonic(), 0, 0, False
        scope["state"] = dict(scope.get("state") or {}, owner="")

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": _with_defaults(message["headers"])}
            await send(message)

        try:
            try:
                self._admit(scope)
            except RequestRefused:
                await self._discard(receive)  # a client that still writes would not read the answer
                raise
            body = await self._body(scope, receive)
            taken = len(body)
            if scope["path"] == CHAT:
                self._questions += 1
                counted = True
            await self._app(scope, _replay(body, receive), answer)
        except ClientGone:
            status = GONE
        except asyncio.CancelledError:
            status = status or 503
            raise
        except Exception as error:
            refused = refusal(error)
            if status == 0:
                await send_refusal(refused, answer)
        finally:
            self._budget.give(taken)
            self._questions -= counted
            seconds = time.monotonic() - started
            route = getattr(scope.get("route"), "path", "-")
            self.counts.add(scope["method"] if route != "-" else "-", route, status, seconds)
            owner = scope["state"]["owner"] or "-"
            LOG.info("%s %s %d %.3fs %s", scope["method"][:8], route, status, seconds, owner)

    def _admit(self, scope: Scope) -> None:
        """Tell whose request it is, and let it in. Raises: Refused."""
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        if self._hosts is not None and _host(headers.get("host", "")) not in self._hosts:
            raise RequestRefused(421, "this server is not called by that name. Use the address it printed.")
        if len(scope["path"]) > 512 or len(scope.get("query_string", b"")) > 2048:
            raise RequestRefused(414, "the address is too long.")
        path = scope["path"]
        if not path.startswith(("/v1/", "/reviews")):
            return
        client = (scope.get("client") or ("-", 0))[0]
        if not self._keys:
            # a page of another site may send simple requests, though it cannot read the answers
            if headers.get("sec-fetch-site", "none") == "cross-site" and scope["method"] not in _SAFE:
                raise RequestRefused(403, "requests from pages of other sites are refused.")
            self._rates.take(client)
        else:
            owner = self._owner(headers, path)
            if owner is None:
                self._rates.take(f"unknown {client}")
                raise RequestRefused(
                    401, "a key is needed: Authorization: Bearer KEY.", code="invalid_api_key"
                )
            scope["state"]["owner"] = owner
            self._rates.take(owner)
        if path == CHAT and self._questions >= self._limits.questions:
            raise refusal(Busy())  # before its image is decoded: what is refused must cost next to nothing

    def _owner(self, headers: dict[str, str], path: str) -> str | None:
        kind, _, key = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and key:
            return self._keys.owner(key.strip())
        if path.startswith("/reviews"):  # a browser that follows a link sends no Authorization
            try:
                found = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
            except CookieError:
                return None
            return None if found is None else self._keys.cookie_owner(found.value)
        return None

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """The whole body, set aside in the budget. Raises: Refused."""
        most = self._limits.batch_bytes if scope["path"] == BATCH else self._limits.body_bytes
        pieces: list[bytes] = []
        size = taken = 0
        refused: RequestRefused | None = None
        try:
            async with asyncio.timeout(self._limits.body_s):
                async for piece in _pieces(receive):
                    size += len(piece)
                    if refused is None:
                        refused = self._too_much(size, most, len(piece))
                    if refused is None:
                        taken += len(piece)
                        pieces.append(piece)
                    elif size > most + _PATIENCE * self._limits.body_bytes:
                        break
        except TimeoutError:
            refused = refused or RequestRefused(408, "the request did not arrive in time.")
        except BaseException:
            self._budget.give(taken)
            raise
        if refused is not None:
            self._budget.give(taken)
            raise refused
        return b"".join(pieces)

    def _too_much(self, size: int, most: int, more: int) -> RequestRefused | None:
        """Set `more` bytes aside, or tell why not."""
        if size > most:
            return RequestRefused(413, f"the request has more than the {most >> 20} MiB that are taken.")
        try:
            self._budget.take(more)
        except RequestRefused as refused:
            return refused
        return None

    async def _discard(self, receive: Receive) -> None:
        """Read what the client still sends, a few times the limit at most, and forget it."""
        left = _PATIENCE * self._limits.body_bytes
        try:
            async with asyncio.timeout(min(self._limits.body_s, 10.0)):
                async for piece in _pieces(receive):
                    left -= len(piece)
                    if left < 0:
                        return
        except (TimeoutError, ClientGone):
            return


async def _pieces(receive: Receive) -> Any:
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        yield message.get("body", b"")
        if not message.get("more_body", False):
            return


def _replay(body: bytes, receive: Receive) -> Receive:
    """`receive` of a body that is there; after it, what the server tells: that the client has gone."""
    held: list[bytes] = [body]

    async def again() -> Message:
        if held:
            return {"type": "http.request", "body": held.pop(), "more_body": False}
        return await receive()

    return again


def _host(header: str) -> str:
    """The name of a Host header, without its port."""
    if header.startswith("["):
        return header.partition("]")[0] + "]"
    return header.partition(":")[0].lower()


def _with_defaults(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    found = list(headers)
    there = {name.lower() for name, _ in found}
    more = ((name.encode(), value.encode()) for name, value in _HEADERS.items())
    return found + [(name, value) for name, value in more if name not in there]


async def send_refusal(refused: RequestRefused, send: Send) -> None:
    """Send the error object."""
    body = json.dumps(refused.body()).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body))} | refused.headers()
    if refused.status in (408, 413):
        headers["connection"] = "close"
    pairs = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refused.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})
