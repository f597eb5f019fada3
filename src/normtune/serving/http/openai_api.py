"""Request models and response bodies in OpenAI's format. OpenAI's other request fields are ignored."""

from __future__ import annotations

import math
import time
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from normtune.serving.engine.requests import Reply, ServedAdapter
from normtune.serving.http.paths import NAME_PATTERN

ADAPTER_NAME = f"^{NAME_PATTERN}$"
FOLDER_NAME = f"^{NAME_PATTERN}(/{NAME_PATTERN}){{0,3}}$"  # for the schema; `paths.adapter_folder` checks it


def _to_int(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


WholeNumber = BeforeValidator(_to_int)  # accepts JSON's 16.0 as 16
Count = Annotated[int, Field(ge=1), WholeNumber]


class ImageUrl(BaseModel):
    """`url`: a data URL, the id of an uploaded file, or a URL of an allowed host."""

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
    model_config = ConfigDict(strict=True)  # refuses "yes" for true

    include_usage: bool = False


class ChatRequest(BaseModel):
    """One question about the images of one study; without text, a request for a report.

    Decoding is not sampled: the answer is the most likely text.
    """

    model_config = ConfigDict(strict=True)  # refuses "2" for 2

    model: str = Field(max_length=256, description="The name of the base or of an adapter.")
    messages: list[Message] = Field(min_length=1, max_length=16)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    n: Literal[1] | None = 1
    beams: Annotated[
        int, Field(ge=1, le=8, description="Beams of the search (not in OpenAI's API); 1 is greedy."), WholeNumber
    ] = 1


class Registration(BaseModel):
    """An adapter to register: its name in requests, and its folder below the adapter root."""

    name: str = Field(pattern=ADAPTER_NAME)
    folder: str | None = Field(
        None, max_length=256, description="Default: the name.", json_schema_extra={"pattern": FOLDER_NAME}
    )


class BatchRow(BaseModel):
    """A line of a batch, in the format of OpenAI's batch files."""

    custom_id: str = Field(min_length=1, max_length=256)
    method: Literal["POST"] = "POST"
    url: Literal["/v1/chat/completions"] = "/v1/chat/completions"
    body: ChatRequest


def validation_message(errors: Any, skip: int = 0) -> tuple[str, str]:
    """Return the field and a sentence for one of pydantic's errors. The sentence quotes no sent value.

    Args:
        errors: `ValidationError.errors()`. In a union, the error with the longest path is of the branch that
            matched best, so that one is reported.
        skip: leading path entries to drop; FastAPI puts "body" first.
    """
    error = max(errors, key=lambda error: len(error["loc"]))
    path = [str(entry) for entry in error["loc"][skip:]]
    # Besides names of fields, the path has entries for union branches, such as `list[...]` or `function-...`.
    field = ".".join(entry for entry in path if entry.replace("_", "").isalnum() and entry.isascii())[:80]
    return field, f"{field or 'the body'}: {error['msg'][:1].lower()}{error['msg'][1:]}."


def confidence(score: float | None) -> float | None:
    """Return exp of the mean log-probability of the answer's tokens, at most 1."""
    return None if score is None else math.exp(min(score, 0.0))


def _envelope(id: str, kind: str, model: str) -> dict[str, Any]:
    return {"id": id, "object": kind, "created": int(time.time()), "model": model}


def _usage(reply: Reply) -> dict[str, int]:
    return {
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": reply.completion_tokens,
        "total_tokens": reply.prompt_tokens + reply.completion_tokens,
    }


def _finish_reason(reply: Reply, limit: int | None) -> str:
    return "length" if limit is not None and reply.completion_tokens >= limit else "stop"


def _normtune_fields(reply: Reply) -> dict[str, Any]:
    """Return the fields that OpenAI's API does not have."""
    return {"score": reply.score, "confidence": confidence(reply.score), "seconds": round(reply.seconds, 4)}


def completion(id: str, model: str, reply: Reply, limit: int | None) -> dict[str, Any]:
    """Return a `chat.completion`. Its `normtune` has score (mean log-probability), confidence and seconds."""
    message = {"role": "assistant", "content": reply.text, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": _finish_reason(reply, limit)}
    envelope = _envelope(id, "chat.completion", model)
    return envelope | {"choices": [choice], "usage": _usage(reply), "normtune": _normtune_fields(reply)}


def chunk(id: str, model: str, delta: dict[str, Any]) -> dict[str, Any]:
    """Return a `chat.completion.chunk` with a part of the answer."""
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}
    return _envelope(id, "chat.completion.chunk", model) | {"choices": [choice]}


def last_chunks(id: str, model: str, reply: Reply, limit: int | None, usage: bool) -> list[dict[str, Any]]:
    """Return the chunk that ends the answer, and with `usage` the chunk with the token counts."""
    last = chunk(id, model, {}) | {"normtune": _normtune_fields(reply)}
    last["choices"][0]["finish_reason"] = _finish_reason(reply, limit)
    usage_chunk = _envelope(id, "chat.completion.chunk", model) | {"choices": [], "usage": _usage(reply)}
    return [last, usage_chunk] if usage else [last]


def model_entry(name: str, started: float, adapter: ServedAdapter | None = None) -> dict[str, Any]:
    """Return an entry of `/v1/models`."""
    kind = "base" if adapter is None else "adapter"
    entry = {"id": name, "object": "model", "created": int(started), "owned_by": "normtune", "kind": kind}
    return entry if adapter is None else entry | {"recipe": adapter.recipe, "data": _trained_on(adapter)}


def _trained_on(info: ServedAdapter) -> dict[str, Any]:
    """Return the public facts of the training data; its folder is left out."""
    public = ("name", "split", "licence", "task", "pairs")
    return {name: value for name, value in (info.data or {}).items() if name in public}


def adapter_entry(info: ServedAdapter) -> dict[str, Any]:
    """Return an entry of `/v1/adapters`: the adapter's description, without paths of the server."""
    entry = {"id": info.name, "object": "adapter", "recipe": info.recipe, "base": info.base.rpartition("/")[2]}
    return entry | {
        "trainable": info.trainable,
        "total": info.total,
        "bytes": info.bytes,
        "loaded": info.loaded,
        "running": info.running,
        "data": _trained_on(info),
    }
