"""The server's addresses, and OpenAI's own client against them."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import openai
import pytest
from PIL import Image

from normtune.serving.http.openai_api import adapter_entry, model_entry
from normtune.serving.http.state import Settings
from tests.support.dataset_samples import dicom, dicom_bytes
from tests.support.fake_engine import FakeEngine, info
from tests.support.test_server import call, data_url, picture, question, serving, upload


@pytest.fixture(scope="module")
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter root and, beside it, reviews."""
    path = tmp_path_factory.mktemp("served")
    for name in ("adapters/knee", "adapters/runs/hip", "adapters/empty", "outside", "reviews"):
        (path / name).mkdir(parents=True)
    for name in ("adapters/knee", "adapters/runs/hip", "outside"):
        (path / name / "adapter.json").write_text("{}")
    (path / "adapters" / "link").symlink_to(path / "outside")
    (path / "reviews" / "slake.html").write_text("<p>rows</p>")
    (path / "reviews" / "notes.txt").write_text("secret")
    (path / "reviews" / "way.html").symlink_to(path / "outside" / "adapter.json")
    return path


@pytest.fixture(scope="module")
def url(engine: FakeEngine, folders: Path) -> Iterator[str]:
    settings = Settings(base="nano", adapter_root=folders / "adapters", reviews=folders / "reviews")
    with serving(engine, settings) as found:
        yield found


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as found:
        yield found


def test_openais_client_lists_models_and_asks(client: openai.OpenAI) -> None:
    assert {one.id for one in client.models.list()} >= {"nano", "chest", "brain"}
    assert client.models.retrieve("chest").owned_by == "normtune"
    for model, who in (("chest", "chest"), ("nano", "base")):
        body = question("Is it normal?", model=model)
        found = client.chat.completions.create(model=model, messages=body["messages"])
        assert found.choices[0].message.content == f"{who} sees 24x16: Is it normal?"
        assert found.choices[0].finish_reason == "stop" and found.model == model
        assert found.usage is not None and found.usage.total_tokens == 12 + 7
        assert found.model_extra is not None
        assert found.model_extra["normtune"]["confidence"] == pytest.approx(math.exp(-0.25))


def test_openais_client_streams(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.pieces = 3
    try:
        chunks = list(
            client.chat.completions.create(
                model="brain",
                messages=question("Which plane?")["messages"],
                stream=True,
                stream_options={"include_usage": True},
            )
        )
    finally:
        engine.pieces = 1
    texts = [c.choices[0].delta.content for c in chunks if c.choices and c.choices[0].delta.content]
    assert "".join(texts) == "brain sees 24x16: Which plane?" and len(texts) == 3
    assert chunks[-2].choices[0].finish_reason == "stop" and chunks[-2].model_extra is not None
    assert chunks[-2].model_extra["normtune"]["score"] == -0.25
    assert chunks[-1].usage is not None and chunks[-1].usage.prompt_tokens == 12


def test_openais_client_uploads_and_asks_of_what_it_uploaded(client: openai.OpenAI) -> None:
    held = client.files.create(file=("doe_jane.jpg", picture((40, 30), "JPEG")), purpose="vision")
    assert held.filename == "image.png" and "doe" not in held.model_dump_json()
    with Image.open(io.BytesIO(client.files.content(held.id).read())) as png:
        assert png.size == (40, 30) and png.format == "PNG"
    found = client.chat.completions.create(model="chest", messages=question(image=held.id)["messages"])
    assert found.choices[0].message.content == "chest sees 40x30: Is it normal?"
    assert held.id in {one.id for one in client.files.list()}
    client.files.delete(held.id)
    with pytest.raises(openai.NotFoundError, match="Upload it anew"):
        client.chat.completions.create(model="chest", messages=question(image=held.id)["messages"])


def test_a_model_tells_what_it_was_trained_on_and_not_where_that_lies(url: str) -> None:
    data = {"name": "slake", "split": "train", "licence": "CC-BY-4.0", "task": "report", "pairs": 9}
    trained = replace(info("chest"), data=data | {"root": "/data/ward-7"})
    for entry in (model_entry("chest", 0.0, trained), adapter_entry(trained)):
        assert entry["data"] == data and entry["recipe"] == trained.recipe
    base, *adapters = call(url, "GET", "/v1/models").json["data"]
    assert "recipe" not in base and all(one["recipe"] for one in adapters)


def test_without_text_a_report_is_written_and_views_keep_their_order(url: str, engine: FakeEngine) -> None:
    images = [{"type": "image_url", "image_url": {"url": data_url(picture((8 + n, 8)))}} for n in range(2)]
    body = {"model": "chest", "messages": [{"role": "user", "content": images}], "beams": 3}
    found = call(url, "POST", "/v1/chat/completions", body)
    assert found.json["choices"][0]["message"]["content"] == "chest sees 8x8 9x8: a report"
    assert (engine.asked[-1].max_new_tokens, engine.asked[-1].beams) == (128, 3)


def test_an_answer_that_fills_its_limit_says_so(url: str) -> None:
    found = call(url, "POST", "/v1/chat/completions", question(max_completion_tokens=7)).json
    assert found["choices"][0]["finish_reason"] == "length"


def test_a_batch_answers_each_line_by_its_id(url: str) -> None:
    rows = [{"custom_id": f"r{n}", "body": question(f"Question {n}?")} for n in range(70)]
    rows[3]["body"] = question(image="file-gone")
    data = "\n".join(json.dumps(row) for row in rows).encode() + b"\n\n"
    found = call(url, "POST", "/v1/batch", data, {"Content-Type": "application/jsonl"})
    lines = {(one := json.loads(line))["custom_id"]: one["response"] for line in found.body.splitlines()}
    assert found.status == 200 and list(lines) == [row["custom_id"] for row in rows]
    assert lines["r3"]["status_code"] == 404
    said = lines["r69"]["body"]["choices"][0]["message"]["content"]
    assert said == "chest sees 24x16: Question 69?"


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "empty"),
        (b"{", "line 1"),
        (b'{"custom_id": "a", "body": {"model": "chest"}}', "line 1: body.messages: field required"),
        (2 * (json.dumps({"custom_id": "a", "body": question()}).encode() + b"\n"), "line 2: its custom_id"),
        (b"[" * 100_000, "line 1"),
        (b"\xff\xfe", "line 1"),
    ],
)
def test_a_batch_that_cannot_be_read_names_its_line(url: str, data: bytes, told: str) -> None:
    found = call(url, "POST", "/v1/batch", data)
    assert found.status == 400 and told in found.sentence


