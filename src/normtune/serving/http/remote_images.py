"""Images of other hosts: of those alone that the operator named, no redirects, bounded in size and time."""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from collections.abc import Collection
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

from normtune.errors import InputError
from normtune.serving.http.errors import RequestRefused

_SECONDS = 20.0
_PIECE = 1 << 16


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **named: Any) -> None:
        return None


def fetch(url: str, hosts: Collection[str], max_bytes: int, name: str = "the image") -> bytes:
    """The bytes at an http(s) address of one of `hosts` (`name` or `name:port`).

    Raises:
        Refused: 400, the host is not among them.
        InputError: the address cannot be read, is too large or too slow.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise InputError(f"{name}: its URL cannot be read. Send the image itself, as a data URL.") from None
    host = (parts.hostname or "") + (f":{port}" if port else "")
    if parts.scheme not in ("http", "https") or host not in hosts or parts.username is not None:
        raise RequestRefused(
            400,
            f"{name}: images of other hosts are not fetched. Send a data URL, or upload the file.",
            code="remote_image_refused",
        )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect())
    end = time.monotonic() + _SECONDS
    pieces: list[bytes] = []
    try:
        with opener.open(urllib.request.Request(url, headers={"Accept": "image/*"}), timeout=5) as answer:
            while piece := answer.read1(_PIECE):
                pieces.append(piece)
                if sum(map(len, pieces)) > max_bytes:
                    raise InputError(f"{name}: more than the {max_bytes >> 20} MiB that are taken.")
                if time.monotonic() > end:
                    raise InputError(f"{name}: its host is too slow.")
    except (OSError, HTTPException, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{name}: its host does not give it. Send a data URL, or upload the file."
        ) from error
    return b"".join(pieces)
