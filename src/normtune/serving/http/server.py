"""Runs the HTTP server until SIGTERM or SIGINT, and answers all accepted requests before it ends."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import uvicorn

from normtune.errors import InputError
from normtune.serving.http.app import make_app
from normtune.serving.http.errors import LOG
from normtune.serving.http.middleware import RequestGate
from normtune.serving.http.state import Settings

if TYPE_CHECKING:
    from normtune.serving.engine.engine import Engine

LOOPBACK = ("127.0.0.1", "::1", "localhost")
_HEAD_BYTES = 64 << 10  # the most bytes of a request's first line and headers
_POLL_S = 0.25  # interval at which idle connections are closed during shutdown
_KEEP_ALIVE_S = 75  # longer than nginx keeps its own connections to the server


def allowed_hosts(host: str) -> frozenset[str] | None:
    """Return the host names that a server without keys accepts: on loopback its own, else None (any)."""
    return frozenset((*LOOPBACK, "[::1]")) if host in LOOPBACK else None


def listen(host: str, port: int) -> socket.socket:
    """Open a listening socket. Port 0 chooses a free port. Raises `InputError` if the address is not available."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or "not a valid port"
        raise InputError(f"cannot listen on {host}, port {port}: {reason}. Choose another --host or --port.") from error
    # Connections inherit this option. asyncio sets it only on sockets that it creates. Without it, from a
    # connection's second response on, a body waits 40 ms for the acknowledgement of its headers.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def server_url(listening: socket.socket) -> str:
    """Return the URL of a listening socket."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def uvicorn_config(app: RequestGate, settings: Settings) -> uvicorn.Config:
    """Return the uvicorn configuration for an application of `make_app`."""
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
    engine: Engine,
    settings: Settings,
    listening: socket.socket,
    *,
    ready: Callable[[], None] = lambda: None,
    quiet: bool = False,
) -> None:
    """Serve until SIGTERM or SIGINT, then close the socket, answer all accepted requests, and return.

    Raises:
        SystemExit: the accelerator failed; a supervisor must start the process again.

    Args:
        ready: called once the server accepts connections.
        quiet: log warnings and errors only, instead of every request.
    """
    _log_to_stderr(quiet)
    config = uvicorn_config(make_app(engine, settings), settings)
    server = Server(config, ready, lambda: engine.failed)
    # uvicorn sends the signal to itself again after it has stopped; it must not end the process then.
    handlers = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        server.run([listening])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if engine.failed:
        raise SystemExit("normtune: error: the accelerator failed, see the log. Start the server again.")


class Server(uvicorn.Server):
    """A uvicorn server that does not wait for idle connections when it shuts down.

    Args:
        ready: called once the server accepts connections.
        failed: whether the server must shut down; called ten times a second.
    """

    def __init__(
        self, config: uvicorn.Config, ready: Callable[[], None], failed: Callable[[], bool] = lambda: False
    ) -> None:
        super().__init__(config)
        self._ready, self._failed = ready, failed

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self._failed()

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
        """Close idle connections repeatedly: under load, some open after uvicorn has closed all others."""
        while True:
            await asyncio.sleep(_POLL_S)
            for connection in list(self.server_state.connections):
                if not connection.transport.is_closing():
                    connection.shutdown()  # a connection with a request in progress closes after its response


def _log_to_stderr(quiet: bool) -> None:
    if not LOG.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        LOG.addHandler(handler)
        LOG.propagate = False
    LOG.setLevel(logging.WARNING if quiet else logging.INFO)
    logging.getLogger("uvicorn").setLevel(logging.ERROR)
