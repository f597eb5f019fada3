"""What the OpenAPI schema tells: the shapes of answers, what each address may be refused with, and the key.

Tests hold the server to it (schemathesis).
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from normtune.serving.http.openai_api import BatchRow

Statuses = dict[int | str, dict[str, Any]]  # FastAPI's `responses`

_METHODS = ("get", "put", "post", "delete", "options", "head", "patch", "trace")
_GATE = (408, 413, 414, 421, 429)  # every address; below /v1 a key is needed, or a page of this site
_RETRY = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer", "minimum": 1}}}
_KEY = {"WWW-Authenticate": {"schema": {"type": "string"}}}
_HEADERS = {401: _KEY, 429: _RETRY, 503: _RETRY}
_NAMES = {413: "Content Too Large", 421: "Misdirected Request"}  # HTTPStatus had others before Python 3.13


_EVENT = {
    "type": "object",
    "required": ["data"],
    "properties": {"data": {"type": "string", "description": "A chat.completion.chunk; at the end [DONE]."}},
}


class ErrorObject(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """One sentence, in OpenAI's error object."""

    error: ErrorObject


class ModelEntry(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    kind: Literal["base", "adapter"]
    recipe: str | None = None
    data: dict[str, Any] | None = None


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelEntry]


class FileEntry(BaseModel):
    """An image that is held; `bytes` are those of its PNG."""

    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: str
    width: int
    height: int


class FileList(BaseModel):
    object: Literal["list"]
    data: list[FileEntry]
    has_more: bool


class AdapterEntry(BaseModel):
    """What an adapter says of itself; `running` counts the requests that it answers now."""

    id: str
    object: Literal["adapter"]
    recipe: str
    base: str
    trainable: int
    total: int
    bytes: int
    loaded: bool
    running: int
    data: dict[str, Any]


class AdapterList(BaseModel):
    object: Literal["list"]
    data: list[AdapterEntry]


class Deleted(BaseModel):
    id: str
    object: Literal["file", "adapter"]
    deleted: bool


class ReviewList(BaseModel):
    object: Literal["list"]
    data: list[str]


class Health(BaseModel):
    status: Literal["ok"]
    model: str
    notice: str


class AnswerMessage(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None


class Choice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: None
    finish_reason: Literal["stop", "length"]


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Sureness(BaseModel):
    """Mean log-probability of the answer's tokens, its exp, and the seconds that the answer took."""

    score: float | None
    confidence: float | None
    seconds: float


class Completion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    normtune: Sureness


COMPLETION: Statuses = {
    200: {
        "description": "The answer, or with `stream` its chunks as server-sent events.",
        "model": Completion,
        "content": {"text/event-stream": {"itemSchema": _EVENT}},
    }
}
PNG: Statuses = {
    200: {
        "description": "The image.",
        "content": {"image/png": {"schema": {"type": "string", "format": "binary"}}},
    }
}
LINES: Statuses = {
    200: {
        "description": "One line a row: custom_id and response, with status_code and body.",
        "content": {"application/jsonl": {"schema": {"type": "string"}}},
    }
}
# the lines as an array, as OpenAPI 3.2 describes such types
ROWS = {
    "requestBody": {
        "required": True,
        "content": {
            "application/jsonl": {
                "schema": {"type": "array", "minItems": 1, "items": {"$ref": "#/components/schemas/BatchRow"}}
            }
        },
    }
}
IMAGES = {
    "requestBody": {
        "content": {
            "multipart/form-data": {
                "encoding": {"file": {"contentType": "image/png, image/jpeg, image/webp, application/dicom"}}
            }
        }
    }
}


def refusals(*statuses: int) -> Statuses:
    """What an address of ours refuses with these statuses."""
    return {status: _refusal(status) for status in statuses}


def _refusal(status: int) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}}
    told = {"description": _NAMES.get(status) or HTTPStatus(status).phrase, "content": content}
    return told | ({"headers": _HEADERS[status]} if status in _HEADERS else {})


class DocumentedApp(FastAPI):
    """An application whose schema tells what the gate before it refuses, too.

    Args:
        keys: whether a key is needed.
    """

    def __init__(self, *, keys: bool, **options: Any) -> None:
        super().__init__(**options)
        self._keys = keys

    def openapi(self) -> dict[str, Any]:
        """The schema, made once."""
        return self.openapi_schema or complete(super().openapi(), keys=self._keys)


def complete(schema: dict[str, Any], *, keys: bool) -> dict[str, Any]:
    """FastAPI's schema with what it does not know, in place: bad requests are 400, not its 422."""
    components = schema.setdefault("components", {}).setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        components.pop(name, None)
    modes: list[tuple[type[BaseModel], JsonSchemaMode]] = [
        (BatchRow, "validation"),
        (ErrorBody, "serialization"),
    ]
    _, more = models_json_schema(modes, ref_template="#/components/schemas/{model}")
    components.update(more["$defs"])
    if keys:
        schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            if method in _METHODS:
                _complete(operation, below_v1=path.startswith("/v1/"), reads=method == "get", keys=keys)
    return schema


def _complete(operation: dict[str, Any], *, below_v1: bool, reads: bool, keys: bool) -> None:
    held = operation["responses"]
    held.pop("422", None)
    gate = list(_GATE)
    if below_v1:
        gate += [401] if keys else [] if reads else [403]
        if keys:
            operation["security"] = [{"key": []}]
    for status in gate:
        held.setdefault(str(status), _refusal(status))
    operation["responses"] = dict(sorted(held.items()))
