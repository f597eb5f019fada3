"""Refused requests: their status and message, and that errors and logs reveal no private text."""

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
from openai.types.chat.completion_create_params import CompletionCreateParamsBase

from normtune.serving.http.chat import read_messages
from normtune.serving.http.limits import ApiKeys, Limits
from normtune.serving.http.openai_api import ChatRequest, Message
from normtune.serving.http.server import allowed_hosts, listen
from normtune.serving.http.state import Settings
from tests.support.fake_engine import FakeEngine
from tests.support.test_server import Response, call, chat_body, data_url, image_bytes, serving, upload, wait_until

KEYS = {"ward": "k" * 20, "lab": "m" * 20}
LIMITS = Limits(body_bytes=1 << 20, batch_bytes=1 << 20, pixels=10_000, images=2, per_minute=60_000, burst=60_000)
WARD = {"Authorization": f"Bearer {KEYS['ward']}"}
LAB = {"Authorization": f"Bearer {KEYS['lab']}"}


@pytest.fixture(scope="module")
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture(scope="module")
def url(engine: FakeEngine) -> Iterator[str]:
    with serving(engine, Settings(base="nano", limits=LIMITS, keys=ApiKeys(KEYS))) as server_url:
        yield server_url


def chat(url: str, body: Any, **headers: str) -> Response:
    return call(url, "POST", "/v1/chat/completions", body, WARD | headers)


