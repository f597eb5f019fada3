"""What a client may take: API keys, rates, sizes, and the memory that all requests share."""

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
_SHORTEST_KEY = 16
_CLIENTS = 10_000  # whose rates are remembered


@dataclass(frozen=True)
class Limits:
    """Sizes and times that a request may have.

    Attributes:
        body_bytes: of one request; `batch_bytes` of a JSONL.
        pixels: of one image.
        images: of one question.
        question_characters: of one question.
        new_tokens: of one answer.
        batch_rows: of a JSONL.
        questions: that wait or are being answered; others are refused before they are read.
        per_minute: requests of one key (without keys: of one address); `burst` at once.
        request_s: for an answer; `body_s` for the arrival of a body.
        shared_bytes: bodies and decoded images of all requests together.
        upload_bytes, uploads: held for later questions; `upload_s` after which one is forgotten.
    """

    body_bytes: int = 32 << 20
    batch_bytes: int = 128 << 20
    pixels: int = 25_000_000
    images: int = 8
    question_characters: int = 4_000
    new_tokens: int = 1_024
    batch_rows: int = 5_000
    questions: int = 288
    per_minute: int = 600
    burst: int = 128
    request_s: float = 120.0
    body_s: float = 60.0
    shared_bytes: int = 2 << 30
    upload_bytes: int = 512 << 20
    uploads: int = 2_000
    upload_s: float = 3_600.0


class ApiKeys:
    """API keys, held as digests; without any, every request is let in."""

    def __init__(self, keys: Mapping[str, str] | None = None) -> None:
        self._digests = {name: _digest(key) for name, key in (keys or {}).items()}
        self._cookies = {name: _digest(f"reviews {key}") for name, key in (keys or {}).items()}

    def __bool__(self) -> bool:
        return bool(self._digests)

    def owner(self, key: str) -> str | None:
        """The name of the key, None for an unknown one; takes as long for every key."""
        return _owner(_digest(key), self._digests)

    def cookie(self, key: str) -> str:
        """What stands for a key in a browser's cookie; the key cannot be told from it."""
        return _digest(f"reviews {key}").hex()

    def cookie_owner(self, value: str) -> str | None:
        """The name of the key that a cookie stands for."""
        try:
            found = bytes.fromhex(value)
        except ValueError:
            return None
        return _owner(found, self._cookies)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _owner(digest: bytes, known: Mapping[str, bytes]) -> str | None:
    found = None
    for name, held in known.items():  # no early end: the time must not tell which one was close
        if hmac.compare_digest(digest, held):
            found = name
    return found


def read_keys(file: Path | None, environment: Mapping[str, str] = os.environ) -> ApiKeys:
    """Keys of a file, one a line as `KEY` or `NAME:KEY`, and of NORMTUNE_API_KEYS, separated by commas.

    Raises:
        InputError: the file cannot be read, or a key is short, doubled or holds a blank.
    """
    lines: list[tuple[str, str]] = []
    if file is not None:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"--api-keys: {file} cannot be read. Give a text file, one key a line."
            ) from error
        lines += [(f"{file}, line {n}", line) for n, line in enumerate(text.splitlines(), 1)]
        if not any(line.strip() and not line.strip().startswith("#") for _, line in lines):
            raise InputError(f"--api-keys: {file} holds no key. Write one a line.")
    lines += [(KEYS_VARIABLE, entry) for entry in environment.get(KEYS_VARIABLE, "").split(",")]
    found: dict[str, str] = {}
    for where, line in lines:
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        name, _, key = line.rpartition(":")
        name = name.strip() or f"key-{len(found) + 1}"
        if len(key) < _SHORTEST_KEY or any(c.isspace() for c in key) or not key.isascii():
            raise InputError(f"{where}: a key has {_SHORTEST_KEY} or more ASCII characters and no blank.")
        if name in found or key in found.values():
            raise InputError(f"{where}: this key or its name is there twice. Remove one.")
        found[name] = key
    return ApiKeys(found)


class Rates:
    """A bucket of tokens for each client: `burst` at once, filled again at `per_minute`."""

    def __init__(self, per_minute: int, burst: int, now: Callable[[], float] = time.monotonic) -> None:
        self._per_second = per_minute / 60
        self._burst = float(burst)
        self._now = now
        self._held: OrderedDict[str, tuple[float, float]] = OrderedDict()  # client: (tokens, when counted)

    def take(self, client: str) -> None:
        """Count one request.

        Raises:
            Refused: 429, with the seconds until the next is let in.
        """
        now = self._now()
        tokens, then = self._held.pop(client, (self._burst, now))
        tokens = min(self._burst, tokens + (now - then) * self._per_second)
        self._held[client] = (tokens - 1 if tokens >= 1 else tokens, now)
        while len(self._held) > _CLIENTS:
            self._held.popitem(last=False)
        if tokens < 1:
            wait = math.ceil((1 - tokens) / self._per_second)
            raise RequestRefused(
                429, f"too many requests. The next is let in after {wait} s.", retry_after=wait
            )


class Budget:
    """Bytes that all requests share; used from the event loop's thread alone."""

    def __init__(self, total: int) -> None:
        self._left = total

    def take(self, count: int) -> None:
        """Set bytes aside.

        Raises:
            Refused: 429, there are too few left now.
        """
        if count > self._left:
            raise RequestRefused(
                429, "the server holds too many images just now. Ask again.", code="busy", retry_after=1
            )
        self._left -= count

    def give(self, count: int) -> None:
        """Take them back."""
        self._left += count

    @property
    def left(self) -> int:
        """Bytes that can be taken."""
        return self._left
