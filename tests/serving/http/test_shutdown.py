"""Clients that disconnect, requests that time out, and shutdown of the server."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from starlette.types import Message

from normtune.serving.engine.requests import DeviceFailed
from normtune.serving.http.app import make_app
from normtune.serving.http.chat import StreamedResponse
from normtune.serving.http.limits import Limits
from normtune.serving.http.server import Server, listen, uvicorn_config
from normtune.serving.http.state import Settings
from tests.support.fake_engine import FakeEngine
from tests.support.test_server import call, chat_body, serving, wait_until

JSON = {"Content-Type": "application/json"}
ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("stream", [False, True])
def test_a_question_is_cancelled_when_its_client_disconnects(stream: bool) -> None:
    engine = FakeEngine()
    engine.may_answer.clear()
    with serving(engine) as url:
        first = http.client.HTTPConnection(urlsplit(url).netloc)  # the engine is busy with this request
        first.request("POST", "/v1/chat/completions", json.dumps(chat_body()), JSON)
        wait_until(lambda: len(engine.futures) == 1)
        second = http.client.HTTPConnection(urlsplit(url).netloc)
        body = json.dumps(chat_body(stream=stream))
        second.request("POST", "/v1/chat/completions", body, JSON)
        wait_until(lambda: len(engine.futures) == 2)
        assert second.sock is not None
        if stream:
            second.getresponse().readline()
        second.close()
        wait_until(lambda: engine.futures[1].cancelled())
        engine.may_answer.set()
        assert first.getresponse().status == 200
        first.close()
        assert "normtune_shared_bytes_left 2.147483648e+09" in call(url, "GET", "/metrics").body.decode()


def test_a_batch_is_cancelled_when_its_client_disconnects() -> None:
    engine = FakeEngine()
    engine.may_answer.clear()
    rows = [{"custom_id": str(n), "body": chat_body()} for n in range(5)]
    with serving(engine) as url:
        connection = http.client.HTTPConnection(urlsplit(url).netloc)
        connection.request("POST", "/v1/batch", "\n".join(map(json.dumps, rows)))
        wait_until(lambda: len(engine.futures) == 5)
        connection.close()
        wait_until(lambda: all(future.cancelled() for future in engine.futures))
        engine.may_answer.set()


def test_a_stream_to_a_client_that_has_gone_is_closed_before_it_begins() -> None:
    closed: list[str] = []

    async def chunks() -> AsyncGenerator[str]:
        yield "never sent"

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        await asyncio.sleep(20)

    async def respond() -> None:
        stack = AsyncExitStack()
        stack.callback(closed.append, "question")
        await StreamedResponse(chunks(), "text/event-stream", stack)({"type": "http"}, receive, send)

    asyncio.run(respond())
    assert closed == ["question"]


def test_a_request_that_times_out_gets_504_and_is_cancelled() -> None:
    engine = FakeEngine()
    engine.may_answer.clear()
    with serving(engine, Settings(base="nano", limits=Limits(request_s=0.2))) as url:
        response = call(url, "POST", "/v1/chat/completions", chat_body())
        stream = call(url, "POST", "/v1/chat/completions", chat_body(stream=True))
        assert (response.status, response.json["error"]["code"]) == (504, "timeout")
        assert b'"code": "timeout"' in stream.body and stream.status == 200
        wait_until(lambda: all(future.cancelled() for future in engine.futures))
        engine.may_answer.set()


def test_a_server_with_a_failed_accelerator_is_not_healthy() -> None:
    engine = FakeEngine()
    with serving(engine) as url:
        assert call(url, "GET", "/healthz").status == 200
        engine.failed, engine.error = True, DeviceFailed()
        health, answer = call(url, "GET", "/healthz"), call(url, "POST", "/v1/chat/completions", chat_body())
        assert health.status == answer.status == 503 and "accelerator failed" in health.error_message
        assert health.headers["retry-after"] and answer.headers["retry-after"]


def test_a_slow_body_gets_408() -> None:
    with serving(FakeEngine(), Settings(base="nano", limits=Limits(body_s=0.2))) as url:
        host, _, port = urlsplit(url).netloc.partition(":")
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            connection.sendall(b"POST /v1/batch HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nabc")
            assert connection.recv(100).startswith(b"HTTP/1.1 408")


def test_a_late_idle_connection_does_not_delay_the_shutdown() -> None:
    settings = Settings(base="nano")
    listening = listen("127.0.0.1", 0)
    server = Server(uvicorn_config(make_app(FakeEngine(), settings), settings), ready=lambda: None)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    with socket.create_connection(listening.getsockname(), timeout=20) as idle:
        wait_until(lambda: bool(server.server_state.connections))
        (connection,) = server.server_state.connections
        close = connection.shutdown
        calls = iter([lambda: None])  # uvicorn's own call: as if the connection had opened after it
        connection.shutdown = lambda: next(calls, close)()  # type: ignore[method-assign]
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive() and idle.recv(1) == b""


SERVER = """
import sys
from threading import Thread
from normtune.serving.http.server import listen, run, server_url
from normtune.serving.http.state import Settings
from tests.support.fake_engine import FakeEngine
engine, listening = FakeEngine(), listen("127.0.0.1", 0)
engine.may_answer.clear()
Thread(target=lambda: sys.stdin.readline() and engine.may_answer.set(), daemon=True).start()
run(engine, Settings(base="nano"), listening, ready=lambda: print(server_url(listening), flush=True))
print("ended", "torch" in sys.modules, flush=True)
"""


def test_a_failed_accelerator_ends_the_process_with_a_message() -> None:
    code = SERVER.replace("engine.may_answer.set()", "setattr(engine, 'failed', True)")
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}"}
    ended = subprocess.run(
        [sys.executable, "-c", code], input="\n", capture_output=True, text=True, env=env, timeout=60
    )
    assert ended.returncode == 1 and "ended" not in ended.stdout
    assert ended.stderr.endswith("normtune: error: the accelerator failed, see the log. Start the server again.\n")


def is_closed(url: str) -> bool:
    host, _, port = urlsplit(url).netloc.partition(":")
    try:
        socket.create_connection((host, int(port))).close()
    except OSError:
        return True
    return False


def test_sigterm_answers_accepted_requests_and_exits_with_status_0() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}"},
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        url = process.stdout.readline().strip()
        with ThreadPoolExecutor(8) as pool:
            bodies = [chat_body(f"Number {n}?", stream=n % 2 == 0) for n in range(8)]
            requests = [pool.submit(call, url, "POST", "/v1/chat/completions", body) for body in bodies]
            wait_until(lambda: b"normtune_answers_total 8.0\n" in call(url, "GET", "/metrics").body)
            process.send_signal(signal.SIGTERM)
            wait_until(lambda: is_closed(url))
            process.stdin.write("\n")  # releases the engine
            process.stdin.flush()
            answers = [answer.result(20) for answer in requests]
        out, log = process.communicate(timeout=20)
    finally:
        process.kill()
        process.wait()
    assert [answer.status for answer in answers] == [200] * 8
    assert all(f"Number {n}?".encode() in answer.body for n, answer in enumerate(answers))
    assert (process.returncode, out.strip()) == (0, "ended False")
    assert log.count("POST /v1/chat/completions 200") == 8 and "Number" not in log
