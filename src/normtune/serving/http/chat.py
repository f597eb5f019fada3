"""A chat completion: from OpenAI's request to the engine's, and the answer back, whole or as events."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from PIL import Image
from starlette.types import Receive

from normtune.serving.engine.requests import Closed, Reply, Request
from normtune.serving.http import openai_api
from normtune.serving.http.errors import ClientGone, RequestRefused, refusal
from normtune.serving.http.remote_images import fetch
from normtune.serving.http.state import Service
from normtune.serving.http.uploads import decode_data_url, open_upload

_HEARTBEAT_S = 10.0  # a comment to keep proxies from closing a stream that waits


@dataclass(frozen=True)
class ChatJob:
    """A question that the engine has: `reply` ends with its answer; `texts` gives the text as it grows."""

    id: str
    model: str
    limit: int
    reply: asyncio.Future[Reply]
    texts: asyncio.Queue[str | None]


@asynccontextmanager
async def parse_request(service: Service, owner: str, body: openai_api.ChatRequest) -> AsyncIterator[ChatJob]:
    """Hand a question to the engine; leaving the block cancels it, if it was not answered.

    Raises:
        Refused, InputError, Busy, Closed: as they stand.
    """
    adapter = _adapter(service, body.model)
    question, references = read_messages(body.messages)
    if len(references) > service.limits.images:
        raise RequestRefused(
            400, f"more than {service.limits.images} images. Send the views of one study alone."
        )
    if question is not None and len(question) > service.limits.question_characters:
        raise RequestRefused(
            400, f"the question has more than {service.limits.question_characters:,} characters."
        )
    if question is not None and not _is_unicode(question):
        raise RequestRefused(400, "the question holds half a character (a lone surrogate).", param="messages")
    limit = _limit(service, body, question)
    loop, texts = asyncio.get_running_loop(), asyncio.Queue[str | None]()

    def on_text(text: str) -> None:
        loop.call_soon_threadsafe(texts.put_nowait, text)

    charged = 0
    reply: asyncio.Future[Reply] | None = None
    try:
        images: list[Image.Image] = []
        for number, reference in enumerate(references, 1):
            name = "the image" if len(references) == 1 else f"image {number}"
            image = await _image(service, owner, reference, name)
            size = image.width * image.height * 3
            service.budget.take(size)
            charged += size
            images.append(image)
        request = Request(tuple(images), question, adapter, limit, body.beams)
        reply = asyncio.wrap_future(
            await service.run_in_decoder(service.engine.submit, request, on_text=on_text)
        )
        reply.add_done_callback(lambda _: texts.put_nowait(None))
        yield ChatJob(f"chatcmpl-{secrets.token_hex(12)}", body.model, limit, reply, texts)
    finally:
        if reply is not None and not reply.cancel() and not reply.cancelled():
            reply.exception()  # seen, so that asyncio does not report it
        service.budget.give(charged)


def _adapter(service: Service, model: str) -> str | None:
    return None if model == service.settings.base else model


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _limit(service: Service, body: openai_api.ChatRequest, question: str | None) -> int:
    settings = service.settings
    usual = settings.report_tokens if question is None else settings.question_tokens
    return min(body.max_completion_tokens or body.max_tokens or usual, service.limits.new_tokens)


def read_messages(messages: list[openai_api.Message]) -> tuple[str | None, list[str]]:
    """(question, references of images); None where a report is wanted.

    Raises:
        Refused: not exactly one user message, an answer given before, or no image.
    """
    said = [message for message in messages if message.role not in ("system", "developer")]
    if len(said) != 1 or said[0].role != "user":
        raise RequestRefused(
            400,
            "one question at a time: send one user message with the image and the question.",
            param="messages",
        )
    content = said[0].content
    parts = [] if isinstance(content, str) else content
    references = [part.image_url.url for part in parts if isinstance(part, openai_api.ImagePart)]
    references += [part.file.file_id for part in parts if isinstance(part, openai_api.FilePart)]
    if not references:
        raise RequestRefused(
            400, "no image: add an image_url part with a data URL to the message.", param="messages"
        )
    text = "\n".join(part.text for part in parts if isinstance(part, openai_api.TextPart)).strip()
    return text or None, references


async def _image(service: Service, owner: str, reference: str, name: str) -> Image.Image:
    pixels = service.limits.pixels
    if reference.startswith("file-"):
        png = service.uploads.get(owner, reference[:64]).png
        return await service.run_in_decoder(open_upload, png, max_pixels=pixels, name=name)

    def read() -> Image.Image:
        if reference[:5].lower() == "data:":
            data = decode_data_url(reference, name)
        else:
            data = fetch(reference, service.settings.remote_hosts, service.limits.body_bytes, name)
        return open_upload(data, max_pixels=pixels, name=name)

    return await service.run_in_decoder(read)


async def reply_in_time(question: ChatJob, receive: Receive, seconds: float) -> Reply:
    """The reply.

    Raises:
        ClientGone: nobody waits for it.
        TimeoutError: it did not come in time.
    """
    gone = asyncio.ensure_future(until_gone(receive))
    try:
        either: set[asyncio.Future[Any]] = {question.reply, gone}
        await asyncio.wait(either, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if question.reply.done():
            return _result(question.reply)
        if gone.done():
            raise ClientGone
        raise TimeoutError
    finally:
        gone.cancel()


def _result(reply: asyncio.Future[Reply]) -> Reply:
    if reply.cancelled():  # by the engine, for we have not
        raise Closed("the request was dropped.")
    return reply.result()


async def until_gone(receive: Receive) -> None:
    """Return when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def events(
    question: ChatJob, stack: AsyncExitStack, *, usage: bool, seconds: float
) -> AsyncIterator[str]:
    """The answer as server-sent events, OpenAI's chunks; `stack` holds the question, and is closed."""
    end = asyncio.get_running_loop().time() + seconds
    async with stack:
        try:
            yield _event(openai_api.chunk(question.id, question.model, {"role": "assistant", "content": ""}))
            sent = ""
            while (text := await _next_text(question, end)) is not None:
                if text == _WAITING:
                    yield ": waiting\n\n"
                elif len(text) > len(sent) and text.startswith(sent):
                    yield _event(_piece(question, text[len(sent) :]))
                    sent = text
            reply = _result(question.reply)
            if len(reply.text) > len(sent) and reply.text.startswith(sent):
                yield _event(_piece(question, reply.text[len(sent) :]))
            for last in openai_api.last_chunks(question.id, question.model, reply, question.limit, usage):
                yield _event(last)
        except Exception as error:
            yield _event(refusal(error).body())
        yield "data: [DONE]\n\n"


_WAITING = "\0"


async def _next_text(question: ChatJob, end: float) -> str | None:
    """The text so far when it has grown, None when it is whole. Raises: TimeoutError."""
    left = end - asyncio.get_running_loop().time()
    try:
        return await asyncio.wait_for(question.texts.get(), max(min(left, _HEARTBEAT_S), 0))
    except TimeoutError:
        if left <= _HEARTBEAT_S:
            raise
        return _WAITING


def _piece(question: ChatJob, text: str) -> dict[str, Any]:
    return openai_api.chunk(question.id, question.model, {"content": text})


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"
