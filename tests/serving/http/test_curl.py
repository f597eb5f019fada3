"""The server through curl: uploads, questions, streams, batches and errors."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from normtune.serving.http.limits import ApiKeys
from normtune.serving.http.state import Settings
from tests.support.fake_engine import FakeEngine
from tests.support.test_server import chat_body, data_url, image_bytes, serving

CURL = shutil.which("curl")
KEY = "k" * 20
JSON = "Content-Type: application/json"

pytestmark = pytest.mark.skipif(CURL is None, reason="curl is not installed")


@pytest.fixture(scope="module")
def curl() -> Iterator[Callable[..., str]]:
    """A function that runs curl on a path of the server, with an API key, and returns its output."""
    with serving(FakeEngine(), Settings(base="nano", keys=ApiKeys({"ward": KEY}))) as url:

        def run(path: str, *options: str, data: bytes | None = None) -> str:
            arguments = ["-H", f"Authorization: Bearer {KEY}", "--max-time", "20", *options]
            command = [str(CURL), "-q", "-sS", "--noproxy", "*", *arguments, url + path]
            done = subprocess.run(command, input=data, capture_output=True, check=True)
            return done.stdout.decode()

        yield run


def test_curl_uploads_an_image_and_asks_about_it(curl: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "scan.png").write_bytes(image_bytes())
    form = ("-F", "purpose=vision", "-F", f"file=@{tmp_path / 'scan.png'}")
    upload_entry = json.loads(curl("/v1/files", *form))
    completion = json.loads(
        curl("/v1/chat/completions", "-H", JSON, "-d", json.dumps(chat_body(image=upload_entry["id"])))
    )
    assert completion["choices"][0]["message"]["content"] == "chest sees 24x16: Is it normal?"
    assert json.loads(curl(f"/v1/files/{upload_entry['id']}", "-X", "DELETE"))["deleted"] is True


def test_curl_sends_large_bodies_after_100_continue(curl: Callable[..., str]) -> None:
    """For bodies above 1 MiB curl sends the headers first, and waits for `100 Continue`."""
    body = json.dumps(chat_body(image=data_url(image_bytes()) + "\n" * (1 << 20)))
    completion = json.loads(curl("/v1/chat/completions", "-H", JSON, "--data-binary", "@-", data=body.encode()))
    assert completion["choices"][0]["finish_reason"] == "stop"


def test_curl_reads_a_stream_and_a_batch(curl: Callable[..., str]) -> None:
    body = json.dumps(chat_body(stream=True))
    events = curl("/v1/chat/completions", "-N", "-H", JSON, "-d", body).split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""] and "chest sees 24x16" in "".join(events)
    rows = "\n".join(json.dumps({"custom_id": str(n), "body": chat_body()}) for n in range(3))
    lines = curl("/v1/batch", "-H", "Content-Type: application/jsonl", "--data-binary", "@-", data=rows.encode())
    assert [json.loads(line)["custom_id"] for line in lines.splitlines()] == ["0", "1", "2"]


def test_curl_receives_status_and_message_of_an_error(curl: Callable[..., str]) -> None:
    output = curl("/v1/models", "-H", "Authorization: Bearer wrong", "-w", " %{http_code}")
    assert output.endswith(" 401") and "an API key is required" in output
