"""The routes of the server, also through OpenAI's own client."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from normtune.data.images.files import open_image
from normtune.serving.engine.requests import NameTaken, ServedAdapter, UnusableAdapter
from normtune.serving.http.openai_api import adapter_entry, model_entry
from normtune.serving.http.prometheus import BOUNDS
from normtune.serving.http.state import Settings
from tests.support.dataset_samples import dicom_bytes, make_dicom
from tests.support.fake_engine import FakeEngine, adapter_info
from tests.support.test_server import call, chat_body, data_url, image_bytes, serving, upload


@pytest.fixture(scope="module")
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture(scope="module")
def served_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an adapter root, a folder of reviews, and an adapter outside of both."""
    root = tmp_path_factory.mktemp("served")
    for name in ("adapters/knee", "adapters/runs/hip", "adapters/empty", "outside", "reviews"):
        (root / name).mkdir(parents=True)
    for name in ("adapters/knee", "adapters/runs/hip", "outside"):
        (root / name / "adapter.json").write_text("{}")
    (root / "adapters" / "link").symlink_to(root / "outside")
    (root / "reviews" / "slake.html").write_text("<p>rows</p>")
    (root / "reviews" / "notes.txt").write_text("secret")
    (root / "reviews" / "way.html").symlink_to(root / "outside" / "adapter.json")
    return root


@pytest.fixture(scope="module")
def url(engine: FakeEngine, served_folders: Path) -> Iterator[str]:
    settings = Settings(base="nano", adapter_root=served_folders / "adapters", reviews=served_folders / "reviews")
    with serving(engine, settings) as server_url:
        yield server_url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as openai_client:
        yield openai_client


def test_openai_client_lists_models_and_asks_questions(client: openai.OpenAI) -> None:
    assert {entry.id for entry in client.models.list()} >= {"nano", "chest", "brain"}
    assert client.models.retrieve("chest").owned_by == "normtune"
    for model, who in (("chest", "chest"), ("nano", "base")):
        body = chat_body("Is it normal?", model=model)
        completion = client.chat.completions.create(model=model, messages=body["messages"])
        assert completion.choices[0].message.content == f"{who} sees 24x16: Is it normal?"
        assert completion.choices[0].finish_reason == "stop" and completion.model == model
        assert completion.usage is not None and completion.usage.total_tokens == 12 + 7
        assert completion.model_extra is not None
        assert completion.model_extra["normtune"]["confidence"] == pytest.approx(math.exp(-0.25))


