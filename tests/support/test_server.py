"""A server on loopback in a thread of the test, and plain requests to it."""

from __future__ import annotations

import base64
import http.client
import io
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import uvicorn
from PIL import Image

from normtune.serving.http.app import make_app
from normtune.serving.http.server import address, configuration, listen
from normtune.serving.http.state import EngineProtocol, Settings


class Answer(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def sentence(self) -> str:
        """The error's message."""
        return str(self.json["error"]["message"])


@contextmanager
def serving(engine: EngineProtocol, settings: Settings | None = None) -> Iterator[str]:
    """The URL of a running server."""
    settings = settings or Settings(base="nano")
    listening = listen("127.0.0.1", 0)
    server = uvicorn.Server(configuration(make_app(engine, settings), settings))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    try:
        yield address(listening)
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive(), "the server did not stop"


def eventually(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


def call(
    url: str, method: str, path: str, body: bytes | Any = None, headers: Mapping[str, str] | None = None
) -> Answer:
    """One request; anything but bytes is sent as JSON."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
    kind = {} if body is None or isinstance(body, bytes) else {"Content-Type": "application/json"}
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    try:
        connection.request(method, path, data, {**kind, **(headers or {})})
        found = connection.getresponse()
        return Answer(found.status, {k.lower(): v for k, v in found.getheaders()}, found.read())
    finally:
        connection.close()


def picture(size: tuple[int, int] = (24, 16), kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert("RGB").save(out, kind)
    return out.getvalue()


def data_url(data: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def question(text: str | None = "Is it normal?", image: str | None = None, **more: Any) -> dict[str, Any]:
    """The body of a chat completion."""
    content: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": image or data_url(picture())}}
    ]
    if text is not None:
        content.append({"type": "text", "text": text})
    return {"model": "chest", "messages": [{"role": "user", "content": content}]} | more


def form(data: bytes, filename: str = "a.png", purpose: str = "vision") -> tuple[bytes, dict[str, str]]:
    """(body, headers) of an upload."""
    edge = "edge-of-a-part"
    name = filename.replace('"', "%22").replace("\r", "").replace("\n", "")
    head = (
        f'--{edge}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\n{purpose}\r\n'
        f'--{edge}\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n'
        "Content-Type: application/octet-stream\r\n\r\n"
    )
    body = head.encode() + data + f"\r\n--{edge}--\r\n".encode()
    return body, {"Content-Type": f"multipart/form-data; boundary={edge}"}


def upload(url: str, data: bytes, filename: str = "a.png", **headers: str) -> Answer:
    body, kind = form(data, filename)
    return call(url, "POST", "/v1/files", body, kind | headers)
