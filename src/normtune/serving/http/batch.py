"""A JSONL of questions answered in one call, line by line in their order; joined by `custom_id`."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

from pydantic import ValidationError

from normtune.errors import InputError
from normtune.serving.engine.requests import Busy
from normtune.serving.http import openai_api
from normtune.serving.http.chat import parse_request
from normtune.serving.http.errors import RequestRefused, refusal
from normtune.serving.http.state import Service

_AT_ONCE = 64  # rows that the engine has of one batch
_PATIENCE_S = 0.25  # before a row that met a full queue is given again


def read_rows(data: bytes, most: int) -> list[openai_api.BatchRow]:
    """The rows of a JSONL.

    Raises:
        InputError: a line is not such a row, an id is there twice, or there are none or too many.
    """
    rows: list[openai_api.BatchRow] = []
    seen: set[str] = set()
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        if len(rows) == most:
            raise InputError(f"more than {most:,} rows. Send them in several batches.")
        try:
            row = openai_api.BatchRow.model_validate_json(line)
        except ValidationError as error:
            raise InputError(f"line {number}: {openai_api.one_sentence(error.errors())[1]}") from None
        if row.custom_id in seen:
            raise InputError(f"line {number}: its custom_id is there twice. Give each row its own.")
        seen.add(row.custom_id)
        rows.append(row)
    if not rows:
        raise InputError("the batch is empty. Send one JSON object a line.")
    return rows


async def answers(service: Service, owner: str, rows: list[openai_api.BatchRow]) -> AsyncIterator[str]:
    """A line for each row, in OpenAI's shape; what could not be answered says so in its own line."""
    left, running = iter(rows), deque[asyncio.Task[str]]()
    try:
        for row in left:
            running.append(asyncio.ensure_future(_line(service, owner, row)))
            if len(running) == _AT_ONCE:
                yield await running.popleft()
        while running:
            yield await running.popleft()
    finally:
        for task in running:
            task.cancel()


async def _line(service: Service, owner: str, row: openai_api.BatchRow) -> str:
    try:
        status, body = 200, await _answer(service, owner, row.body)
    except Exception as error:
        refused = refusal(error)
        status, body = refused.status, refused.body()
    response = {"status_code": status, "body": body}
    return json.dumps({"custom_id": row.custom_id, "response": response, "error": None}) + "\n"


async def _answer(service: Service, owner: str, body: openai_api.ChatRequest) -> dict[str, Any]:
    while True:
        try:
            async with parse_request(service, owner, body) as question:
                reply = await asyncio.wait_for(question.reply, service.limits.request_s)
                return openai_api.completion(question.id, question.model, reply, question.limit)
        except Busy:
            await asyncio.sleep(_PATIENCE_S)
        except RequestRefused as refused:
            if refused.code != "busy":
                raise
            await asyncio.sleep(_PATIENCE_S)
