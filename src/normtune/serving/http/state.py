"""What the routes work with: the engine, what is held for clients, and the threads that decode images."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from normtune.serving.engine.requests import EngineStats, Reply, Request, ServedAdapter
from normtune.serving.http.limits import ApiKeys, Budget, Limits
from normtune.serving.http.uploads import Uploads

Value = TypeVar("Value")
_DECODERS = 4  # images decoded at once, which bounds the memory that decoding takes


class EngineProtocol(Protocol):
    """What the server needs of `normtune.serving.engine.engine.Engine`."""

    def submit(
        self, request: Request, *, on_text: Callable[[str], None] | None = None
    ) -> Future[Reply]: ...  # pragma: no cover

    def register(self, name: str, folder: Path) -> ServedAdapter: ...  # pragma: no cover

    def remove(self, name: str) -> None: ...  # pragma: no cover

    def adapters(self) -> list[ServedAdapter]: ...  # pragma: no cover

    def knows(self, name: str) -> bool: ...  # pragma: no cover

    def stats(self) -> EngineStats: ...  # pragma: no cover

    def close(self, *, drain: bool = True, timeout: float | None = None) -> None: ...  # pragma: no cover


@dataclass(frozen=True)
class Settings:
    """How a server is set up.

    Attributes:
        base: the name that requests give for the base as it is.
        adapter_root: the folder whose subfolders may be registered; None: none may.
        reviews: a folder of `normtune review` pages; None: none are shown.
        remote_hosts: whose images are fetched.
        hosts: names that requests may be addressed to; None: any.
        question_tokens, report_tokens: of an answer where the request says nothing.
    """

    base: str
    limits: Limits = field(default_factory=Limits)
    keys: ApiKeys = field(default_factory=ApiKeys)
    adapter_root: Path | None = None
    reviews: Path | None = None
    remote_hosts: frozenset[str] = frozenset()
    hosts: frozenset[str] | None = None
    question_tokens: int = 16
    report_tokens: int = 128


class Service:
    """A running server's parts."""

    def __init__(self, engine: EngineProtocol, settings: Settings) -> None:
        limits = settings.limits
        self.engine, self.settings, self.limits = engine, settings, limits
        self.uploads = Uploads(limits.uploads, limits.upload_bytes, limits.upload_s)
        self.budget = Budget(limits.shared_bytes)
        self.started = time.time()
        self._pool = ThreadPoolExecutor(_DECODERS, thread_name_prefix="normtune decode")

    def serves(self, model: str) -> bool:
        """Whether requests may name it: the base, or an adapter that is registered."""
        return model == self.settings.base or self.engine.knows(model)

    async def run_in_decoder(self, work: Callable[..., Value], *arguments: Any, **named: Any) -> Value:
        """Run `work` in a thread of the few that decode."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, lambda: work(*arguments, **named))

    def close(self) -> None:
        """Answer what was accepted, then end."""
        self.engine.close(drain=True, timeout=self.limits.request_s)
        self._pool.shutdown(wait=False, cancel_futures=True)
