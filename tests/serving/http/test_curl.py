"""The server from a shell: curl uploads, asks, and reads a stream and a batch."""

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
from tests.support.test_server import data_url, picture, question, serving

CURL = shutil.which("curl")
KEY = "k" * 20
JSON = "Content-Type: application/json"

pytestmark = pytest.mark.skipif(CURL is None, reason="curl is not installed")


@pytest.fixture(scope="module")
def curl() -> Iterator[Callable[..., str]]:
    """Runs curl with a key and the address, and gives what it prints."""
    with serving(FakeEngine(), Settings(base="nano", keys=ApiKeys({"ward": KEY}))) as url:

        def run(path: str, *options: str, data: bytes | None = None) -> str:
            held = ["-H", f"Authorization: Bearer {KEY}", "--max-time", "20", *options]
            command = [str(CURL), "-q", "-sS", "--noproxy", "*", *held, url + path]
            done = subprocess.run(command, input=data, capture_output=True, check=True)
            return done.stdout.decode()

        yield run


def test_curl_uploads_an_image_and_asks_about_it(curl: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "scan.png").write_bytes(picture())
    form = ("-F", "purpose=vision", "-F", f"file=@{tmp_path / 'scan.png'}")
    held = json.loads(curl("/v1/files", *form))
    found = json.loads(curl("/v1/chat/completions", "-H", JSON, "-d", json.dumps(question(image=held["id"]))))
    assert found["choices"][0]["message"]["content"] == "chest sees 24x16: Is it normal?"
    assert json.loads(curl(f"/v1/files/{held['id']}", "-X", "DELETE"))["deleted"] is True


def test_curl_sends_more_than_it_is_told_to_wait_for(curl: Callable[..., str]) -> None:
    """Of bodies above 1 MiB it sends the head alone, and waits for `100 Continue`."""
    body = json.dumps(question(image=data_url(picture()) + "\n" * (1 << 20)))
    found = json.loads(curl("/v1/chat/completions", "-H", JSON, "--data-binary", "@-", data=body.encode()))
    assert found["choices"][0]["finish_reason"] == "stop"


def test_curl_reads_a_stream_and_a_batch(curl: Callable[..., str]) -> None:
    body = json.dumps(question(stream=True))
    events = curl("/v1/chat/completions", "-N", "-H", JSON, "-d", body).split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""] and "chest sees 24x16" in "".join(events)
    rows = "\n".join(json.dumps({"custom_id": str(n), "body": question()}) for n in range(3))
    lines = curl(
        "/v1/batch", "-H", "Content-Type: application/jsonl", "--data-binary", "@-", data=rows.encode()
    )
    assert [json.loads(line)["custom_id"] for line in lines.splitlines()] == ["0", "1", "2"]


def test_curl_is_told_what_is_wrong(curl: Callable[..., str]) -> None:
    told = curl("/v1/models", "-H", "Authorization: Bearer wrong", "-w", " %{http_code}")
    assert told.endswith(" 401") and "a key is needed" in told
