"""Clients that go away, answers that do not come, and the server's own end."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from normtune.serving.http.app import make_app
from normtune.serving.http.limits import Limits
from normtune.serving.http.server import Server, configuration, listen
from normtune.serving.http.state import Settings
from tests.support.fake_engine import FakeEngine
from tests.support.test_server import call, eventually, question, serving

JSON = {"Content-Type": "application/json"}
ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("stream", [False, True])
def test_a_question_is_cancelled_when_its_client_goes_away(stream: bool) -> None:
    engine = FakeEngine()
    engine.let.clear()
    with serving(engine) as url:
        first = http.client.HTTPConnection(urlsplit(url).netloc)  # the engine works at this one
        first.request("POST", "/v1/chat/completions", json.dumps(question()), JSON)
        eventually(lambda: len(engine.futures) == 1)
        second = http.client.HTTPConnection(urlsplit(url).netloc)
        body = json.dumps(question(stream=stream))
        second.request("POST", "/v1/chat/completions", body, JSON)
        eventually(lambda: len(engine.futures) == 2)
        assert second.sock is not None
        if stream:
            second.getresponse().readline()
        second.close()
        eventually(lambda: engine.futures[1].cancelled())
        engine.let.set()
        assert first.getresponse().status == 200
        first.close()
        assert "normtune_shared_bytes_left 2147483648" in call(url, "GET", "/metrics").body.decode()


def test_a_batch_is_cancelled_when_its_client_goes_away() -> None:
    engine = FakeEngine()
    engine.let.clear()
    rows = [{"custom_id": str(n), "body": question()} for n in range(5)]
    with serving(engine) as url:
        connection = http.client.HTTPConnection(urlsplit(url).netloc)
        connection.request("POST", "/v1/batch", "\n".join(map(json.dumps, rows)))
        eventually(lambda: len(engine.futures) == 5)
        connection.close()
        eventually(lambda: all(one.cancelled() for one in engine.futures))
        engine.let.set()


def test_an_answer_that_does_not_come_in_time_is_504_and_cancelled() -> None:
    engine = FakeEngine()
    engine.let.clear()
    with serving(engine, Settings(base="nano", limits=Limits(request_s=0.2))) as url:
        found = call(url, "POST", "/v1/chat/completions", question())
        stream = call(url, "POST", "/v1/chat/completions", question(stream=True))
        assert (found.status, found.json["error"]["code"]) == (504, "timeout")
        assert b'"code": "timeout"' in stream.body and stream.status == 200
        eventually(lambda: all(one.cancelled() for one in engine.futures))
        engine.let.set()


def test_a_body_that_trickles_in_is_given_up() -> None:
    with serving(FakeEngine(), Settings(base="nano", limits=Limits(body_s=0.2))) as url:
        host, _, port = urlsplit(url).netloc.partition(":")
        with socket.create_connection((host, int(port)), timeout=20) as one:
            one.sendall(b"POST /v1/batch HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nabc")
            assert one.recv(100).startswith(b"HTTP/1.1 408")


def test_a_connection_that_is_there_too_late_does_not_hold_the_end_up() -> None:
    settings = Settings(base="nano")
    listening = listen("127.0.0.1", 0)
    server = Server(configuration(make_app(FakeEngine(), settings), settings), ready=lambda: None)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    with socket.create_connection(listening.getsockname(), timeout=20) as idle:
        eventually(lambda: bool(server.server_state.connections))
        (connection,) = server.server_state.connections
        close = connection.shutdown
        calls = iter([lambda: None])  # uvicorn's own comes before the connection is there
        connection.shutdown = lambda: next(calls, close)()  # type: ignore[method-assign]
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive() and idle.recv(1) == b""


SERVER = """
import sys
from threading import Thread
from normtune.serving.http.server import address, listen, run
from normtune.serving.http.state import Settings
from tests.support.fake_engine import FakeEngine
engine, listening = FakeEngine(), listen("127.0.0.1", 0)
engine.let.clear()
Thread(target=lambda: sys.stdin.readline() and engine.let.set(), daemon=True).start()
run(engine, Settings(base="nano"), listening, ready=lambda: print(address(listening), flush=True))
print("ended", "torch" in sys.modules, flush=True)
"""


def is_closed(url: str) -> bool:
    host, _, port = urlsplit(url).netloc.partition(":")
    try:
        socket.create_connection((host, int(port))).close()
    except OSError:
        return True
    return False


def test_sigterm_answers_what_was_accepted_and_ends_with_status_0() -> None:
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
            bodies = [question(f"Number {n}?", stream=n % 2 == 0) for n in range(8)]
            asked = [pool.submit(call, url, "POST", "/v1/chat/completions", body) for body in bodies]
            eventually(lambda: b"normtune_answers_total 8\n" in call(url, "GET", "/metrics").body)
            process.send_signal(signal.SIGTERM)
            eventually(lambda: is_closed(url))
            process.stdin.write("\n")  # only now the engine answers
            process.stdin.flush()
            answers = [one.result(20) for one in asked]
        out, log = process.communicate(timeout=20)
    finally:
        process.kill()
        process.wait()
    assert [one.status for one in answers] == [200] * 8
    assert all(f"Number {n}?".encode() in one.body for n, one in enumerate(answers))
    assert (process.returncode, out.strip()) == (0, "ended False")
    assert log.count("POST /v1/chat/completions 200") == 8 and "Number" not in log
