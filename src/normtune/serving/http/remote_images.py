"""Fetches images by URL: only from hosts that the operator allows, without redirects, within limits."""

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

_TIMEOUT_S = 20.0  # for the whole image
_CHUNK_BYTES = 1 << 16


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def fetch_image(url: str, hosts: Collection[str], max_bytes: int, name: str = "the image") -> bytes:
    """Return the bytes of an image at an http(s) URL.

    Args:
        hosts: the allowed hosts, as `name` or `name:port`.
        max_bytes: the most bytes to read.
        name: the image's name in error messages.

    Raises:
        RequestRefused: 400, the host is not allowed.
        InputError: the URL is not valid, or its image cannot be fetched or is too large or too slow.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise InputError(f"{name}: its URL is not valid. Send the image as a data URL.") from None
    host = (parts.hostname or "") + (f":{port}" if port else "")
    if parts.scheme not in ("http", "https") or host not in hosts or parts.username is not None:
        raise RequestRefused(
            400,
            f"{name}: images are not fetched from this host. Send a data URL, or upload the file.",
            code="remote_image_refused",
        )
    # Without proxies of the environment: the request goes to the allowed host itself.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect())
    deadline = time.monotonic() + _TIMEOUT_S
    chunks: list[bytes] = []
    try:
        with opener.open(urllib.request.Request(url, headers={"Accept": "image/*"}), timeout=5) as response:
            while chunk := response.read1(_CHUNK_BYTES):
                chunks.append(chunk)
                if sum(map(len, chunks)) > max_bytes:
                    raise InputError(f"{name}: the file has more than {max_bytes >> 20} MiB.")
                if time.monotonic() > deadline:
                    raise InputError(f"{name}: its host is too slow.")
    except (OSError, HTTPException, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{name}: it cannot be fetched from its host. Send a data URL, or upload the file.") from error
    return b"".join(chunks)