def test_openai_client_streams(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.text_callbacks = 3
    try:
        chunks = list(
            client.chat.completions.create(
                model="brain",
                messages=chat_body("Which plane?")["messages"],
                stream=True,
                stream_options={"include_usage": True},
            )
        )
    finally:
        engine.text_callbacks = 1
    texts = [c.choices[0].delta.content for c in chunks if c.choices and c.choices[0].delta.content]
    assert "".join(texts) == "brain sees 24x16: Which plane?" and len(texts) == 3
    assert chunks[-2].choices[0].finish_reason == "stop" and chunks[-2].model_extra is not None
    assert chunks[-2].model_extra["normtune"]["score"] == -0.25
    assert chunks[-1].usage is not None and chunks[-1].usage.prompt_tokens == 12


def test_an_answer_below_the_threshold_is_a_refusal(client: openai.OpenAI, engine: FakeEngine) -> None:
    options: dict[str, Any] = {"model": "chest", "messages": chat_body("Why?")["messages"]}
    refused = client.chat.completions.create(**options, extra_body={"abstain_below": 0.8})  # the confidence is 0.78
    message = refused.choices[0].message
    assert message.content is None and message.refusal == "The model's confidence in its answer is too low."
    assert refused.model_extra is not None and refused.model_extra["normtune"]["abstained"] is True
    answered = client.chat.completions.create(**options, extra_body={"abstain_below": 0.7})
    assert answered.choices[0].message.content == "chest sees 24x16: Why?"
    assert answered.choices[0].message.refusal is None and engine.requests[-1].abstain_below == 0.7
    for threshold, content, refusal in ((0.8, "", message.refusal), (0.7, "chest sees 24x16: Why?", "")):
        chunks = list(client.chat.completions.create(**options, stream=True, extra_body={"abstain_below": threshold}))
        deltas = [chunk.choices[0].delta for chunk in chunks]
        assert "".join(delta.content or "" for delta in deltas) == content
        assert "".join(delta.refusal or "" for delta in deltas) == refusal
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(**options, extra_body={"abstain_below": 2})


def test_options_have_the_letter_of_the_answer(client: openai.OpenAI, engine: FakeEngine) -> None:
    options: dict[str, Any] = {"model": "chest", "messages": chat_body("Where?")["messages"]}
    answered = client.chat.completions.create(**options, extra_body={"options": ["brain", "chest"]})
    assert engine.requests[-1].options == ("brain", "chest")
    assert answered.model_extra is not None and answered.model_extra["normtune"]["choice"] == "B"  # "chest sees ..."
    plain = client.chat.completions.create(**options)
    assert plain.model_extra is not None and plain.model_extra["normtune"]["choice"] is None
    for wrong in (["chest"], ["chest"] * 27, ["chest", ""]):
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(**options, extra_body={"options": wrong})


def test_a_client_cannot_lower_the_threshold_of_the_server() -> None:
    engine = FakeEngine()
    with serving(engine, Settings(base="nano", abstain_below=0.5)) as url:
        for sent, used in ((0.2, 0.5), (0.9, 0.9)):
            call(url, "POST", "/v1/chat/completions", chat_body("Why?", abstain_below=sent))
            assert engine.requests[-1].abstain_below == used


def test_openai_client_sends_stop_texts_and_gets_finish_reasons(client: openai.OpenAI, engine: FakeEngine) -> None:
    messages = chat_body()["messages"]
    options: dict[str, Any] = {"model": "chest", "messages": messages, "seed": 1, "response_format": {"type": "text"}}
    client.chat.completions.create(**options, stop=["\n", "ab"], temperature=0)
    assert engine.requests[-1].stop == ("\n", "ab")
    client.chat.completions.create(**options, stop=".")
    assert engine.requests[-1].stop == (".",)
    for limit, reason in ((6, "length"), (50, "stop")):
        completion = client.chat.completions.create(**options, max_completion_tokens=limit)
        chunks = list(client.chat.completions.create(**options, max_completion_tokens=limit, stream=True))
        assert completion.choices[0].finish_reason == chunks[-1].choices[0].finish_reason == reason
    for unsupported in ({"logprobs": True}, {"response_format": {"type": "json_object"}}):
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(**options | unsupported)
        assert refused.value.param == next(iter(unsupported))


def test_images_of_all_forms_keep_their_order(url: str) -> None:
    """An uploaded file, an object, a URL alone, and a file in the request: each image has its own width."""
    urls = [data_url(image_bytes((8 + number, 8))) for number in range(6)]
    head, _, payload = urls[4].partition(",")
    lines = "\r\n".join(payload[start : start + 60] for start in range(0, len(payload), 60))
    content = [
        {"type": "file", "file": {"file_id": upload(url, image_bytes((8, 8))).json["id"]}},
        {"type": "text", "text": "First"},
        {"type": "image_url", "image_url": {"url": urls[1], "detail": "low"}},
        {"type": "image_url", "image_url": urls[2]},
        {"type": "file", "file": {"file_data": urls[3], "filename": "a.png"}},
        {"type": "text", "text": "second"},
        {"type": "image_url", "image_url": {"url": f"{head.upper()},{lines}"}},
        {"type": "image_url", "image_url": urls[5].rstrip("=").replace("+", "%2B")},
    ]
    body = {"model": "chest", "messages": [{"role": "user", "content": content}]}
    expected = "chest sees 8x8 9x8 10x8 11x8 12x8 13x8: First\nsecond"
    answer = call(url, "POST", "/v1/chat/completions", body)
    assert answer.json["choices"][0]["message"]["content"] == expected
    rows = json.dumps({"custom_id": "a", "body": body}).encode()
    line = json.loads(call(url, "POST", "/v1/batch", rows).body)
    assert line["response"]["body"]["choices"][0]["message"]["content"] == expected


def test_openai_client_uploads_an_image_and_asks_about_it(client: openai.OpenAI) -> None:
    upload_entry = client.files.create(file=("doe_jane.jpg", image_bytes((40, 30), "JPEG")), purpose="vision")
    assert upload_entry.filename == "image.png" and "doe" not in upload_entry.model_dump_json()
    with Image.open(io.BytesIO(client.files.content(upload_entry.id).read())) as png:
        assert png.size == (40, 30) and png.format == "PNG"
    completion = client.chat.completions.create(model="chest", messages=chat_body(image=upload_entry.id)["messages"])
    assert completion.choices[0].message.content == "chest sees 40x30: Is it normal?"
    assert upload_entry.id in {entry.id for entry in client.files.list()}
    client.files.delete(upload_entry.id)
    with pytest.raises(openai.NotFoundError, match="Upload it again"):
        client.chat.completions.create(model="chest", messages=chat_body(image=upload_entry.id)["messages"])


def test_models_show_their_training_data_but_not_its_folder(url: str) -> None:
    data = {"name": "slake", "split": "train", "licence": "CC-BY-4.0", "task": "report", "pairs": 9}
    adapter = replace(adapter_info("chest"), data=data | {"root": "/data/ward-7"})
    for entry in (model_entry("chest", 0.0, adapter), adapter_entry(adapter)):
        assert entry["data"] == data and entry["recipe"] == adapter.recipe
    base, *adapters = call(url, "GET", "/v1/models").json["data"]
    assert "recipe" not in base and all(adapter_model["recipe"] for adapter_model in adapters)


def test_a_message_without_text_requests_a_report(url: str, engine: FakeEngine) -> None:
    images = [{"type": "image_url", "image_url": {"url": data_url(image_bytes((8 + n, 8)))}} for n in range(2)]
    body = {"model": "chest", "messages": [{"role": "user", "content": images}], "beams": 3}
    response = call(url, "POST", "/v1/chat/completions", body)
    assert response.json["choices"][0]["message"]["content"] == "chest sees 8x8 9x8: a report"
    assert (engine.requests[-1].max_new_tokens, engine.requests[-1].beams) == (128, 3)


def test_an_answer_at_its_token_limit_has_finish_reason_length(url: str) -> None:
    response = call(url, "POST", "/v1/chat/completions", chat_body(max_completion_tokens=7)).json
    assert response["choices"][0]["finish_reason"] == "length"


def test_a_batch_answers_each_line_by_its_id(url: str) -> None:
    rows = [{"custom_id": f"r{n}", "body": chat_body(f"Question {n}?")} for n in range(70)]
    rows[3]["body"] = chat_body(image="file-gone")
    data = "\n".join(json.dumps(row) for row in rows).encode() + b"\n\n"
    response = call(url, "POST", "/v1/batch", data, {"Content-Type": "application/jsonl"})
    responses = {(entry := json.loads(line))["custom_id"]: entry["response"] for line in response.body.splitlines()}
    assert response.status == 200 and list(responses) == [row["custom_id"] for row in rows]
    assert responses["r3"]["status_code"] == 404
    answer = responses["r69"]["body"]["choices"][0]["message"]["content"]
    assert answer == "chest sees 24x16: Question 69?"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"{", "line 1"),
        (b'{"custom_id": "a", "body": {"model": "chest"}}', "line 1: body.messages: field required"),
        (2 * (json.dumps({"custom_id": "a", "body": chat_body()}).encode() + b"\n"), "line 2: this custom_id"),
        (b"[" * 100_000, "line 1"),
        (b"\xff\xfe", "line 1"),
    ],
)
def test_errors_of_an_invalid_batch_name_the_line(url: str, data: bytes, message: str) -> None:
    response = call(url, "POST", "/v1/batch", data)
    assert response.status == 400 and message in response.error_message


