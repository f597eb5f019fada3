"""State that the routes share: the engine, uploaded images, and the threads that decode images."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from normtune.serving.http.limits import ApiKeys, Budget, Limits
from normtune.serving.http.uploads import Uploads

if TYPE_CHECKING:
    from normtune.serving.engine.engine import Engine  # it imports torch

Value = TypeVar("Value")
_DECODER_THREADS = 4  # limits the images decoded at once, and so the memory that decoding takes


@dataclass(frozen=True)
class Settings:
    """The settings of a server."""

    base: str  # the model name of the base in requests
    limits: Limits = field(default_factory=Limits)  # size, time and rate limits
    keys: ApiKeys = field(default_factory=ApiKeys)  # API keys; without any, every request is accepted
    adapter_root: Path | None = None  # clients may register adapters from folders below it; None forbids registration
    reviews: Path | None = None  # a folder of `normtune review` pages; None serves none
    remote_hosts: frozenset[str] = frozenset()  # hosts from which images are fetched
    hosts: frozenset[str] | None = None  # the accepted Host headers; None accepts any
    abstain_below: float = 0.0  # answers with a lower confidence are refused; clients may send a higher threshold


class Service:
    """The engine, settings and shared state of a running server."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        limits = settings.limits
        self.engine, self.settings, self.limits = engine, settings, limits
        self.uploads = Uploads(limits.uploads, limits.upload_bytes, limits.upload_s)
        self.budget = Budget(limits.shared_bytes)
        self.started = time.time()
        self._pool = ThreadPoolExecutor(_DECODER_THREADS, thread_name_prefix="normtune decode")

    def serves(self, model: str) -> bool:
        """Return whether `model` is the base or a registered adapter."""
        return model == self.settings.base or self.engine.has_adapter(model)

    async def run_in_decoder(self, function: Callable[..., Value], *args: Any, **kwargs: Any) -> Value:
        """Call a function that blocks, such as decoding an image, in one of the decoder threads."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, lambda: function(*args, **kwargs))

    def close(self) -> None:
        """Answer all accepted requests, then close the engine and the decoder threads."""
        self.engine.close(drain=True, timeout=self.limits.request_s)
        self._pool.shutdown(wait=False, cancel_futures=True)
