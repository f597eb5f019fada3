"""Request models and response bodies in OpenAI's format.

Every parameter of OpenAI's API does what OpenAI documents, or is refused unless it has a value that changes
nothing. No parameter is ignored.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from normtune.data.examples import MAX_OPTIONS
from normtune.data.records import confidence
from normtune.serving.engine.requests import Reply, ServedAdapter
from normtune.serving.http.paths import NAME_PATTERN

ADAPTER_NAME = f"^{NAME_PATTERN}$"
FOLDER_NAME = f"^{NAME_PATTERN}(/{NAME_PATTERN}){{0,3}}$"  # for the schema; `paths.adapter_folder` checks it


def _to_int(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


WholeNumber = BeforeValidator(_to_int)  # accepts JSON's 16.0 as 16
Count = Annotated[int, Field(ge=1), WholeNumber]
# the window of each image of a request; None: as the file says
Windows = Sequence[list[float] | None]
# [centre, width], in Hounsfield units for CT
Window = Annotated[list[Annotated[float, Field(allow_inf_nan=False)]], Field(min_length=2, max_length=2)]
OptionText = Annotated[str, Field(min_length=1, max_length=1024)]
StopText = Annotated[str, Field(min_length=1, max_length=256)]


class RequestModel(BaseModel):
    """A part of a request: fields that it does not have are refused."""

    model_config = ConfigDict(extra="forbid")


class ImageUrl(RequestModel):
    """`url`: a data URL, the id of an uploaded file, or a URL of an allowed host.

    `detail` may have any of OpenAI's values: the model has one resolution. `window` (not in OpenAI's API) is the
    [centre, width] with which the model sees the grey values of a DICOM file; without it, those of the file.
    """

    url: str
    detail: Literal["auto", "low", "high"] | None = None
    window: Window | None = None


class TextPart(RequestModel):
    type: Literal["text"]
    text: str


class ImagePart(RequestModel):
    """An image; `image_url` may be the URL alone."""

    type: Literal["image_url"]
    image_url: Annotated[
        ImageUrl,
        BeforeValidator(
            lambda value: {"url": value} if isinstance(value, str) else value, json_schema_input_type=ImageUrl | str
        ),
    ]

    @property
    def reference(self) -> str:
        """A data URL, an id of an uploaded file, or a URL."""
        return self.image_url.url

    @property
    def window(self) -> list[float] | None:
        """The window of the image, if one was sent."""
        return self.image_url.window


class FileReference(RequestModel):
    """An uploaded file by its id, or an image file as a data URL; not both."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [{"required": ["file_id"]}, {"required": ["file_data"]}]})

    file_id: str | None = Field(None, max_length=64)
    file_data: str | None = None
    filename: str | None = Field(None, max_length=256)

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        if (self.file_id is None) == (self.file_data is None):
            raise PydanticCustomError("one_of", "Give either file_id or file_data")
        return self


class FilePart(RequestModel):
    window: ClassVar[None] = None  # a file part has no window

    type: Literal["file"]
    file: FileReference

    @property
    def reference(self) -> str:
        """See `ImagePart.reference`."""
        return self.file.file_id or self.file.file_data or ""


Part = Annotated[TextPart | ImagePart | FilePart, Field(discriminator="type")]


class Message(RequestModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]


class StreamOptions(RequestModel):
    model_config = ConfigDict(strict=True)  # refuses "yes" for true

    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class ResponseFormat(RequestModel):
    type: Literal["text"]


# Why a parameter is accepted only with values that change nothing.
_LIMITED = {
    **dict.fromkeys(("temperature", "top_p"), "answers are not sampled. Send 1 (temperature: also 0), or leave it out"),
    **dict.fromkeys(("frequency_penalty", "presence_penalty"), "penalties are not supported. Send 0, or leave it out"),
    **dict.fromkeys(
        ("logprobs", "top_logprobs"),
        "log-probabilities of single tokens are not returned; the answer has their mean as normtune.score. "
        "Leave it out",
    ),
    **dict.fromkeys(
        ("tools", "tool_choice", "functions", "function_call", "web_search_options"),
        "the model calls no tools and no functions. Leave it out",
    ),
    "logit_bias": "tokens have no bias. Leave it out",
    "n": "a question gets one answer. Send 1, or send the question several times",
    "response_format": 'answers are plain text. Send {"type": "text"}, or leave it out',
    **dict.fromkeys(("modalities", "audio"), "answers are text. Leave it out"),
    **dict.fromkeys(("reasoning_effort", "verbosity"), "the model has no such setting. Leave it out"),
    "prediction": "predicted outputs are not supported. Leave it out",
    "service_tier": "there are no service tiers. Leave it out",
    "store": "answers are not stored. Leave it out",
}
_Nothing = Annotated[list[Any], Field(max_length=0)]
_Zero = Annotated[Literal[0], WholeNumber]


