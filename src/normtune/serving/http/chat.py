"""`/v1/chat/completions`: submits a request to the engine, and returns the reply whole or as a stream."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from itertools import chain, cycle
from typing import Any

from PIL import Image
from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from normtune.data import tasks
from normtune.data.reading.cells import has_half_character
from normtune.data.records import History
from normtune.serving.engine.requests import Closed, Reply, Request
from normtune.serving.http import openai_api
from normtune.serving.http.errors import RequestRefused, to_refusal
from normtune.serving.http.remote_images import fetch_image
from normtune.serving.http.state import Service
from normtune.serving.http.uploads import decode_data_url, open_upload, render

_HEARTBEAT_S = 10.0  # interval of comments that keep proxies from closing a stream that waits


@dataclass(frozen=True)
class ChatJob:
    """A submitted question."""

    id: str  # the completion's id
    model: str  # the model's name in the request
    reply: asyncio.Future[Reply]  # the engine's reply
    windows: openai_api.Windows  # the window of each image in the request; None: the file's own
    texts: asyncio.Queue[str | None]  # the text so far, each time it has grown; None once the reply is done


@asynccontextmanager
async def submit_request(service: Service, owner: str, body: openai_api.ChatRequest) -> AsyncIterator[ChatJob]:
    """Check a request, load its images, and submit it to the engine.

    Leaving the context cancels the request if it was not answered, and releases its share of the budget.

    Raises:
        RequestRefused, InputError, Busy, Closed: see their docstrings; `to_refusal` converts them.
    """
    adapter = None if body.model == service.settings.base else body.model
    question, history, references = read_messages(body.messages)
    if len(references) > service.limits.images:
        raise RequestRefused(400, f"more than {service.limits.images} images. Send the views of one study only.")
    options = tuple(body.options or ())
    texts_sent = "".join([*chain(*history), question or "", *options])
    if len(texts_sent) > service.limits.question_characters:
        what = "the conversation has" if history else "the question has"
        raise RequestRefused(400, f"{what} more than {service.limits.question_characters:,} characters.")
    if has_half_character(texts_sent):
        raise RequestRefused(400, "the question contains an invalid character (a lone surrogate).", param="messages")
    default = tasks.MAX_REPORT_TOKENS if question is None else tasks.MAX_ANSWER_TOKENS
    limit = min(body.max_completion_tokens or body.max_tokens or default, service.limits.new_tokens)
    loop, texts = asyncio.get_running_loop(), asyncio.Queue[str | None]()

    def on_text(text: str) -> None:
        loop.call_soon_threadsafe(texts.put_nowait, text)

    reserved = 0  # bytes
    reply: asyncio.Future[Reply] | None = None
    try:
        images: list[Image.Image] = []
        for number, (reference, window) in enumerate(references, 1):
            name = "the image" if len(references) == 1 else f"image {number}"
            image = await _image(service, owner, reference, window, name)
            size = image.width * image.height * 3
            service.budget.reserve(size)
            reserved += size
            images.append(image)
        abstain_below = max(body.abstain_below, service.settings.abstain_below) or None
        request = Request(
            *(tuple(images), question, adapter, limit, body.beams, tuple(body.stop or ()), history, abstain_below),
            options=options,
        )
        reply = asyncio.wrap_future(await service.run_in_decoder(service.engine.submit, request, on_text=on_text))
        reply.add_done_callback(lambda _: texts.put_nowait(None))
        yield ChatJob(
            f"chatcmpl-{secrets.token_hex(12)}", body.model, reply, [window for _, window in references], texts
        )
    finally:
        if reply is not None and not reply.cancel() and not reply.cancelled():
            reply.exception()  # retrieved, so that asyncio does not log it as unhandled
        service.budget.release(reserved)


def read_messages(
    messages: list[openai_api.Message],
) -> tuple[str | None, History, list[tuple[str, list[float] | None]]]:
    """Read a conversation: the last question (None for a report), the turns before it, and the images.

    The texts of several parts are joined by line ends. System messages are ignored. Images are (URL or file id, window
    or None), in their order; all are shown before the first question.

    Raises:
        RequestRefused: user and assistant messages do not alternate, the last is no question, an answer contains an
            image or an earlier turn no text, or there is no image.
    """
    conversation = [message for message in messages if message.role not in ("system", "developer")]
    texts: list[str] = []
    references: list[tuple[str, list[float] | None]] = []
    for message, role in zip(conversation, cycle(("user", "assistant")), strict=False):
        parts = (
            [openai_api.TextPart(type="text", text=message.content)]
            if isinstance(message.content, str)
            else message.content
        )
        images = [(part.reference, part.window) for part in parts if not isinstance(part, openai_api.TextPart)]
        if message.role != role or (images and role == "assistant"):
            raise RequestRefused(
                400, "one question at a time: send user messages and the answers to them in turn.", param="messages"
            )
        references += images
        texts.append("\n".join(part.text for part in parts if isinstance(part, openai_api.TextPart)).strip())
    if len(texts) % 2 == 0:
        raise RequestRefused(400, "one question at a time: end with a user message.", param="messages")
    if not references:
        raise RequestRefused(400, "no image: add an image_url part with a data URL to the message.", param="messages")
    *earlier, question = texts
    if not all(earlier):
        raise RequestRefused(400, "an earlier message is empty. Send its text.", param="messages")
    return question or None, tuple(zip(earlier[::2], earlier[1::2], strict=True)), references


async def _image(
    service: Service, owner: str, reference: str, window_sent: list[float] | None, name: str
) -> Image.Image:
    max_pixels = service.limits.pixels
    window = None if window_sent is None else (window_sent[0], window_sent[1])
    if reference.startswith("file-"):
        upload = service.uploads.get(owner, reference[:64])
        if window is not None:
            return await service.run_in_decoder(render, upload.grey, window, name)
        return await service.run_in_decoder(open_upload, upload.png, max_pixels=max_pixels, name=name)

    def read() -> Image.Image:
        if reference.lstrip()[:5].lower() == "data:":
            data = decode_data_url(reference, name)
        else:
            data = fetch_image(reference, service.settings.remote_hosts, service.limits.body_bytes, name)
        return open_upload(data, max_pixels=max_pixels, name=name, window=window)

    return await service.run_in_decoder(read)


async def wait_for_reply(question: ChatJob, receive: Receive, seconds: float) -> Reply:
    """Wait for the reply, at most `seconds`.

    Raises:
        ClientDisconnect: the client closed the connection.
        TimeoutError: the time is over.
    """
    disconnected = asyncio.ensure_future(_wait_for_disconnect(receive))
    try:
        either: set[asyncio.Future[Any]] = {question.reply, disconnected}
        await asyncio.wait(either, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if question.reply.done():
            return _result(question.reply)
        if disconnected.done():
            raise ClientDisconnect
        raise TimeoutError
    finally:
        disconnected.cancel()


def _result(reply: asyncio.Future[Reply]) -> Reply:
    if reply.cancelled():  # by the engine: no caller of this function cancels it before
        raise Closed("the engine dropped the request.")
    return reply.result()


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class StreamedResponse(StreamingResponse):
    """Sends the texts of a generator, which it closes when all are sent or the client disconnects.

    Args:
        stack: contexts that are left at the same time.
    """

    def __init__(self, chunks: AsyncGenerator[str], media_type: str, stack: AsyncExitStack | None = None) -> None:
        # The header keeps nginx from delaying chunks until they fill its buffer.
        super().__init__(chunks, headers={"x-accel-buffering": "no"}, media_type=media_type)
        self._stack = stack or AsyncExitStack()
        self._stack.push_async_callback(chunks.aclose)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._stack:
            await super().__call__(scope, receive, send)


async def completion_events(question: ChatJob, *, usage: bool, seconds: float) -> AsyncGenerator[str]:
    """Yield the answer as server-sent events in OpenAI's format.

    Args:
        usage: add a last chunk with the token counts.
        seconds: the most time until the reply.
    """
    deadline = asyncio.get_running_loop().time() + seconds
    try:
        yield _event(openai_api.chunk(question.id, question.model, {"role": "assistant", "content": ""}))
        sent = ""
        while (text := await _next_text(question, deadline)) is not None:
            if text == _WAITING:
                yield ": waiting\n\n"
            elif len(text) > len(sent) and text.startswith(sent):
                yield _event(_chunk(question, text[len(sent) :]))
                sent = text
        reply = _result(question.reply)
        if len(reply.text) > len(sent) and reply.text.startswith(sent):
            yield _event(_chunk(question, reply.text[len(sent) :]))
        for chunk in openai_api.last_chunks(question.id, question.model, reply, question.windows, usage):
            yield _event(chunk)
    except Exception as error:
        yield _event(to_refusal(error).body())
    yield "data: [DONE]\n\n"


_WAITING = "\0"  # returned by `_next_text` when a heartbeat is due; no answer has this text


async def _next_text(question: ChatJob, deadline: float) -> str | None:
    """Return the text so far when it has grown, `_WAITING` for a heartbeat, or None when the reply is done.

    Raises:
        TimeoutError: the deadline is over.
    """
    remaining = deadline - asyncio.get_running_loop().time()
    try:
        return await asyncio.wait_for(question.texts.get(), max(min(remaining, _HEARTBEAT_S), 0))
    except TimeoutError:
        if remaining <= _HEARTBEAT_S:
            raise
        return _WAITING


def _chunk(question: ChatJob, text: str) -> dict[str, Any]:
    return openai_api.chunk(question.id, question.model, {"content": text})


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"
