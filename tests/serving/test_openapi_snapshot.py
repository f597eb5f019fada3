"""The server's OpenAPI schema is that of `openapi.json`, so that clients keep working. Prose is left out.

Regenerate the file after an intended change:

    python -m tests.serving.test_openapi_snapshot
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import pytest

pytest.importorskip("fastapi")

from normtune.serving.http.app import make_app
from normtune.serving.http.limits import ApiKeys
from normtune.serving.http.state import Settings
from tests.support.snapshot import assert_matches_snapshot, write_snapshot

SNAPSHOT = Path(__file__).with_name("openapi.json")
PROSE = {"description", "summary", "title", "example", "examples"}


def openapi_schema() -> dict[str, Any]:
    """Return the schema of a server with keys and registrable adapters, without prose and version."""
    engine: Any = None  # the schema does not depend on it
    settings = Settings(base="nano", keys=ApiKeys({"ward": "k" * 20}), adapter_root=Path(gettempdir()))
    schema: dict[str, Any] = without_prose(asyncio.run(_get(make_app(engine, settings), "/openapi.json")))
    del schema["info"]["version"]
    return schema


async def _get(app: Any, path: str) -> Any:
    """Return the JSON that an ASGI application answers to a GET request."""
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"host", b"127.0.0.1")],
        "client": ("127.0.0.1", 50000),
        "server": ("127.0.0.1", 8000),
    }
    sent: list[dict[str, Any]] = []
    requests = [{"type": "http.request", "body": b"", "more_body": False}]

    async def receive() -> dict[str, Any]:
        if requests:
            return requests.pop()
        await asyncio.sleep(3600)
        raise AssertionError("the application waited for the client to disconnect")

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await app(scope, receive, send)
    body = b"".join(message.get("body", b"") for message in sent)
    assert sent[0]["status"] == 200, body
    return json.loads(body)


def without_prose(value: Any) -> Any:
    """Remove texts for people. A property that is called `title` has a mapping as its value, and is kept."""
    if isinstance(value, dict):
        return {key: without_prose(item) for key, item in value.items() if not (key in PROSE and _is_prose(item))}
    return [without_prose(item) for item in value] if isinstance(value, list) else value


def _is_prose(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value))


def snapshot_text() -> str:
    return json.dumps(openapi_schema(), indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def test_properties_named_like_prose_are_kept() -> None:
    schema = {"title": "Page", "properties": {"title": {"type": "string", "description": "Its heading."}}}
    assert without_prose(schema) == {"properties": {"title": {"type": "string"}}}


def test_openapi_schema_matches_the_snapshot() -> None:
    assert_matches_snapshot(SNAPSHOT, snapshot_text(), "the current schema")


if __name__ == "__main__":
    write_snapshot(SNAPSHOT, snapshot_text())