class ChatRequest(RequestModel):
    """One question about the images of one study; without text, a request for a report.

    Decoding is not sampled: the answer is the most likely text, whatever the `seed`.
    """

    model_config = ConfigDict(strict=True)  # refuses "2" for 2

    model: str = Field(max_length=256, description="The name of the base or of an adapter.")
    messages: list[Message] = Field(min_length=1, max_length=16)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    n: Annotated[Literal[1], WholeNumber] | None = 1
    beams: Annotated[
        int, Field(ge=1, le=8, description="Beams of the search (not in OpenAI's API); 1 is greedy."), WholeNumber
    ] = 1
    stop: (
        Annotated[
            list[StopText],
            Field(max_length=4, description="Texts that end the answer, which does not contain them."),
            BeforeValidator(
                lambda value: [value] if isinstance(value, str) else value,
                json_schema_input_type=StopText | Annotated[list[StopText], Field(max_length=4)],
            ),
        ]
        | None
    ) = None
    abstain_below: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description="Refuse answers with a confidence below this (not in OpenAI's API). The server may have a "
            "higher threshold. The answer is then sent at once at the end.",
        ),
    ] = 0.0
    options: (
        Annotated[
            list[OptionText],
            Field(
                min_length=2,
                max_length=MAX_OPTIONS,
                description="Options of a multiple-choice question, without letters (not in OpenAI's API). They are "
                "written as in the adapter's training. `normtune.choice` is the letter that the answer names.",
            ),
        ]
        | None
    ) = None
    seed: Annotated[int, WholeNumber] | None = None
    # Names for OpenAI's records and caches, which have no influence on an answer.
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, str] | None = None
    # Parameters of `_LIMITED`.
    temperature: Annotated[Literal[0, 1], WholeNumber] | None = None
    top_p: Annotated[Literal[1], WholeNumber] | None = None
    frequency_penalty: _Zero | None = None
    presence_penalty: _Zero | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: _Zero | None = None
    response_format: ResponseFormat | None = None
    modalities: list[Literal["text"]] | None = None
    audio: None = None
    prediction: None = None
    tools: _Nothing | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    functions: _Nothing | None = None
    function_call: Literal["none", "auto"] | None = None
    reasoning_effort: None = None
    verbosity: None = None
    web_search_options: None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None


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
    limited = next((entry for entry in path if entry in _LIMITED), None)
    if limited is not None:
        field, sentence = field[: field.index(limited) + len(limited)], _LIMITED[limited]
    elif error["type"] == "extra_forbidden":
        sentence = "this parameter is not supported. Leave it out"
    elif error["type"] == "model_attributes_type":  # its message names a class of this module
        sentence = "input should be an object"
    else:
        sentence = error["msg"]
    return field, f"{field or 'the body'}: {sentence[:1].lower()}{sentence[1:]}."


def _envelope(id: str, kind: str, model: str) -> dict[str, Any]:
    return {"id": id, "object": kind, "created": int(time.time()), "model": model}


def _usage(reply: Reply) -> dict[str, int]:
    return {
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": reply.completion_tokens,
        "total_tokens": reply.prompt_tokens + reply.completion_tokens,
    }


def _normtune_fields(reply: Reply, windows: Windows) -> dict[str, Any]:
    """Return the fields that OpenAI's API does not have."""
    return {
        "score": reply.score,
        "confidence": confidence(reply.score),
        "seconds": round(reply.seconds, 4),
        "question_tokens_cut": reply.question_tokens_cut,
        "abstained": reply.abstained,
        "choice": reply.choice,
        "windows": list(windows),
    }


# The `refusal` of an abstained answer.
ABSTAINED = "The model's confidence in its answer is too low."


def completion(id: str, model: str, reply: Reply, windows: Windows) -> dict[str, Any]:
    """Return a `chat.completion`."""
    refusal = ABSTAINED if reply.abstained else None
    message = {"role": "assistant", "content": None if reply.abstained else reply.text, "refusal": refusal}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reply.finish_reason}
    envelope = _envelope(id, "chat.completion", model)
    return envelope | {"choices": [choice], "usage": _usage(reply), "normtune": _normtune_fields(reply, windows)}


def chunk(id: str, model: str, delta: dict[str, Any]) -> dict[str, Any]:
    """Return a `chat.completion.chunk` with a part of the answer."""
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}
    return _envelope(id, "chat.completion.chunk", model) | {"choices": [choice]}


def last_chunks(id: str, model: str, reply: Reply, windows: Windows, usage: bool) -> list[dict[str, Any]]:
    """Return the chunk that ends the answer, and with `usage` the chunk with the token counts."""
    delta = {"refusal": ABSTAINED} if reply.abstained else {}
    last = chunk(id, model, delta) | {"normtune": _normtune_fields(reply, windows)}
    last["choices"][0]["finish_reason"] = reply.finish_reason
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
