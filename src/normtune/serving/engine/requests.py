"""What is asked of the serving engine, what it answers, and what it tells about itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from normtune.errors import InputError


class Busy(Exception):
    """The queue is full: nothing was wrong with the request, ask again later."""


class Closed(Exception):
    """The engine is closed, or was closed before it came to the request."""


class UnknownAdapter(InputError):
    """No adapter of that name is registered."""


@dataclass(frozen=True)
class Request:
    """One question, or one report, about one image or one study.

    Attributes:
        images: the views of the study, in their order.
        question: None asks for a report.
        adapter: its registered name; None asks the base as it is.
        max_new_tokens: None is `tasks.MAX_ANSWER_TOKENS`, of a report `tasks.MAX_REPORT_TOKENS`.
        beams: 1 is greedy.
    """

    images: tuple[Image.Image, ...]
    question: str | None
    adapter: str | None = None
    max_new_tokens: int | None = None
    beams: int = 1


@dataclass(frozen=True)
class Reply:
    """An answer.

    Attributes:
        score: mean log-probability of its tokens, end token included; None where it is not finite.
        prompt_tokens: of the question as the model reads it, and of its images.
        completion_tokens: of the answer, end token included.
        seconds: from `Engine.submit` to the answer.
    """

    text: str
    score: float | None
    prompt_tokens: int
    completion_tokens: int
    seconds: float


@dataclass(frozen=True)
class ServedAdapter:
    """A registered adapter, as its `adapter.json` tells of it.

    Attributes:
        base: as its trainer named it; it may be a path.
        data: what it was trained on, None where that is not recorded.
        metrics: as recorded with it.
        bytes: what its values take while it is loaded.
        loaded: whether they are in memory now.
        running: how many of its requests run now; it is not unloaded before they are done.
    """

    name: str
    folder: Path
    recipe: str
    base: str
    trainable: int
    total: int
    bytes: int
    loaded: bool
    running: int
    data: dict[str, object] | None = None
    metrics: dict[str, object] | None = None


@dataclass(frozen=True)
class EngineStats:
    """What the engine holds and has done.

    Attributes:
        queued, running: requests that wait, and those of the batch at work.
        batches, requests, failed, cancelled, refused: counted since the start; `requests` are those answered,
            `refused` those that met a full queue.
        prompt_tokens, completion_tokens: of the requests answered.
        images_computed, images_reused: views that the image encoder was given, and views that it had seen.
        registered, loaded: adapters.
        loads, evictions: adapters read from disk, and those that made room.
        adapter_bytes, image_bytes: what adapters and image states take now.
        seconds_busy: time spent on batches.
        seconds_loading: of it, reading adapters and putting them into the bank.
    """

    queued: int
    running: int
    batches: int
    requests: int
    failed: int
    cancelled: int
    refused: int
    prompt_tokens: int
    completion_tokens: int
    images_computed: int
    images_reused: int
    registered: int
    loaded: int
    loads: int
    evictions: int
    adapter_bytes: int
    image_bytes: int
    seconds_busy: float
    seconds_loading: float
