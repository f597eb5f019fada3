"""What clients send and get, in OpenAI's shapes; fields of theirs that mean nothing here are let pass."""

from __future__ import annotations

import math
import time
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from normtune.serving.engine.requests import Reply, ServedAdapter
from normtune.serving.http.paths import NAME

ADAPTER_NAME = f"^{NAME}$"
FOLDER_NAME = f"^{NAME}(/{NAME}){{0,3}}$"  # `folders.adapter_folder` says so in a sentence


def _whole(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = BeforeValidator(_whole)  # JSON's 16.0 is a whole number, too
Count = Annotated[int, Field(ge=1), Whole]


class ImageUrl(BaseModel):
    """`url`: a data URL, the id of an uploaded file, or an address of a host that is allowed."""

    url: str


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class ImagePart(BaseModel):
    type: Literal["image_url"]
    image_url: ImageUrl


class FileReference(BaseModel):
    file_id: str = Field(max_length=64)


class FilePart(BaseModel):
    type: Literal["file"]
    file: FileReference


Part = Annotated[TextPart | ImagePart | FilePart, Field(discriminator="type")]


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)  # not "yes" for true

    include_usage: bool = False


class ChatRequest(BaseModel):
    """One question, or without text a report, about the images of one study; the likeliest text answers."""

    model_config = ConfigDict(strict=True)  # not "2" for 2

    model: str = Field(max_length=256, description="The name of an adapter, or the base's.")
    messages: list[Message] = Field(min_length=1, max_length=16)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    n: Literal[1] | None = 1
    beams: Annotated[
        int, Field(ge=1, le=8, description="Not OpenAI's: beams of the search; 1 is greedy."), Whole
    ] = 1


class Registration(BaseModel):
    """An adapter of the adapter root: the name that requests give, and its folder there."""

    name: str = Field(pattern=ADAPTER_NAME)
    folder: str | None = Field(
        None, max_length=256, description="By default the name.", json_schema_extra={"pattern": FOLDER_NAME}
    )


class BatchRow(BaseModel):
    """A line of a batch, as OpenAI's batch files have it."""

    custom_id: str = Field(min_length=1, max_length=256)
    method: Literal["POST"] = "POST"
    url: Literal["/v1/chat/completions"] = "/v1/chat/completions"
    body: ChatRequest


def one_sentence(errors: Any, skip: int = 0) -> tuple[str, str]:
    """(field, sentence) of the first of pydantic's errors; no value that was sent is in it.

    `skip` steps lead to the body, as FastAPI has them.
    """
    fault = max(errors, key=lambda one: len(one["loc"]))  # of a union: of the branch that went furthest
    steps = [str(step) for step in fault["loc"][skip:]]
    # steps between the fields' names tell the branch of a union, as `list[...]` or `function-...`
    field = ".".join(step for step in steps if step.replace("_", "").isalnum() and step.isascii())[:80]
    return field, f"{field or 'the body'}: {fault['msg'][:1].lower()}{fault['msg'][1:]}."


def confidence(score: float | None) -> float | None:
    """exp of the mean log-probability of the answer's tokens."""
    return None if score is None else math.exp(min(score, 0.0))


def _envelope(id: str, kind: str, model: str) -> dict[str, Any]:
    return {"id": id, "object": kind, "created": int(time.time()), "model": model}


def _usage(reply: Reply) -> dict[str, int]:
    return {
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": reply.completion_tokens,
        "total_tokens": reply.prompt_tokens + reply.completion_tokens,
    }


def _finish(reply: Reply, limit: int | None) -> str:
    return "length" if limit is not None and reply.completion_tokens >= limit else "stop"


def _own(reply: Reply) -> dict[str, Any]:
    """What is not OpenAI's: how sure the model is of the text."""
    return {"score": reply.score, "confidence": confidence(reply.score), "seconds": round(reply.seconds, 4)}


def completion(id: str, model: str, reply: Reply, limit: int | None) -> dict[str, Any]:
    """`chat.completion`; `normtune` in it holds score (mean log-probability), confidence and seconds."""
    message = {"role": "assistant", "content": reply.text, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": _finish(reply, limit)}
    whole = _envelope(id, "chat.completion", model)
    return whole | {"choices": [choice], "usage": _usage(reply), "normtune": _own(reply)}


def chunk(id: str, model: str, delta: dict[str, Any]) -> dict[str, Any]:
    """`chat.completion.chunk` with a piece of the answer."""
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}
    return _envelope(id, "chat.completion.chunk", model) | {"choices": [choice]}


def last_chunks(id: str, model: str, reply: Reply, limit: int | None, usage: bool) -> list[dict[str, Any]]:
    """The chunk that ends the answer, and the one of its usage where it is asked for."""
    last = chunk(id, model, {}) | {"normtune": _own(reply)}
    last["choices"][0]["finish_reason"] = _finish(reply, limit)
    counted = _envelope(id, "chat.completion.chunk", model) | {"choices": [], "usage": _usage(reply)}
    return [last, counted] if usage else [last]


def model_entry(name: str, started: float, adapter: ServedAdapter | None = None) -> dict[str, Any]:
    """A row of `/v1/models`."""
    own = "base" if adapter is None else "adapter"
    told = {"id": name, "object": "model", "created": int(started), "owned_by": "normtune", "kind": own}
    return told if adapter is None else told | {"recipe": adapter.recipe, "data": _trained_on(adapter)}


def _trained_on(info: ServedAdapter) -> dict[str, Any]:
    known = ("name", "split", "licence", "task", "pairs")
    return {name: value for name, value in (info.data or {}).items() if name in known}


def adapter_entry(info: ServedAdapter) -> dict[str, Any]:
    """A row of `/v1/adapters`: what the adapter says of itself, without where it lies."""
    told = {"id": info.name, "object": "adapter", "recipe": info.recipe, "base": info.base.rpartition("/")[2]}
    return told | {
        "trainable": info.trainable,
        "total": info.total,
        "bytes": info.bytes,
        "loaded": info.loaded,
        "running": info.running,
        "data": _trained_on(info),
    }
