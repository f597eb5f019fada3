"""A server on loopback in a thread of the test process, and HTTP requests to it."""

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
from normtune.serving.http.server import listen, server_url, uvicorn_config
from normtune.serving.http.state import Settings


class Response(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error_message(self) -> str:
        """The message of the error."""
        return str(self.json["error"]["message"])


@contextmanager
def serving(engine: Any, settings: Settings | None = None) -> Iterator[str]:
    """The URL of a running server."""
    settings = settings or Settings(base="nano")
    listening = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn_config(make_app(engine, settings), settings))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    try:
        yield server_url(listening)
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive(), "the server did not stop"


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait up to 20 seconds for a condition."""
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "the condition never became true"
        time.sleep(0.01)


def call(
    url: str, method: str, path: str, body: bytes | Any = None, headers: Mapping[str, str] | None = None
) -> Response:
    """Send one request; a body that is not bytes is sent as JSON."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
    kind = {} if body is None or isinstance(body, bytes) else {"Content-Type": "application/json"}
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    try:
        connection.request(method, path, data, {**kind, **(headers or {})})
        response = connection.getresponse()
        return Response(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
    finally:
        connection.close()


def image_bytes(size: tuple[int, int] = (24, 16), kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert("RGB").save(buffer, kind)
    return buffer.getvalue()


def data_url(data: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def chat_body(text: str | None = "Is it normal?", image: str | None = None, **more: Any) -> dict[str, Any]:
    """The body of a chat completion."""
    content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": image or data_url(image_bytes())}}]
    if text is not None:
        content.append({"type": "text", "text": text})
    return {"model": "chest", "messages": [{"role": "user", "content": content}]} | more


def upload_form(data: bytes, filename: str = "a.png", purpose: str = "vision") -> tuple[bytes, dict[str, str]]:
    """(body, headers) of an upload."""
    boundary = "edge-of-a-part"
    name = filename.replace('"', "%22").replace("\r", "").replace("\n", "")
    head = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\n{purpose}\r\n'
        f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n'
        "Content-Type: application/octet-stream\r\n\r\n"
    )
    body = head.encode() + data + f"\r\n--{boundary}--\r\n".encode()
    return body, {"Content-Type": f"multipart/form-data; boundary={boundary}"}


def upload(url: str, data: bytes, filename: str = "a.png", **headers: str) -> Response:
    body, kind = upload_form(data, filename)
    return call(url, "POST", "/v1/files", body, kind | headers)