def test_adapters_come_from_below_the_root_alone(url: str, folders: Path) -> None:
    made = call(url, "POST", "/v1/adapters", {"name": "knee"})
    assert made.status == 201 and made.json["recipe"] == "language=ln" and "secret" not in str(made.json)
    assert call(url, "POST", "/v1/adapters", {"name": "hip", "folder": "runs/hip"}).status == 201
    assert {one["id"] for one in call(url, "GET", "/v1/adapters").json["data"]} >= {"chest", "knee", "hip"}
    said = call(url, "POST", "/v1/chat/completions", question(model="knee")).json
    assert said["choices"][0]["message"]["content"].startswith("knee sees")
    assert call(url, "POST", "/v1/adapters", {"name": "knee"}).status == 409
    assert call(url, "POST", "/v1/adapters", {"name": "nano", "folder": "knee"}).status == 409
    assert call(url, "DELETE", "/v1/adapters/knee").json["deleted"]
    assert call(url, "DELETE", "/v1/adapters/knee").status == 404
    call(url, "DELETE", "/v1/adapters/hip")
    outside = (
        "../outside",
        "link",
        str(folders / "outside"),
        "runs/../../outside",
        "a\0b",
        "..",
        "runs//hip",
    )
    for folder in outside:
        found = call(url, "POST", "/v1/adapters", {"name": "x", "folder": folder})
        assert found.status in (400, 404), folder
        assert str(folders) not in found.sentence
    broken = call(url, "POST", "/v1/adapters", {"name": "empty"})
    assert broken.status == 400 and "adapter.json is missing" in broken.sentence
    assert str(folders) not in broken.sentence


def test_reviews_are_pages_of_their_folder_alone_and_cannot_reach_the_server(url: str) -> None:
    assert call(url, "GET", "/v1/reviews").json["data"] == ["slake.html"]
    found = call(url, "GET", "/reviews/slake.html")
    assert found.body == b"<p>rows</p>" and "sandbox" in found.headers["content-security-policy"]
    for name in ("notes.txt", "way.html", "..%2Foutside%2Fadapter.json", "gone.html", "%2e%2e/slake.html"):
        assert call(url, "GET", f"/reviews/{name}").status == 404, name


def test_metrics_are_prometheus_text_and_name_routes_not_addresses(url: str) -> None:
    call(url, "GET", "/v1/files/file-jane-doe?name=jane")
    found = call(url, "GET", "/metrics")
    text = found.body.decode()
    assert found.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert 'route="/v1/files/{id}",status="404"' in text and "jane" not in text
    assert "normtune_queue_length 0\n" in text
    assert 'normtune_http_request_seconds_bucket{route="/v1/models",le="+Inf"}' in text


def test_it_is_healthy_and_the_schema_names_every_address(url: str) -> None:
    assert call(url, "GET", "/healthz").json["status"] == "ok"
    paths = call(url, "GET", "/openapi.json").json["paths"]
    assert {"/v1/chat/completions", "/v1/models", "/v1/adapters", "/v1/batch", "/v1/files"} <= set(paths)


def test_dicom_is_shown_as_png_without_anything_else_of_it(url: str) -> None:
    file = dicom(np.arange(12, dtype=np.uint16).reshape(3, 4), PatientName="Doe^Jane")
    found = upload(url, dicom_bytes(file), "doe.dcm").json
    png = call(url, "GET", f"/v1/files/{found['id']}/content").body
    assert png.startswith(b"\x89PNG") and b"Doe" not in png and (found["width"], found["height"]) == (4, 3)