def test_adapters_are_registered_only_from_below_the_root(url: str, served_folders: Path) -> None:
    registered = call(url, "POST", "/v1/adapters", {"name": "knee"})
    assert (
        registered.status == 201 and registered.json["recipe"] == "language=ln" and "secret" not in str(registered.json)
    )
    assert call(url, "POST", "/v1/adapters", {"name": "hip", "folder": "runs/hip"}).status == 201
    assert {entry["id"] for entry in call(url, "GET", "/v1/adapters").json["data"]} >= {"chest", "knee", "hip"}
    completion = call(url, "POST", "/v1/chat/completions", chat_body(model="knee")).json
    assert completion["choices"][0]["message"]["content"].startswith("knee sees")
    assert call(url, "POST", "/v1/adapters", {"name": "knee"}).status == 200, "its new files are used"
    assert call(url, "POST", "/v1/adapters", {"name": "nano", "folder": "knee"}).status == 409
    assert call(url, "DELETE", "/v1/adapters/knee").json["deleted"]
    assert call(url, "DELETE", "/v1/adapters/knee").status == 404
    call(url, "DELETE", "/v1/adapters/hip")
    outside = ("../outside", "link", str(served_folders / "outside"), "runs/../../outside", "a\0b", "..", "runs//hip")
    for folder in outside:
        response = call(url, "POST", "/v1/adapters", {"name": "x", "folder": folder})
        assert response.status in (400, 404), folder
        assert str(served_folders) not in response.error_message
    broken = call(url, "POST", "/v1/adapters", {"name": "empty"})
    assert broken.status == 400 and "adapter.json is missing" in broken.error_message
    assert str(served_folders) not in broken.error_message


