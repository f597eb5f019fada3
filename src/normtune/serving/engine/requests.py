"""Requests to the engine, its replies, its statistics, and the errors it raises."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image

from normtune.data import tasks
from normtune.data.records import History
from normtune.errors import InputError


class Busy(Exception):
    """The queue is full. Nothing is wrong with the request; send it again later."""


class Closed(Exception):
    """The engine is closed, or was closed before it answered the request."""


class DeviceFailed(Closed):
    """The accelerator failed, and no request can be answered before the process is started again."""

    def __init__(self) -> None:
        super().__init__("the accelerator failed. The process must be started again.")


def is_device_failure(error: Exception) -> bool:
    """Return whether an error leaves the accelerator unusable for this process, unlike a lack of memory."""
    message = str(error)
    failed = type(error).__name__ == "AcceleratorError" or (isinstance(error, RuntimeError) and "CUDA error" in message)
    return failed and "out of memory" not in message


class UnknownAdapter(InputError):
    """No adapter of that name is registered."""


class NameTaken(InputError):
    """An adapter of another folder is registered under that name."""


class UnusableAdapter(InputError):
    """A registered adapter cannot be loaded, because its files changed. Nothing is wrong with the request."""


@dataclass(frozen=True)
class Request:
    """One question about an image or study, or a request for its report."""

    images: tuple[Image.Image, ...]  # the views of one study, in their order
    question: str | None  # the question; None requests a report
    adapter: str | None = None  # the name of a registered adapter; None uses the base model
    # the most tokens of the answer; None is `tasks.MAX_ANSWER_TOKENS` for a question and `tasks.MAX_REPORT_TOKENS` for
    # a report
    max_new_tokens: int | None = None
    beams: int = 1  # beams of the search; 1 is greedy decoding
    stop: tuple[str, ...] = ()  # texts that end the answer, which is cut before the first of them
    history: History = ()  # the turns of the conversation before the question
    # an answer with a lower confidence is abstained; its text is not streamed before the confidence is known
    abstain_below: float | None = None
    # the options of a multiple-choice question, without letters; they are written as in the adapter's training
    options: tuple[str, ...] = ()

    @property
    def token_limit(self) -> int:
        """The most tokens of the answer."""
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        return tasks.MAX_REPORT_TOKENS if self.question is None else tasks.MAX_ANSWER_TOKENS

    def check(self) -> None:
        """Raise an `InputError` if it cannot be answered."""
        if not self.images:
            raise InputError("the request has no image. Send one, or the views of one study.")
        if self.token_limit < 1 or self.beams < 1:
            raise InputError("the answer needs at least one token and one beam. Raise the limit.")
        if "" in self.stop:
            raise InputError("a stop text is empty. Remove it.")
        if self.options and (self.question is None or len(self.options) < 2):
            raise InputError("options need a question, and there are two or more of them.")


@dataclass(frozen=True)
class Reply:
    """The answer to a request."""

    text: str
    # mean log-probability of the answer's tokens, end token included; None if it is not finite, or if a stop text cut
    # the answer: the value would describe the whole answer
    score: float | None
    prompt_tokens: int  # tokens of the question as the model reads it, and of its images
    completion_tokens: int  # tokens of the answer, with the end token or the stop text
    seconds: float  # time from `Engine.submit` to the answer
    # "stop" if the answer ended with the end token or a stop text, "length" if it has as many tokens as the request
    # allows
    finish_reason: Literal["stop", "length"] = "stop"
    # tokens at the question's end that the model did not read, because it reads no longer questions, or its adapter was
    # trained on shorter ones
    question_tokens_cut: int = 0
    abstained: bool = False  # the confidence is below the threshold of the request, or unknown; `text` is empty
    choice: str | None = None  # the letter of the option that the answer names; None: no options, or it names none


@dataclass(frozen=True)
class ServedAdapter:
    """A registered adapter, as its `adapter.json` describes it."""

    name: str
    folder: Path
    recipe: str
    base: str  # the base's name as recorded at training; it may be a path
    # trained parameters, and all parameters of the base
    trainable: int
    total: int
    bytes: int  # memory that its values take while it is loaded
    loaded: bool  # whether its values are in memory now
    running: int  # how many of its requests are being answered; it is not evicted before they are done
    data: dict[str, object] | None = None  # the dataset it was trained on; None if that is not recorded


@dataclass(frozen=True)
class EngineStats:
    """The engine's current state, and its counters since the start."""

    # requests in the queue, and requests of the current batch
    queued: int = 0
    running: int = 0
    # counters. `requests` counts answered requests, `refused` those rejected because the queue was full
    batches: int = 0
    requests: int = 0
    failed: int = 0
    cancelled: int = 0
    refused: int = 0
    # tokens of the answered requests
    prompt_tokens: int = 0
    completion_tokens: int = 0
    questions_cut: int = 0  # answered requests with a question that was cut
    abstained: int = 0  # answered requests with an abstained answer
    # images that were encoded, and encoded images found in the cache
    images_computed: int = 0
    images_reused: int = 0
    # number of adapters
    registered: int = 0
    loaded: int = 0
    # adapters read from disk, and adapters evicted to free a slot
    loads: int = 0
    evictions: int = 0
    # memory of loaded adapters and of cached encoded images
    adapter_bytes: int = 0
    image_bytes: int = 0
    seconds_busy: float = 0  # time spent on batches
    seconds_loading: float = 0  # the part of it spent on reading adapters and copying them into the bank
