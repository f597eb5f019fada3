"""A response sent piece by piece, which ends its source when the client goes away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import cast

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from normtune.serving.http.chat import until_gone


class Streamed(Response):
    """Sends what `pieces` gives as it comes; closes it in any case."""

    def __init__(self, pieces: AsyncIterator[str], media_type: str) -> None:
        # nginx would hold the pieces back until they fill its buffer
        super().__init__(None, headers={"x-accel-buffering": "no"}, media_type=media_type)
        del self.headers["content-length"]
        self._pieces = cast("AsyncGenerator[str]", pieces)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gone = asyncio.ensure_future(until_gone(receive))
        step: asyncio.Future[str] | None = None
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            while True:
                step = asyncio.ensure_future(anext(self._pieces))
                await asyncio.wait({step, gone}, return_when=asyncio.FIRST_COMPLETED)
                if not step.done():
                    return
                try:
                    piece = step.result()
                except StopAsyncIteration:
                    break
                await send({"type": "http.response.body", "body": piece.encode(), "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            gone.cancel()
            if step is not None and not step.done():
                step.cancel()
                await asyncio.wait({step})
            await self._pieces.aclose()