def test_an_adapter_whose_files_changed_gets_503_and_a_name_of_another_folder_409(
    engine: FakeEngine, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.error = UnusableAdapter("adapter 'chest' cannot be loaded. Register it again.")
    try:
        answer = call(url, "POST", "/v1/chat/completions", chat_body())
    finally:
        engine.error = None
    assert answer.status == 503 and "Register it again" in answer.error_message and answer.headers["retry-after"]
    assert answer.json["error"]["type"] == "server_error"

    def refuse(name: str, folder: Path) -> ServedAdapter:
        raise NameTaken(f"an adapter '{name}' is already registered from another folder. Remove it first.")

    monkeypatch.setattr(engine, "register", refuse)
    taken = call(url, "POST", "/v1/adapters", {"name": "chest", "folder": "knee"})
    assert taken.status == 409 and "another folder" in taken.error_message


def test_only_review_pages_of_the_folder_are_served_and_in_a_sandbox(url: str) -> None:
    assert call(url, "GET", "/v1/reviews").json["data"] == ["slake.html"]
    response = call(url, "GET", "/reviews/slake.html")
    assert response.body == b"<p>rows</p>" and "sandbox" in response.headers["content-security-policy"]
    for name in ("notes.txt", "way.html", "..%2Foutside%2Fadapter.json", "gone.html", "%2e%2e/slake.html"):
        assert call(url, "GET", f"/reviews/{name}").status == 404, name


def test_metrics_are_prometheus_text_with_route_patterns_instead_of_urls(url: str) -> None:
    call(url, "GET", "/v1/files/file-jane-doe?name=jane")
    response = call(url, "GET", "/metrics")
    text = response.body.decode()
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert 'route="/v1/files/{id}",status="404"' in text and "jane" not in text and "_created" not in text
    metrics = {metric.name: metric for metric in text_string_to_metric_families(text)}
    assert all(name.startswith("normtune_") for name in metrics)
    queue, answers, requests = (metrics[f"normtune_{name}"] for name in ("queue_length", "answers", "http_requests"))
    assert (queue.type, answers.type, requests.type) == ("gauge", "counter", "counter")
    assert [(sample.name, sample.value) for sample in queue.samples] == [("normtune_queue_length", 0)]
    assert {*requests.samples[0].labels} == {"method", "route", "status"}
    seconds = metrics["normtune_http_request_seconds"]
    samples = [sample for sample in seconds.samples if sample.labels["route"] == "/v1/files/{id}"]
    assert seconds.type == "histogram" and [float(s.labels["le"]) for s in samples[:-2]] == [*BOUNDS, math.inf]
    assert samples[-3].value == samples[-2].value >= 1 and samples[-2].name.endswith("_count")


def test_health_and_schema(url: str) -> None:
    assert call(url, "GET", "/healthz").json["status"] == "ok"
    paths = call(url, "GET", "/openapi.json").json["paths"]
    assert {"/v1/chat/completions", "/v1/models", "/v1/adapters", "/v1/batch", "/v1/files"} <= set(paths)


def test_head_is_answered_like_get_without_a_body(url: str) -> None:
    paths = ("/healthz", "/", "/page.js", "/metrics", "/openapi.json", "/v1/models", "/v1/models/chest")
    for path in (*paths, "/v1/adapters", "/v1/files", "/v1/reviews", "/reviews/slake.html", "/v1/models/gone"):
        get, head = call(url, "GET", path), call(url, "HEAD", path)
        assert (head.status, head.body) == (get.status, b""), path
        assert head.headers["content-type"] == get.headers["content-type"], path
    assert call(url, "HEAD", "/v1/batch").status == 405
    assert b'method="HEAD",route="/v1/models/{model:path}",status="200"' in call(url, "GET", "/metrics").body


@pytest.mark.parametrize("kind", ["deep grey", "transparent", "DICOM"])
def test_a_served_image_has_the_pixels_that_datasets_read(url: str, tmp_path: Path, kind: str) -> None:
    values = np.arange(0, 60_000, 5_000, dtype=np.uint16).reshape(3, 4)
    buffer = io.BytesIO()
    if kind == "DICOM":
        buffer.write(
            dicom_bytes(make_dicom(values // 16, BitsStored=12, HighBit=11, WindowCenter=900, WindowWidth=500))
        )
    else:
        picture = Image.fromarray(values) if kind == "deep grey" else Image.new("RGBA", (4, 3), (200, 90, 0, 128))
        picture.save(buffer, "PNG")
    (tmp_path / "image").write_bytes(buffer.getvalue())
    upload_entry = upload(url, buffer.getvalue()).json
    png = call(url, "GET", f"/v1/files/{upload_entry['id']}/content").body
    with Image.open(io.BytesIO(png)) as served:
        assert served.convert("RGB").tobytes() == open_image(tmp_path / "image").tobytes()


def test_a_window_changes_what_the_model_sees_and_is_recorded(url: str, engine: FakeEngine) -> None:
    values = np.arange(0, 2400, 200, dtype=np.uint16).reshape(3, 4)
    file = dicom_bytes(make_dicom(values, RescaleIntercept=-1024, RescaleSlope=1, WindowCenter=40, WindowWidth=400))
    entry = upload(url, file).json
    assert (entry["window"], entry["value_range"]) == ([40, 400], [-1024, 1176])
    expected = open_image(file, window=(-600, 1500))
    content = f"/v1/files/{entry['id']}/content"
    with Image.open(io.BytesIO(call(url, "GET", f"{content}?window=-600&window=1500").body)) as served:
        assert served.convert("RGB").tobytes() == expected.tobytes()

    def ask(window: list[float] | None, **body: Any) -> Any:
        sent = [
            {"type": "image_url", "image_url": {"url": image, "window": window}}
            for image in (entry["id"], f"data:;base64,{base64.b64encode(file).decode()}")
        ]
        return call(
            url,
            "POST",
            "/v1/chat/completions",
            {**chat_body(), **body, "messages": [{"role": "user", "content": sent}]},
        )

    assert ask([-600, 1500]).json["normtune"]["windows"] == [[-600, 1500]] * 2
    assert [image.tobytes() for image in engine.requests[-1].images] == [expected.tobytes()] * 2
    assert ask(None).json["normtune"]["windows"] == [None, None]
    assert [image.tobytes() for image in engine.requests[-1].images] == [open_image(file).tobytes()] * 2
    assert b'"windows": [[-600.0, 1500.0], [-600.0, 1500.0]]' in ask([-600, 1500], stream=True).body
    for wrong, message in (([0, 0], "width 0 is too small"), ([1], "at least 2 items")):
        answer = ask(wrong)
        assert answer.status == 400 and message in answer.json["error"]["message"]
    assert call(url, "GET", f"{content}?window=5").status == 400
    picture = {"url": data_url(image_bytes((8, 8))), "window": [40, 400]}
    body = chat_body() | {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": picture}]}]}
    refused = call(url, "POST", "/v1/chat/completions", body)
    assert refused.status == 400 and "a window applies to DICOM" in refused.json["error"]["message"]


def test_dicom_is_returned_as_png_without_metadata(url: str) -> None:
    file = make_dicom(np.arange(12, dtype=np.uint16).reshape(3, 4), PatientName="Doe^Jane")
    upload_entry = upload(url, dicom_bytes(file), "doe.dcm").json
    png = call(url, "GET", f"/v1/files/{upload_entry['id']}/content").body
    assert (
        png.startswith(b"\x89PNG") and b"Doe" not in png and (upload_entry["width"], upload_entry["height"]) == (4, 3)
    )
