"""Hooks for schemathesis, which runs in its own process: rows as JSON lines; existing models and images."""

from __future__ import annotations

import json
from typing import Any

import schemathesis
from hypothesis import strategies as st

from tests.support.test_server import data_url, image_bytes

PICTURE = image_bytes((8, 8))

for kind in ("image/png", "image/jpeg", "image/webp", "application/dicom"):
    schemathesis.openapi.media_type(kind, st.just(PICTURE))


@schemathesis.serializer("application/jsonl")
def serialize_rows(context: Any, rows: Any) -> bytes:
    row_list = rows if isinstance(rows, list) else [rows]
    return "\n".join(map(json.dumps, row_list)).encode()


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: dict[str, Any]) -> None:
    """Complete valid requests with what a schema cannot express: a served model, an image, an id per row."""
    meta, body = case.meta, case.body
    components = () if meta is None else meta.components.values()
    if meta is None or meta.generation.mode.is_negative or any(component.mode.is_negative for component in components):
        return
    match (case.method, case.operation.path):
        case ("POST", "/v1/chat/completions"):
            content = [{"type": "image_url", "image_url": {"url": data_url(PICTURE)}}]
            body.update(model="chest", messages=[{"role": "user", "content": content}])
        case ("POST", "/v1/batch"):
            for number, row in enumerate(body):
                row["custom_id"] = str(number)
                row["body"]["model"] = "nano"
        case ("GET", "/v1/files/{id}/content") if case.query:
            case.query.pop("window", None)  # applies to DICOM only, and the uploaded image is PNG
        case ("POST", "/v1/adapters"):
            body["folder"] = "knee"
