"""`/v1/batch`: answers a JSONL of questions, one line for each, in order, with its `custom_id`."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncGenerator
from typing import Any

from pydantic import ValidationError

from normtune.errors import InputError
from normtune.serving.engine.requests import Busy
from normtune.serving.http import openai_api
from normtune.serving.http.chat import submit_request
from normtune.serving.http.errors import RequestRefused, to_refusal
from normtune.serving.http.state import Service

_MAX_CONCURRENT = 64  # rows of one batch that are in the engine at the same time
_RETRY_S = 0.25  # before a row is submitted again after the queue was full


def read_rows(data: bytes, max_rows: int) -> list[openai_api.BatchRow]:
    """Parse the rows of a JSONL.

    Raises:
        InputError: a line is not a valid row, a `custom_id` is repeated, or there are no or too many rows.
    """
    rows: list[openai_api.BatchRow] = []
    ids: set[str] = set()
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        if len(rows) == max_rows:
            raise InputError(f"more than {max_rows:,} rows. Send them in several batches.")
        try:
            row = openai_api.BatchRow.model_validate_json(line)
        except ValidationError as error:
            raise InputError(f"line {number}: {openai_api.validation_message(error.errors())[1]}") from None
        if row.custom_id in ids:
            raise InputError(f"line {number}: this custom_id is already used. Give each row its own.")
        ids.add(row.custom_id)
        rows.append(row)
    if not rows:
        raise InputError("the batch is empty. Send one JSON object on each line.")
    return rows


async def answer_rows(service: Service, owner: str, rows: list[openai_api.BatchRow]) -> AsyncGenerator[str]:
    """Yield a line for each row in OpenAI's format. A row that fails has the error in its line."""
    running = deque[asyncio.Task[str]]()
    try:
        for row in rows:
            running.append(asyncio.ensure_future(_line(service, owner, row)))
            if len(running) == _MAX_CONCURRENT:
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
        refused = to_refusal(error)
        status, body = refused.status, refused.body()
    response = {"status_code": status, "body": body}
    return json.dumps({"custom_id": row.custom_id, "response": response, "error": None}) + "\n"


async def _answer(service: Service, owner: str, body: openai_api.ChatRequest) -> dict[str, Any]:
    while True:
        try:
            async with submit_request(service, owner, body) as question:
                reply = await asyncio.wait_for(question.reply, service.limits.request_s)
                return openai_api.completion(question.id, question.model, reply, question.windows)
        except (Busy, RequestRefused) as error:
            if to_refusal(error).code != "busy":
                raise
            await asyncio.sleep(_RETRY_S)
