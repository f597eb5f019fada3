"""An engine without a model: its answers repeat the request, and a test decides when they are given."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import fields
from pathlib import Path
from typing import Literal

from normtune.data.records import is_abstained
from normtune.errors import InputError
from normtune.metrics.choices import chosen_letter
from normtune.serving.engine.requests import Busy, Closed, EngineStats, Reply, Request, ServedAdapter, UnknownAdapter

Job = tuple[Request, Future[Reply], Callable[[str], None] | None]


class FakeEngine:
    """Has the interface of `Engine`.

    Attributes:
        may_answer: event that every answer waits for.
        requests, futures: what was submitted, and its results.
        error: if it is set, every request fails with it.
        failed: whether the accelerator failed.
        text_callbacks: number of calls of `on_text` per answer, each with a longer part of the text.
    """

    def __init__(self, adapters: tuple[str, ...] = ("chest", "brain"), queue_limit: int = 1000) -> None:
        self.may_answer = threading.Event()
        self.may_answer.set()
        self.requests: list[Request] = []
        self.futures: list[Future[Reply]] = []
        self.error: Exception | None = None
        self.failed = False
        self.text_callbacks = 1
        self.queue_limit = queue_limit
        self._adapters = {name: adapter_info(name) for name in adapters}
        self._jobs: queue.Queue[Job | None] = queue.Queue()
        self._closed = False
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def submit(self, request: Request, *, on_text: Callable[[str], None] | None = None) -> Future[Reply]:
        if self._closed:
            raise Closed("closed")
        if request.adapter is not None and request.adapter not in self._adapters:
            raise UnknownAdapter(f"no adapter '{request.adapter}'.")
        if self._jobs.qsize() >= self.queue_limit:
            raise Busy("full")
        future: Future[Reply] = Future()
        self.requests.append(request)
        self.futures.append(future)
        self._jobs.put((request, future, on_text))
        return future

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            request, future, on_text = job
            self.may_answer.wait()
            if not future.set_running_or_notify_cancel():
                continue
            if self.error is not None:
                future.set_exception(self.error)
                continue
            text = answer_text(request)
            for step in range(1, self.text_callbacks + 1):
                if on_text is not None and not request.abstain_below:
                    on_text(text[: len(text) * step // self.text_callbacks])
            abstained = is_abstained(-0.25, request.abstain_below)
            tokens = len(text.split()) + 1
            ended = request.max_new_tokens is None or tokens < request.max_new_tokens
            reason: Literal["stop", "length"] = "stop" if ended else "length"
            letter = chosen_letter(text, request.options)
            reply = Reply(
                "" if abstained else text, -0.25, 12, tokens, 0.01, reason, abstained=abstained, choice=letter
            )
            future.set_result(reply)

    def register(self, name: str, folder: Path) -> ServedAdapter:
        if not (folder / "adapter.json").is_file():
            raise InputError(f"{folder / 'adapter.json'} is missing. Check the path.")
        self._adapters[name] = adapter_info(name)
        return self._adapters[name]

    def remove(self, name: str) -> None:
        if name not in self._adapters:
            raise UnknownAdapter(f"no adapter '{name}'.")
        del self._adapters[name]

    def adapters(self) -> list[ServedAdapter]:
        return list(self._adapters.values())

    def has_adapter(self, name: str) -> bool:
        return name in self._adapters

    def stats(self) -> EngineStats:
        values = {field.name: 0 for field in fields(EngineStats)}
        return EngineStats(**values | {"queued": self._jobs.qsize(), "requests": len(self.requests)})  # type: ignore[arg-type]

    def close(self, *, drain: bool = True, timeout: float | None = None) -> None:
        self._closed = True
        self._jobs.put(None)
        self._thread.join(timeout)


def adapter_info(name: str) -> ServedAdapter:
    return ServedAdapter(name, Path("/secret") / name, "language=ln", "/secret/nano", 10, 1000, 40, False, 0)


def answer_text(request: Request) -> str:
    """The fake answer: the adapter, the sizes of the images, and the question."""
    sizes = " ".join(f"{image.width}x{image.height}" for image in request.images)
    return f"{request.adapter or 'base'} sees {sizes}: {request.question or 'a report'}"
