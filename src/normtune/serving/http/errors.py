"""Errors of the HTTP API: a status, one sentence for the client, and OpenAI's error object."""

from __future__ import annotations

import logging
import re
import traceback
from collections.abc import Iterable
from concurrent.futures import CancelledError
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse

from normtune.errors import InputError
from normtune.serving.engine.requests import Busy, Closed, NameTaken, UnknownAdapter, UnusableAdapter

CLIENT_CLOSED_REQUEST = 499  # nginx's status for a client that closed the connection; only logged and counted
LOG = logging.getLogger("normtune.serve")
# An absolute path of POSIX (/a/ but not http://a/) or of Windows (C:\\).
_ABSOLUTE_PATH = re.compile(r"(?<![\w.:/])/[\w.~-]+/|[A-Za-z]:\\")
_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


@dataclass(eq=False)
class RequestRefused(Exception):
    """A request that is answered with an error."""

    status: int  # the HTTP status
    message: str  # one sentence for the client
    _: KW_ONLY
    # fields of OpenAI's error object
    code: str | None = None
    param: str | None = None
    retry_after: int | None = None  # seconds after which to try again, for 429 and 503

    def body(self) -> dict[str, Any]:
        """Return OpenAI's error object."""
        kind = _KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self, **headers: str) -> JSONResponse:
        """Return the response; it has these headers, and the headers that its status needs."""
        if self.retry_after is not None:
            headers["Retry-After"] = str(self.retry_after)
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if self.status in (408, 413):  # the rest of the body is still on its way
            headers["Connection"] = "close"
        return JSONResponse(self.body(), self.status, headers)


def to_refusal(error: BaseException) -> RequestRefused:
    """Convert an exception into the error that the client receives.

    Only an `InputError` passes its own message on. Other exceptions get a fixed sentence, because their
    messages may quote a patient's text or a path of the server.
    """
    match error:
        case RequestRefused():
            return error
        case ClientDisconnect():
            return RequestRefused(CLIENT_CLOSED_REQUEST, "the client closed the connection.")
        case UnknownAdapter():
            return RequestRefused(404, remove_paths(str(error)), code="model_not_found", param="model")
        case NameTaken():
            return RequestRefused(
                409, "an adapter of another folder has that name. Remove it first, or choose another name."
            )
        case UnusableAdapter():
            return RequestRefused(503, remove_paths(str(error)), code="adapter_unavailable", retry_after=30)
        case InputError():
            return RequestRefused(400, remove_paths(str(error)))
        case Busy():
            return RequestRefused(
                429, "too many requests are waiting. Try again in a second.", code="busy", retry_after=1
            )
        case Closed() | CancelledError():
            return RequestRefused(503, "the server is shutting down. Try again later.", retry_after=5)
        case TimeoutError():
            return RequestRefused(504, "the request timed out.", code="timeout")
    log_error(error)
    return RequestRefused(500, "the server failed on this request. See its log.")


def log_error(error: BaseException) -> None:
    """Log an error's type and place in the code, without its message, which may quote a patient's text."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f"{Path(frames[-1].filename).name}, line {frames[-1].lineno}" if frames else "an unknown file"
    LOG.error("error of type %s in %s", type(error).__name__, where)


def remove_paths(message: str, known_folders: Iterable[Path] = ()) -> str:
    """Return a message as one line that reveals no path of the server.

    Args:
        message: text for a client.
        known_folders: folders that are shortened to their names. If any other absolute path remains, the
            whole message is replaced.
    """
    for folder in sorted(
        {str(path) for known in known_folders for path in (known, known.resolve())}, key=len, reverse=True
    ):
        message = message.replace(folder, Path(folder).name)
    line = " ".join(message.split())
    return "the request refers to a file that cannot be read." if _ABSOLUTE_PATH.search(line) else line
