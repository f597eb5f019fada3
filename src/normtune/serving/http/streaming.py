"""A streamed response that stops its source when the client disconnects."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import cast

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from normtune.serving.http.chat import wait_for_disconnect


class StreamedResponse(Response):
    """Sends each text of an async generator as it comes, and closes the generator in any case.

    Args:
        chunks: an async generator of texts.
        media_type: the Content-Type.
    """

    def __init__(self, chunks: AsyncIterator[str], media_type: str) -> None:
        # The header keeps nginx from delaying chunks until they fill its buffer.
        super().__init__(None, headers={"x-accel-buffering": "no"}, media_type=media_type)
        del self.headers["content-length"]
        self._chunks = cast("AsyncGenerator[str]", chunks)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        disconnected = asyncio.ensure_future(wait_for_disconnect(receive))
        step: asyncio.Future[str] | None = None
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            while True:
                step = asyncio.ensure_future(anext(self._chunks))
                await asyncio.wait({step, disconnected}, return_when=asyncio.FIRST_COMPLETED)
                if not step.done():  # the client disconnected
                    return
                try:
                    chunk = step.result()
                except StopAsyncIteration:
                    break
                await send({"type": "http.response.body", "body": chunk.encode(), "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            disconnected.cancel()
            if step is not None and not step.done():
                step.cancel()
                await asyncio.wait({step})  # a generator cannot be closed while it runs
            await self._chunks.aclose()
