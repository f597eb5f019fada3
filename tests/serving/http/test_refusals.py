"""What is refused, with which status, and that errors and logs tell nothing."""

from __future__ import annotations

import http.client
import json
import logging
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest

from normtune.serving.http.limits import ApiKeys, Limits
from normtune.serving.http.server import listen, own_names
from normtune.serving.http.state import Settings
from tests.support.fake_engine import FakeEngine
from tests.support.test_server import Answer, call, data_url, eventually, picture, question, serving, upload

KEYS = {"ward": "k" * 20, "lab": "m" * 20}
LIMITS = Limits(
    body_bytes=1 << 20, batch_bytes=1 << 20, pixels=10_000, images=2, per_minute=60_000, burst=60_000
)
WARD = {"Authorization": f"Bearer {KEYS['ward']}"}
LAB = {"Authorization": f"Bearer {KEYS['lab']}"}


@pytest.fixture(scope="module")
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture(scope="module")
def url(engine: FakeEngine) -> Iterator[str]:
    with serving(engine, Settings(base="nano", limits=LIMITS, keys=ApiKeys(KEYS))) as found:
        yield found


def chat(url: str, body: Any, **headers: str) -> Answer:
    return call(url, "POST", "/v1/chat/completions", body, WARD | headers)


def test_keys_are_needed_for_all_but_the_page_and_health(url: str) -> None:
    for path in ("/v1/models", "/v1/files", "/v1/adapters", "/reviews/a.html"):
        found = call(url, "GET", path)
        assert (found.status, found.headers["www-authenticate"]) == (401, "Bearer"), path
        assert call(url, "GET", path, headers={"Authorization": "Bearer wrong"}).status == 401
    assert call(url, "GET", "/v1/models", headers=WARD).status == 200
    assert call(url, "GET", "/healthz").status == call(url, "GET", "/").status == 200
    with (
        openai.OpenAI(base_url=f"{url}/v1", api_key="not this one", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()


def test_a_cookie_opens_the_reviews_and_nothing_else(url: str) -> None:
    made = call(url, "POST", "/v1/session", headers=WARD)
    cookie = made.headers["set-cookie"]
    assert made.status == 204 and KEYS["ward"] not in cookie
    assert all(word in cookie for word in ("HttpOnly", "SameSite=strict", "Path=/reviews"))
    sent = {"Cookie": cookie.partition(";")[0]}
    assert call(url, "GET", "/reviews/a.html", headers=sent).status == 404
    assert call(url, "GET", "/reviews/a.html", headers={"Cookie": "normtune=zz"}).status == 401
    assert call(url, "GET", "/v1/models", headers=sent).status == 401


def test_files_belong_to_their_key(url: str) -> None:
    held = upload(url, picture(), **WARD).json["id"]
    assert call(url, "GET", f"/v1/files/{held}", headers=WARD).status == 200
    assert call(url, "GET", f"/v1/files/{held}", headers=LAB).status == 404
    assert call(url, "GET", "/v1/files", headers=LAB).json["data"] == []
    body = question(image=held)
    assert call(url, "POST", "/v1/chat/completions", body, LAB).status == 404


def message(content: Any, role: str = "user") -> dict[str, Any]:
    return {"model": "chest", "messages": [{"role": role, "content": content}]}


IMAGE = {"type": "image_url", "image_url": {"url": data_url(picture())}}


@pytest.mark.parametrize(
    ("body", "status", "told"),
    [
        (question(model="chset"), 404, "did you mean 'chest'?"),
        (message("Is it normal?"), 400, "no image"),
        (message([IMAGE], "assistant"), 400, "one question at a time"),
        (message([IMAGE] * 3), 400, "more than 2 images"),
        (message([{"type": "audio"}]), 400, "messages.0.content"),
        (message([{"type": "image_url", "image_url": {}}]), 400, "image_url.url: field required"),
        ({"model": "chest", "messages": []}, 400, "messages"),
        ({"messages": message([IMAGE])["messages"]}, 400, "model: field required"),
        (question(n=2), 400, "n: input should be 1"),
        (question(beams=99), 400, "beams"),
        (question(max_tokens=0), 400, "max_tokens"),
        (question("x" * 5_000), 400, "more than 4,000 characters"),
        (question("\ud800"), 400, "half a character"),
        (question(image="data:image/png;base64,@@@@"), 400, "not base64"),
        (question(image="data:image/png,raw"), 400, "data URL in base64"),
        (question(image="https://example.org/a.png"), 400, "not fetched"),
        (question(image="file:///etc/passwd"), 400, "not fetched"),
        (question(image="/etc/passwd"), 400, "not fetched"),
        (question(image="file-../../etc/passwd"), 404, "no such file"),
        (question(image="http://["), 400, "cannot be read"),
        (question(image=data_url(picture((200, 200)))), 400, "10,000 pixels"),
        (question(beams="2"), 400, "beams: input should be a valid integer"),
        (question(stream="yes"), 400, "stream: input should be a valid boolean"),
        (question(max_tokens=1.5), 400, "max_tokens"),
        (b"{", 400, "not JSON"),
        (b"[" * 100_000, 400, ""),
        (b"\xff\xfe\x00", 400, ""),
        (b'"' + b"a" * (1 << 20) + b'"', 413, "1 MiB"),
    ],
)
def test_a_bad_request_is_refused_in_one_sentence(url: str, body: Any, status: int, told: str) -> None:
    found = chat(url, body, **{"Content-Type": "application/json"})
    assert found.status == status and told in found.sentence and found.sentence.endswith((".", "?"))
    assert "passwd" not in found.sentence and "\n" not in found.sentence
    assert set(found.json["error"]) == {"message", "type", "param", "code"}


def test_unknown_addresses_and_methods_have_the_same_shape(url: str) -> None:
    for method, path, status, methods in (
        ("GET", "/v1/gone", 404, None),
        ("PUT", "/v1/models", 405, "GET"),
        ("PATCH", "/v1/files/file-1", 405, "DELETE, GET"),
        ("GET", "/../etc", 404, None),
    ):
        found = call(url, method, path, headers=WARD)
        assert found.status == status and found.sentence and found.headers.get("allow") == methods


def test_a_whole_number_may_have_a_point(url: str) -> None:
    assert chat(url, question(max_tokens=16.0, beams=1.0)).status == 200


def test_answers_are_not_held_back_for_an_acknowledgement() -> None:
    with (
        listen("127.0.0.1", 0) as listening,
        socket.create_connection(listening.getsockname()),
        listening.accept()[0] as accepted,
    ):
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_body_without_a_length_is_counted_too(url: str) -> None:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=20)
    connection.request(
        "POST", "/v1/chat/completions", (b"x" * 65536 for _ in range(40)), WARD, encode_chunked=True
    )
    assert connection.getresponse().status == 413
    connection.close()


def test_adapters_cannot_be_changed_without_a_root(url: str) -> None:
    assert call(url, "POST", "/v1/adapters", {"name": "x"}, WARD).status == 403
    assert call(url, "DELETE", "/v1/adapters/chest", headers=WARD).status == 403


def test_a_fault_of_the_engine_is_500_and_the_log_has_its_kind_and_place_alone(
    url: str, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.fault = RuntimeError("Jane Doe has it, /home/x")
    try:
        with caplog.at_level(logging.INFO):
            whole = chat(url, question("Has Jane Doe it?"))
            stream = chat(url, question("Has Jane Doe it?", stream=True))
    finally:
        engine.fault = None
    assert whole.status == 500 and "Jane" not in str(whole.json)
    assert b'"error"' in stream.body and b"Jane" not in stream.body and stream.body.endswith(b"[DONE]\n\n")
    assert "RuntimeError" in caplog.text and "POST /v1/chat/completions 500" in caplog.text
    assert "Jane" not in caplog.text and "/home" not in caplog.text and " ward" in caplog.text


def test_a_full_queue_and_a_fast_client_get_429_with_a_time(caplog: pytest.LogCaptureFixture) -> None:
    engine = FakeEngine(queue_limit=0)
    limits = Limits(per_minute=60, burst=3)
    with (
        serving(engine, Settings(base="nano", limits=limits)) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        with pytest.raises(openai.RateLimitError) as full:
            client.chat.completions.create(model="chest", messages=question()["messages"])
        assert full.value.code == "busy" and full.value.response.headers["retry-after"] == "1"
        answers = [call(url, "GET", "/v1/models") for _ in range(4)]
        assert [one.status for one in answers][:2] == [200, 200] and answers[-1].status == 429
        assert int(answers[-1].headers["retry-after"]) >= 1
        assert call(url, "GET", "/healthz").status == 200


def test_questions_beyond_those_that_are_open_are_refused_before_they_are_read() -> None:
    engine = FakeEngine()
    engine.let.clear()
    with (
        serving(engine, Settings(base="nano", limits=Limits(questions=2))) as url,
        ThreadPoolExecutor(2) as pool,
    ):
        waiting = [pool.submit(call, url, "POST", "/v1/chat/completions", question()) for _ in range(2)]
        eventually(lambda: len(engine.asked) == 2)
        found = call(url, "POST", "/v1/chat/completions", b"not even JSON")
        assert (found.status, found.json["error"]["code"]) == (429, "busy")
        assert call(url, "GET", "/v1/models").status == 200
        engine.let.set()
        assert [one.result(20).status for one in waiting] == [200, 200]
        assert call(url, "POST", "/v1/chat/completions", question()).status == 200


def test_images_that_the_memory_does_not_hold_get_429(engine: FakeEngine) -> None:
    with serving(FakeEngine(), Settings(base="nano", limits=Limits(shared_bytes=2_000))) as url:
        body = question(image=data_url(picture((40, 40))))
        assert call(url, "POST", "/v1/chat/completions", body).status == 429
        for _ in range(3):  # what was taken is given back
            found = call(url, "POST", "/v1/chat/completions", question())
            assert found.status == 200, found.body


def test_a_server_without_keys_on_loopback_is_reached_by_its_own_names_and_pages_alone() -> None:
    with serving(FakeEngine(), Settings(base="nano", hosts=own_names("127.0.0.1"))) as url:
        assert call(url, "GET", "/v1/models").status == 200
        assert call(url, "GET", "/v1/models", headers={"Host": "localhost:8000"}).status == 200
        assert call(url, "GET", "/v1/models", headers={"Host": "evil.example"}).status == 421
        body, kind = json.dumps(question()).encode(), {"Content-Type": "application/json"}
        other = kind | {"Sec-Fetch-Site": "cross-site"}
        assert call(url, "POST", "/v1/chat/completions", body, other).status == 403
    assert own_names("0.0.0.0") is None


class _Pictures(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/a.png")
            self.end_headers()
            return
        data = b"x" * (33 << 20) if self.path == "/huge" else picture()
        self.send_response(200)
        self.end_headers()
        try:
            self.wfile.write(data)
        except OSError:
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


def test_images_of_a_host_that_is_allowed_are_fetched_without_redirects_and_bounded() -> None:
    other = HTTPServer(("127.0.0.1", 0), _Pictures)
    threading.Thread(target=other.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    host = f"127.0.0.1:{other.server_port}"
    try:
        settings = Settings(base="nano", remote_hosts=frozenset([host]))
        with serving(FakeEngine(), settings) as url:

            def asked(image: str) -> Answer:
                return call(url, "POST", "/v1/chat/completions", question(image=image))

            assert asked(f"http://{host}/a.png").status == 200
            for bad in (f"http://{host}/moved", f"http://{host}/huge", f"http://a@{host}/a.png"):
                assert asked(bad).status == 400, bad
            assert asked(f"http://localhost:{other.server_port}/a.png").status == 400
    finally:
        other.shutdown()
        other.server_close()
