"""Limits for clients: API keys, rate limits, size limits, and the memory budget of all requests."""

from __future__ import annotations

import hashlib
import hmac
import math
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from normtune.errors import InputError
from normtune.serving.http.errors import RequestRefused

KEYS_VARIABLE = "NORMTUNE_API_KEYS"
_MIN_KEY_LENGTH = 16  # characters
_MAX_CLIENTS = 10_000  # clients of a rate limiter; beyond that the least recent one is forgotten


@dataclass(frozen=True)
class Limits:
    """Limits of a server. Names that end in `_s` are in seconds."""

    # size of a request's body, and of the body of `/v1/batch`
    body_bytes: int = 32 << 20
    batch_bytes: int = 128 << 20
    pixels: int = 25_000_000  # pixels of one image
    images: int = 8  # images of one question
    question_characters: int = 4_000  # length of one question
    new_tokens: int = 1_024  # tokens of one answer
    batch_rows: int = 5_000  # rows of one batch
    questions: int = 288  # questions in the queue or being answered; more are refused before their bodies are read
    # requests of one key (without keys: of one address) a minute, and at once
    per_minute: int = 600
    burst: int = 128
    # time until the answer, and time for a body to arrive
    request_s: float = 120.0
    body_s: float = 60.0
    shared_bytes: int = 2 << 30  # memory for the bodies and decoded images of all requests together
    # memory and number of all uploaded images; the oldest are dropped
    upload_bytes: int = 512 << 20
    uploads: int = 2_000
    upload_s: float = 3_600.0  # time after which an uploaded image expires


class ApiKeys:
    """API keys, stored as digests. Without keys, every request is accepted."""

    def __init__(self, keys: Mapping[str, str] | None = None) -> None:
        self._digests = {name: _digest(key) for name, key in (keys or {}).items()}
        self._cookies = {name: _digest(f"reviews {key}") for name, key in (keys or {}).items()}

    def __bool__(self) -> bool:
        return bool(self._digests)

    def owner(self, key: str) -> str | None:
        """Return the name of a key; None if it is unknown. It takes the same time for every key."""
        return _owner(_digest(key), self._digests)

    def cookie(self, key: str) -> str:
        """Return the cookie value that represents a key. The key cannot be computed from it."""
        return _digest(f"reviews {key}").hex()

    def cookie_owner(self, value: str) -> str | None:
        """Return the name of the key that a cookie value represents; None if there is none."""
        try:
            digest = bytes.fromhex(value)
        except ValueError:
            return None
        return _owner(digest, self._cookies)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _owner(digest: bytes, known: Mapping[str, bytes]) -> str | None:
    owner = None
    for name, known_digest in known.items():  # no early exit: the time taken must not reveal a match
        if hmac.compare_digest(digest, known_digest):
            owner = name
    return owner


def read_keys(file: Path | None, environment: Mapping[str, str] = os.environ) -> ApiKeys:
    """Read API keys from a file and from the environment variable NORMTUNE_API_KEYS.

    The file has `KEY` or `NAME:KEY` on each line; lines that start with # are comments. The variable has the
    same entries, separated by commas.

    Raises:
        InputError: the file cannot be read or has no key, or a key is too short, repeated, or contains a
            space.
    """
    lines: list[tuple[str, str]] = []
    if file is not None:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"--api-keys: {file} cannot be read. Give a text file with one key on each line."
            ) from error
        lines += [(f"{file}, line {n}", line) for n, line in enumerate(text.splitlines(), 1)]
        if not any(line.strip() and not line.strip().startswith("#") for _, line in lines):
            raise InputError(f"--api-keys: {file} contains no key. Write one key on each line.")
    lines += [(KEYS_VARIABLE, entry) for entry in environment.get(KEYS_VARIABLE, "").split(",")]
    keys: dict[str, str] = {}
    for where, line in lines:
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        name, _, key = line.rpartition(":")
        name = name.strip() or f"key-{len(keys) + 1}"
        if len(key) < _MIN_KEY_LENGTH or any(c.isspace() for c in key) or not key.isascii():
            raise InputError(f"{where}: a key needs at least {_MIN_KEY_LENGTH} ASCII characters and no space.")
        if name in keys or key in keys.values():
            raise InputError(f"{where}: this key or its name is given twice. Remove one.")
        keys[name] = key
    return ApiKeys(keys)


class RateLimiter:
    """A token bucket for each client: `burst` requests at once, refilled at `per_minute`."""

    def __init__(self, per_minute: int, burst: int, now: Callable[[], float] = time.monotonic) -> None:
        self._per_second = per_minute / 60
        self._burst = float(burst)
        self._now = now
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # client to (tokens, time)

    def count_request(self, client: str) -> None:
        """Count one request of a client. A refused request does not use up a token.

        Raises:
            RequestRefused: 429 with the seconds until the next request is accepted.
        """
        now = self._now()
        tokens, last_time = self._buckets.pop(client, (self._burst, now))
        tokens = min(self._burst, tokens + (now - last_time) * self._per_second)
        self._buckets[client] = (tokens - 1 if tokens >= 1 else tokens, now)
        while len(self._buckets) > _MAX_CLIENTS:
            self._buckets.popitem(last=False)
        if tokens < 1:
            wait = math.ceil((1 - tokens) / self._per_second)
            raise RequestRefused(429, f"too many requests. Try again in {wait} s.", retry_after=wait)


class Budget:
    """Memory that all requests share: `available` bytes can be reserved. Not thread-safe: for the event loop only."""

    def __init__(self, total: int) -> None:
        self.available = total

    def reserve(self, count: int) -> None:
        """Reserve bytes until `release`.

        Raises:
            RequestRefused: 429, not enough bytes are available.
        """
        if count > self.available:
            raise RequestRefused(
                429, "the memory for images is in use. Try again in a second.", code="busy", retry_after=1
            )
        self.available -= count

    def release(self, count: int) -> None:
        """Return reserved bytes."""
        self.available += count
