"""The OpenAPI schema: response models, the errors of each route, and the API key.

A test (schemathesis) checks that the server conforms to the schema.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from normtune.serving.http.openai_api import BatchRow, Window

Responses = dict[int | str, dict[str, Any]]  # FastAPI's `responses`

_GATE_STATUSES = (408, 413, 414, 421, 429)  # errors of `RequestGate` on every route; /v1 adds 401 or 403
_RETRY_HEADER = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer", "minimum": 1}}}
_KEY_HEADER = {"WWW-Authenticate": {"schema": {"type": "string"}}}
_HEADERS = {401: _KEY_HEADER, 429: _RETRY_HEADER, 503: _RETRY_HEADER}
_PHRASES = {413: "Content Too Large", 421: "Misdirected Request"}  # HTTPStatus of Python < 3.13 has others


_EVENT = {
    "type": "object",
    "required": ["data"],
    "properties": {"data": {"type": "string", "description": "A chat.completion.chunk; the last event is [DONE]."}},
}


class ErrorObject(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """OpenAI's error object; `message` is one sentence."""

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
    """An uploaded image; `bytes` is the size of its PNG.

    Grey values of DICOM also have the [centre, width] of the file's window and their [smallest, largest] value.
    """

    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: str
    width: int
    height: int
    window: Window | None = None
    value_range: Window | None = None


class FileList(BaseModel):
    object: Literal["list"]
    data: list[FileEntry]
    has_more: bool


class AdapterEntry(BaseModel):
    """A registered adapter; `running` is the number of its requests in progress."""

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
    content: str | None
    refusal: str | None


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
    """Mean log-probability of the answer's tokens (score), its exp (confidence), the time taken, the number of tokens
    at the question's end that the model did not read, whether the confidence is too low (abstained; the message then
    has a refusal in place of the content), the letter of the option that the answer names (choice; null without
    options), and each image's window (null: as its file says)."""

    score: float | None
    confidence: float | None
    seconds: float
    question_tokens_cut: int
    abstained: bool
    choice: str | None
    windows: list[Window | None]


class Completion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    normtune: Sureness


COMPLETION_RESPONSE: Responses = {
    200: {
        "description": "The answer; with `stream`, its chunks as server-sent events.",
        "model": Completion,
        "content": {"text/event-stream": {"itemSchema": _EVENT}},
    }
}
REPLACED_RESPONSE: Responses = {
    200: {"description": "The adapter was registered before; requests now use its new files.", "model": AdapterEntry}
}
PNG_RESPONSE: Responses = {
    200: {"description": "The image.", "content": {"image/png": {"schema": {"type": "string", "format": "binary"}}}}
}
BATCH_RESPONSE: Responses = {
    200: {
        "description": "One line for each row: custom_id and response, with status_code and body.",
        "content": {"application/jsonl": {"schema": {"type": "string"}}},
    }
}
# OpenAPI 3.2 describes JSONL as an array of its lines.
BATCH_REQUEST = {
    "requestBody": {
        "required": True,
        "content": {
            "application/jsonl": {
                "schema": {"type": "array", "minItems": 1, "items": {"$ref": "#/components/schemas/BatchRow"}}
            }
        },
    }
}
UPLOAD_REQUEST = {
    "requestBody": {
        "content": {
            "multipart/form-data": {
                "encoding": {"file": {"contentType": "image/png, image/jpeg, image/webp, application/dicom"}}
            }
        }
    }
}


def error_responses(*statuses: int) -> Responses:
    """Return the documentation of errors with these statuses, for a route's `responses`."""
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}}
    return {
        status: {"description": _PHRASES.get(status) or HTTPStatus(status).phrase, "content": content}
        | ({"headers": _HEADERS[status]} if status in _HEADERS else {})
        for status in statuses
    }


class DocumentedApp(FastAPI):
    """A FastAPI application with a schema that includes the errors of `RequestGate`.

    Args:
        keys: whether an API key is required.
        options: arguments of FastAPI.
    """

    def __init__(self, *, keys: bool, **options: Any) -> None:
        super().__init__(**options)
        self._keys = keys

    def openapi(self) -> dict[str, Any]:
        """Return FastAPI's schema, completed by models it does not reference, the API key, and the gate's errors.

        Invalid requests get status 400, so that FastAPI's 422 is removed.
        """
        if self.openapi_schema:  # generated before
            return self.openapi_schema
        schema = super().openapi()
        components = schema.setdefault("components", {}).setdefault("schemas", {})
        for name in ("HTTPValidationError", "ValidationError"):
            components.pop(name, None)
        modes: list[tuple[type[BaseModel], JsonSchemaMode]] = [(BatchRow, "validation"), (ErrorBody, "serialization")]
        _, definitions = models_json_schema(modes, ref_template="#/components/schemas/{model}")
        components.update(definitions["$defs"])
        if self._keys:
            schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, operations in schema["paths"].items():
            for method, operation in operations.items():
                statuses = list(_GATE_STATUSES)
                if path.startswith("/v1/") and self._keys:
                    operation["security"] = [{"key": []}]
                    statuses.append(401)
                elif path.startswith("/v1/") and method != "get":
                    statuses.append(403)  # requests from pages of other sites are refused, unless they only read
                responses = error_responses(*statuses)
                responses = {str(status): response for status, response in responses.items()} | operation["responses"]
                responses.pop("422", None)
                operation["responses"] = dict(sorted(responses.items()))
        return schema
