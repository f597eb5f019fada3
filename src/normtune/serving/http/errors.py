"""What a request is refused with: a status, one sentence, and OpenAI's error object around it."""

from __future__ import annotations

import logging
import re
import traceback
from collections.abc import Iterable
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

from normtune.errors import InputError
from normtune.serving.engine.requests import Busy, Closed, UnknownAdapter

GONE = 499  # as nginx counts a client that did not wait
LOG = logging.getLogger("normtune.serve")
_ABSOLUTE_PATH = re.compile(r"(?<![\w.:/])/[\w.~-]+/|[A-Za-z]:\\")
_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ClientGone(Exception):
    """The client closed its connection; nobody waits for the answer."""


class RequestRefused(Exception):
    """A request that is not answered.

    Attributes:
        status: of HTTP.
        code, param: as OpenAI's error object has them.
        retry_after: seconds, for 429 and 503.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = _KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {
            "error": {"message": self.message, "type": kind, "param": self.param, "code": self.code},
        }

    def headers(self) -> dict[str, str]:
        """Headers that belong to the refusal."""
        found = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return found | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


def refusal(error: BaseException) -> RequestRefused:
    """What `error` is told as: bad input by its sentence, anything else without a word from inside it."""
    match error:
        case RequestRefused():
            return error
        case ClientGone():
            return RequestRefused(GONE, "the client has gone.")
        case UnknownAdapter():
            return RequestRefused(404, without_paths(str(error)), code="model_not_found", param="model")
        case InputError():
            return RequestRefused(400, without_paths(str(error)))
        case Busy():
            return RequestRefused(
                429, "too many requests wait already. Ask again in a second.", code="busy", retry_after=1
            )
        case Closed() | CancelledError():
            return RequestRefused(503, "the server is going down. Ask another one, or later.", retry_after=5)
        case TimeoutError():
            return RequestRefused(504, "no answer in the time that a request has.", code="timeout")
    record(error)
    return RequestRefused(500, "the server failed at this request. Its log says where.")


def record(error: BaseException) -> None:
    """Log the kind of a fault and where it arose; its message may quote a text of a patient."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f"{Path(frames[-1].filename).name}, line {frames[-1].lineno}" if frames else "an unknown place"
    LOG.error("a fault of kind %s in %s", type(error).__name__, where)


def without_paths(message: str, folders: Iterable[Path] = ()) -> str:
    """One line without the server's paths: known folders by their names, a sentence with others replaced."""
    for folder in sorted({str(f) for one in folders for f in (one, one.resolve())}, key=len, reverse=True):
        message = message.replace(folder, Path(folder).name)
    line = " ".join(message.split())
    return "the request names something that cannot be read." if _ABSOLUTE_PATH.search(line) else line
