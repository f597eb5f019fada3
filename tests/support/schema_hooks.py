"""Hooks of schemathesis, in its own process: rows as lines, and models and images that are there."""

from __future__ import annotations

import json
from typing import Any

import schemathesis
from hypothesis import strategies as st

from tests.support.test_server import data_url, picture

PICTURE = picture((8, 8))

for kind in ("image/png", "image/jpeg", "image/webp", "application/dicom"):
    schemathesis.openapi.media_type(kind, st.just(PICTURE))


@schemathesis.serializer("application/jsonl")
def lines(context: Any, rows: Any) -> bytes:
    each = rows if isinstance(rows, list) else [rows]
    return "\n".join(map(json.dumps, each)).encode()


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: dict[str, Any]) -> None:
    """Valid requests get what a schema cannot tell: a model that is served, an image, an id for each row."""
    meta, body = case.meta, case.body
    components = () if meta is None else meta.components.values()
    if meta is None or meta.generation.mode.is_negative or any(one.mode.is_negative for one in components):
        return
    match (case.method, case.operation.path):
        case ("POST", "/v1/chat/completions"):
            content = [{"type": "image_url", "image_url": {"url": data_url(PICTURE)}}]
            body.update(model="chest", messages=[{"role": "user", "content": content}])
        case ("POST", "/v1/batch"):
            for number, row in enumerate(body):
                row["custom_id"] = str(number)
                row["body"]["model"] = "nano"
        case ("POST", "/v1/adapters"):
            body["folder"] = "knee"
