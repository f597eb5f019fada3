"""Run the server until it is told to stop; what was accepted is answered before it ends."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
from collections.abc import Callable

import uvicorn

from normtune.errors import InputError
from normtune.serving.http.app import make_app
from normtune.serving.http.errors import LOG
from normtune.serving.http.middleware import RequestGate
from normtune.serving.http.state import EngineProtocol, Settings

LOOPBACK = ("127.0.0.1", "::1", "localhost")
_HEAD_BYTES = 64 << 10  # of a request's line and headers
_LOOK_S = 0.25  # between looks at the connections while the server ends
_KEEP_ALIVE_S = 75  # longer than nginx holds its own connections


def own_names(host: str) -> frozenset[str] | None:
    """Names that a server without keys answers to: its own on loopback, None (any) elsewhere."""
    return frozenset((*LOOPBACK, "[::1]")) if host in LOOPBACK else None


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Raises:
        InputError: the address cannot be had.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or "not a port"
        raise InputError(
            f"cannot listen on {host}, port {port}: {reason}. Choose another --host or --port."
        ) from error
    # connections inherit it; asyncio sets it on its own sockets alone. Without it a body waits 40 ms for the
    # acknowledgement of its head, from the second answer of a connection on
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def address(listening: socket.socket) -> str:
    """The URL of a listening socket."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def configuration(app: RequestGate, settings: Settings) -> uvicorn.Config:
    """uvicorn's, for an application of `make_app`."""
    return uvicorn.Config(
        app,
        http="h11",
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        h11_max_incomplete_event_size=_HEAD_BYTES,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=int(settings.limits.request_s) + 10,
    )


def run(
    engine: EngineProtocol,
    settings: Settings,
    listening: socket.socket,
    *,
    ready: Callable[[], None] = lambda: None,
    quiet: bool = False,
) -> None:
    """Serve until SIGTERM or SIGINT; then take no more connections, answer what was accepted, and return."""
    _log_to_stderr(quiet)
    config = configuration(make_app(engine, settings), settings)
    server = Server(config, ready)
    # uvicorn sends itself the signal again once it has stopped: it must not end the process then
    held = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        server.run([listening])
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)


class Server(uvicorn.Server):
    """uvicorn's, which says when it is there, and at its end waits for no connection that asks nothing."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        closing = asyncio.ensure_future(self._close_idle())
        try:
            await super().shutdown(sockets)
        finally:
            closing.cancel()

    async def _close_idle(self) -> None:
        """Close idle connections again and again: under load some are there only after uvicorn closed all."""
        while True:
            await asyncio.sleep(_LOOK_S)
            for connection in list(self.server_state.connections):
                if not connection.transport.is_closing():
                    connection.shutdown()  # those that wait for an answer close after it


def _log_to_stderr(quiet: bool) -> None:
    if not LOG.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        LOG.addHandler(handler)
        LOG.propagate = False
    LOG.setLevel(logging.WARNING if quiet else logging.INFO)
    logging.getLogger("uvicorn").setLevel(logging.ERROR)