def test_a_key_is_required_except_for_the_page_and_health(url: str) -> None:
    for path in ("/v1/models", "/v1/files", "/v1/adapters", "/reviews/a.html"):
        response = call(url, "GET", path)
        assert (response.status, response.headers["www-authenticate"]) == (401, "Bearer"), path
        assert call(url, "GET", path, headers={"Authorization": "Bearer wrong"}).status == 401
    assert call(url, "GET", "/v1/models", headers=WARD).status == 200
    assert call(url, "GET", "/healthz").status == call(url, "GET", "/").status == 200
    with (
        openai.OpenAI(base_url=f"{url}/v1", api_key="not this one", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()


def test_a_cookie_gives_access_to_reviews_only(url: str) -> None:
    session = call(url, "POST", "/v1/session", headers=WARD)
    cookie = session.headers["set-cookie"]
    assert session.status == 204 and KEYS["ward"] not in cookie
    assert all(word in cookie for word in ("HttpOnly", "SameSite=strict", "Path=/reviews"))
    cookie_header = {"Cookie": cookie.partition(";")[0]}
    assert call(url, "GET", "/reviews/a.html", headers=cookie_header).status == 404
    assert call(url, "GET", "/reviews/a.html", headers={"Cookie": "normtune=zz"}).status == 401
    assert call(url, "GET", "/v1/models", headers=cookie_header).status == 401


def test_files_are_visible_only_to_their_key(url: str) -> None:
    file_id = upload(url, image_bytes(), **WARD).json["id"]
    assert call(url, "GET", f"/v1/files/{file_id}", headers=WARD).status == 200
    assert call(url, "GET", f"/v1/files/{file_id}", headers=LAB).status == 404
    assert call(url, "GET", "/v1/files", headers=LAB).json["data"] == []
    body = chat_body(image=file_id)
    assert call(url, "POST", "/v1/chat/completions", body, LAB).status == 404


def message(content: Any, role: str = "user") -> dict[str, Any]:
    return {"model": "chest", "messages": [{"role": role, "content": content}]}


def conversation(first: str, *others: str) -> dict[str, Any]:
    texts = [[IMAGE, {"type": "text", "text": first}], *others]
    roles = ("user", "assistant") * len(texts)
    messages = [{"role": role, "content": content} for role, content in zip(roles, texts, strict=False)]
    return {"model": "chest", "messages": messages}


IMAGE = {"type": "image_url", "image_url": {"url": data_url(image_bytes())}}


def test_a_conversation_is_read_with_its_earlier_turns() -> None:
    body = ChatRequest.model_validate(conversation("What is shown?", "A CT.", "Where?"))
    body.messages.insert(0, Message(role="system", content="Be brief."))
    question, history, references = read_messages(body.messages)
    assert (question, history, len(references)) == ("Where?", (("What is shown?", "A CT."),), 1)


@pytest.mark.parametrize(
    ("body", "status", "text"),
    [
        (chat_body(model="chset"), 404, "did you mean 'chest'?"),
        (message("Is it normal?"), 400, "no image"),
        (message([IMAGE], "assistant"), 400, "one question at a time"),
        ({"model": "chest", "messages": 2 * message([IMAGE])["messages"]}, 400, "and the answers to them in turn"),
        (conversation("", "A CT.", "Where?"), 400, "an earlier message is empty"),
        (conversation("What is shown?", "A CT."), 400, "end with a user message"),
        (conversation("What is shown?", "x" * 5_000, "Where?"), 400, "the conversation has more than 4,000 characters"),
        (message([IMAGE] * 3), 400, "more than 2 images"),
        (message([{"type": "audio"}]), 400, "messages.0.content"),
        (message([{"type": "image_url", "image_url": {}}]), 400, "image_url.url: field required"),
        ({"model": "chest", "messages": []}, 400, "messages"),
        ({"messages": message([IMAGE])["messages"]}, 400, "model: field required"),
        (chat_body(n=2), 400, "n: a question gets one answer"),
        (chat_body(beams=99), 400, "beams"),
        (chat_body(max_tokens=0), 400, "max_tokens"),
        (chat_body("x" * 5_000), 400, "more than 4,000 characters"),
        (chat_body("\ud800"), 400, "a lone surrogate"),
        (chat_body(image="data:image/png;base64,@@@@"), 400, "not base64"),
        (chat_body(image="data:image/png,raw"), 400, "data URL in base64"),
        (chat_body(image="https://example.org/a.png"), 400, "not fetched"),
        (chat_body(image="file:///etc/passwd"), 400, "not fetched"),
        (chat_body(image="/etc/passwd"), 400, "not fetched"),
        (chat_body(image="file-../../etc/passwd"), 404, "no such file"),
        (chat_body(image="http://["), 400, "URL is not valid"),
        (chat_body(image=data_url(image_bytes((200, 200)))), 400, "10,000 pixels"),
        (chat_body(beams="2"), 400, "beams: input should be a valid integer"),
        (chat_body(stream="yes"), 400, "stream: input should be a valid boolean"),
        (chat_body(stop=["a"] * 5), 400, "stop: list should have at most 4 items"),
        (chat_body(stop=""), 400, "stop.0: string should have at least 1 character"),
        (chat_body(top_k=5), 400, "top_k: this parameter is not supported"),
        (message([{"type": "image_url", "image_url": 5}]), 400, "image_url: input should be an object"),
        (message([{"type": "file", "file": {}}]), 400, "give either file_id or file_data"),
        (message([IMAGE, {"type": "file", "file": {"file_data": "data:,x"}}]), 400, "image 2: not a data URL"),
        (message([{"type": "file", "file": {"file_data": "data:,x"}}, IMAGE]), 400, "image 1: not a data URL"),
        (chat_body(max_tokens=1.5), 400, "max_tokens"),
        (b"{", 400, "not JSON"),
        (b"[" * 100_000, 400, ""),
        (b"\xff\xfe\x00", 400, ""),
        (b'"' + b"a" * (1 << 20) + b'"', 413, "1 MiB"),
    ],
)
def test_an_invalid_request_gets_one_sentence(url: str, body: Any, status: int, text: str) -> None:
    response = chat(url, body, **{"Content-Type": "application/json"})
    assert response.status == status and text in response.error_message and response.error_message.endswith((".", "?"))
    assert "passwd" not in response.error_message and "\n" not in response.error_message
    assert set(response.json["error"]) == {"message", "type", "param", "code"}


# OpenAI's parameters: values that change nothing, and values that would change the answer.
PARAMETERS: dict[str, tuple[list[Any], list[Any]]] = {
    "audio": ([], [{"format": "wav", "voice": "alloy"}]),
    "frequency_penalty": ([0, 0.0], [0.5, -1]),
    "function_call": (["none", "auto"], [{"name": "f"}]),
    "functions": ([[]], [[{"name": "f"}]]),
    "logit_bias": ([{}], [{"5": -100}]),
    "logprobs": ([False], [True]),
    "modalities": ([["text"]], [["text", "audio"]]),
    "n": ([1], [2, 0]),
    "parallel_tool_calls": ([True, False], []),
    "prediction": ([], [{"type": "content", "content": "no"}]),
    "presence_penalty": ([0], [1]),
    "reasoning_effort": ([], ["high"]),
    "response_format": ([{"type": "text"}], [{"type": "json_object"}, {"type": "json_schema", "json_schema": {}}]),
    "seed": ([7], ["7"]),
    "service_tier": (["auto"], ["flex"]),
    "store": ([False], [True]),
    "temperature": ([0, 1, 1.0], [0.7, 2]),
    "tool_choice": (["none", "auto"], ["required", {"type": "function", "function": {"name": "f"}}]),
    "tools": ([[]], [[{"type": "function", "function": {"name": "f"}}]]),
    "top_logprobs": ([0], [5]),
    "top_p": ([1], [0.9]),
    "user": (["ward-7"], [7]),
    "verbosity": ([], ["high"]),
    "web_search_options": ([], [{}]),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_parameter_is_accepted_if_it_changes_nothing_and_else_refused(url: str, name: str) -> None:
    neutral, others = PARAMETERS[name]
    for value in [None, *neutral]:
        assert chat(url, chat_body(**{name: value})).status == 200, value
    for value in others:
        response = chat(url, chat_body(**{name: value}))
        assert response.status == 400 and response.error_message.startswith(f"{name}"), value
        assert response.error_message.endswith("."), value


def test_every_parameter_of_openais_client_has_a_test() -> None:
    """A parameter that is new in OpenAI's API is refused as unknown until it is added."""
    parameters = {*CompletionCreateParamsBase.__annotations__} - {"model", "messages"}
    honoured = {"max_tokens", "max_completion_tokens", "stop", "stream", "stream_options", "metadata"}
    names = {"safety_identifier", "prompt_cache_key"}
    refused_as_unknown = parameters - {*ChatRequest.model_fields}
    assert (
        parameters - {*PARAMETERS} - honoured - names
        <= refused_as_unknown
        <= {"moderation", "prompt_cache_options", "prompt_cache_retention"}
    )


def test_unknown_urls_and_methods_get_the_error_object(url: str) -> None:
    for method, path, status, methods in (
        ("GET", "/v1/gone", 404, None),
        ("PUT", "/v1/models", 405, "GET, HEAD"),
        ("PATCH", "/v1/files/file-1", 405, "DELETE, GET, HEAD"),
        ("PUT", "/v1/batch", 405, "POST"),
        ("GET", "/../etc", 404, None),
    ):
        response = call(url, method, path, headers=WARD)
        assert response.status == status and response.error_message and response.headers.get("allow") == methods


def test_whole_numbers_may_be_written_as_floats(url: str) -> None:
    assert chat(url, chat_body(max_tokens=16.0, beams=1.0)).status == 200


def test_connections_have_tcp_nodelay() -> None:
    with (
        listen("127.0.0.1", 0) as listening,
        socket.create_connection(listening.getsockname()),
        listening.accept()[0] as accepted,
    ):
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_the_size_limit_applies_to_chunked_bodies(url: str) -> None:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=20)
    connection.request("POST", "/v1/chat/completions", (b"x" * 65536 for _ in range(40)), WARD, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()


def test_without_a_root_adapters_cannot_be_changed(url: str) -> None:
    assert call(url, "POST", "/v1/adapters", {"name": "x"}, WARD).status == 403
    assert call(url, "DELETE", "/v1/adapters/chest", headers=WARD).status == 403


def test_an_engine_error_is_500_and_the_log_has_only_its_type_and_place(
    url: str, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.error = RuntimeError("Jane Doe has it, /home/x")
    try:
        with caplog.at_level(logging.INFO):
            whole = chat(url, chat_body("Has Jane Doe it?"))
            stream = chat(url, chat_body("Has Jane Doe it?", stream=True))
    finally:
        engine.error = None
    assert whole.status == 500 and "Jane" not in str(whole.json)
    assert b'"error"' in stream.body and b"Jane" not in stream.body and stream.body.endswith(b"[DONE]\n\n")
    assert "RuntimeError" in caplog.text and "POST /v1/chat/completions 500" in caplog.text
    assert "Jane" not in caplog.text and "/home" not in caplog.text and " ward" in caplog.text


def test_a_full_queue_and_a_rate_limit_get_429_with_retry_after(caplog: pytest.LogCaptureFixture) -> None:
    engine = FakeEngine(queue_limit=0)
    limits = Limits(per_minute=60, burst=3)
    with (
        serving(engine, Settings(base="nano", limits=limits)) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        with pytest.raises(openai.RateLimitError) as error:
            client.chat.completions.create(model="chest", messages=chat_body()["messages"])
        assert error.value.code == "busy" and error.value.response.headers["retry-after"] == "1"
        answers = [call(url, "GET", "/v1/models") for _ in range(4)]
        assert [answer.status for answer in answers][:2] == [200, 200] and answers[-1].status == 429
        assert int(answers[-1].headers["retry-after"]) >= 1
        assert call(url, "GET", "/healthz").status == 200


def test_too_many_questions_in_progress_get_429_before_their_bodies_are_read() -> None:
    engine = FakeEngine()
    engine.may_answer.clear()
    with serving(engine, Settings(base="nano", limits=Limits(questions=2))) as url, ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(call, url, "POST", "/v1/chat/completions", chat_body()) for _ in range(2)]
        wait_until(lambda: len(engine.requests) == 2)
        response = call(url, "POST", "/v1/chat/completions", b"not even JSON")
        assert (response.status, response.json["error"]["code"]) == (429, "busy")
        assert call(url, "GET", "/v1/models").status == 200
        engine.may_answer.set()
        assert [future.result(20).status for future in waiting] == [200, 200]
        assert call(url, "POST", "/v1/chat/completions", chat_body()).status == 200


def test_images_beyond_the_memory_budget_get_429(engine: FakeEngine) -> None:
    with serving(FakeEngine(), Settings(base="nano", limits=Limits(shared_bytes=2_000))) as url:
        body = chat_body(image=data_url(image_bytes((40, 40))))
        assert call(url, "POST", "/v1/chat/completions", body).status == 429
        for _ in range(3):  # memory is released after each request
            response = call(url, "POST", "/v1/chat/completions", chat_body())
            assert response.status == 200, response.body


def test_without_keys_only_loopback_hosts_and_same_site_requests_are_accepted() -> None:
    with serving(FakeEngine(), Settings(base="nano", hosts=allowed_hosts("127.0.0.1"))) as url:
        assert call(url, "GET", "/v1/models").status == 200
        assert call(url, "GET", "/v1/models", headers={"Host": "localhost:8000"}).status == 200
        assert call(url, "GET", "/v1/models", headers={"Host": "evil.example"}).status == 421
        body, kind = json.dumps(chat_body()).encode(), {"Content-Type": "application/json"}
        other = kind | {"Sec-Fetch-Site": "cross-site"}
        assert call(url, "POST", "/v1/chat/completions", body, other).status == 403
    assert allowed_hosts("0.0.0.0") is None


class _Pictures(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/a.png")
            self.end_headers()
            return
        data = b"x" * (33 << 20) if self.path == "/huge" else image_bytes()
        self.send_response(200)
        self.end_headers()
        try:
            self.wfile.write(data)
        except OSError:
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


def test_images_are_fetched_only_from_allowed_hosts_without_redirects() -> None:
    image_server = HTTPServer(("127.0.0.1", 0), _Pictures)
    threading.Thread(target=image_server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    host = f"127.0.0.1:{image_server.server_port}"
    try:
        settings = Settings(base="nano", remote_hosts=frozenset([host]))
        with serving(FakeEngine(), settings) as url:

            def ask_about(image: str) -> Response:
                return call(url, "POST", "/v1/chat/completions", chat_body(image=image))

            assert ask_about(f"http://{host}/a.png").status == 200
            for bad in (f"http://{host}/moved", f"http://{host}/huge", f"http://a@{host}/a.png"):
                assert ask_about(bad).status == 400, bad
            assert ask_about(f"http://localhost:{image_server.server_port}/a.png").status == 400
    finally:
        image_server.shutdown()
        image_server.server_close()
