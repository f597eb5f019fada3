from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from normtune.cli import main
from normtune.data.phantom import phantom_dataset
from normtune.data.records import Example
from normtune.errors import InputError
from normtune.evaluation.config import EvaluateConfig
from normtune.evaluation.review.page import review, review_text
from tests.support.evaluation_runs import QUESTIONS, write_report_run, write_vqa_run

DATA = {"data": "phantom-b:2/0/4"}
TEST_QUESTIONS = phantom_dataset("b", {"train": 2, "validate": 0, "test": 4}).split("test")
TEST_REPORTS = phantom_dataset("b", {"train": 2, "validate": 0, "test": 4}, task="report").split("test")
HOSTILE = "<script>alert('x')</script> & \"quoted\" {{ 7 * 7 }} </style>"


@dataclass
class Page(HTMLParser):
    """The elements of a page as (name, attributes), and the texts between them."""

    html: str
    elements: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    words: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def facts(self) -> list[dict[str, Any]]:
        return [json.loads(attributes["data-facts"]) for attributes in self.all("li")]


def write_page(out: Path, *runs: Path, **options: Any) -> tuple[Page, dict[str, Any]]:
    result = review(runs, out, **options)
    return Page(out.read_text(encoding="utf-8")), result


def hidden_form(page: str) -> bool:
    form = re.search(r"<form class=\"filters\"[^>]*>", page)
    assert form is not None
    return "hidden" in form.group()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Page, dict[str, Any]]:
    """The page of two runs on all questions of the phantoms."""
    folder = tmp_path_factory.mktemp("two")
    runs = [
        write_vqa_run(folder / name, right, TEST_QUESTIONS, data=DATA) for name, right in (("a", {0, 1}), ("b", {1, 2}))
    ]
    return write_page(folder / "page.html", *runs)


def test_every_row_has_the_prediction_of_each_run(two: tuple[Page, dict[str, Any]]) -> None:
    page, result = two
    assert result["rows"] == result["shown"] == len(TEST_QUESTIONS) == len(page.all("li"))
    assert [facts["value"] for facts in page.facts][:4] == [[1, 0], [1, 1], [0, 1], [0, 0]]
    assert all(facts["score"] == [-0.1, -0.1] for facts in page.facts)
    text = " ".join(page.words)
    assert all(example.question in text and example.id in text for example in TEST_QUESTIONS)
    assert text.count("✓") == 4 and text.count("✗") == 2 * len(TEST_QUESTIONS) - 4


def test_each_image_is_embedded_once_for_any_number_of_questions(two: tuple[Page, dict[str, Any]]) -> None:
    page, result = two
    stored = page.all("image")
    assert result["images"] == len(stored) == 4 and result["unreadable"] == 0
    assert {use["href"] for use in page.all("use")} == {f"#{image_tag['id']}" for image_tag in stored}
    assert len(page.all("use")) == len(TEST_QUESTIONS)
    for image_tag in stored:
        kind, data = image_tag["href"].split(",", 1)
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            assert kind == "data:image/jpeg;base64" and image.size == (96, 96)


def test_nothing_is_loaded_and_only_the_pages_script_may_run(two: tuple[Page, dict[str, Any]]) -> None:
    page, _ = two
    for name, attributes in page.elements:
        for attribute in ("src", "href", "srcset", "action", "data", "poster"):
            assert attributes.get(attribute, "#").startswith(("#", "data:")), (name, attribute)
        assert not any(attribute.startswith("on") or attribute == "style" for attribute in attributes)
    assert "://" not in re.sub(r"<svg[^>]*>", "", page.html) and "@import" not in page.html
    (policy,) = (m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "unsafe" not in policy
    for tag in ("style", "script"):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page.html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_the_notice_and_the_licence_are_visible(two: tuple[Page, dict[str, Any]]) -> None:
    text = " ".join(" ".join(two[0].words).split())
    assert text.count("Research use, not for diagnosis") >= 3 and text.count("licence CC0") >= 2


def test_controls_and_images_are_labelled(two: tuple[Page, dict[str, Any]]) -> None:
    page, _ = two
    controls = re.findall(r"<label[^>]*>[^<]+<(?:select|input)", page.html)
    assert len(controls) == len(page.all("select")) + len(page.all("input")) > 4
    for image in page.all("svg"):
        assert image.get("aria-hidden") == "true" or (image["role"] == "img" and image["aria-label"])
    assert all(button.get("aria-label") for button in page.all("button") if button.get("class") == "picture")
    assert page.all("html")[0]["lang"] == "en" and any("viewport" in m.get("name", "") for m in page.all("meta"))
    headings = [name for name, _ in page.elements if name in ("h1", "h2", "h3")]
    assert headings[:3] == ["h1", "h2", "h2"] and set(headings[3:]) == {"h3"}


def test_the_filters_offer_the_values_of_the_rows(two: tuple[Page, dict[str, Any]]) -> None:
    page, _ = two
    fields = {select["data-field"] for select in page.all("select") if "data-field" in select}
    assert {"kind", "question_type", "organ", "modality"} >= fields >= {"kind", "question_type"}
    offered = {option["value"] for option in page.all("option")}
    assert {"only-right 0", "only-right 1", "some wrong", "up score 1"} <= offered
    for facts in page.facts:
        assert facts["strata"].keys() == fields
        assert {value for values in facts["strata"].values() for value in values} <= offered


def test_texts_are_escaped(tmp_path: Path) -> None:
    examples = [replace(example, question=HOSTILE, id=f'i"{n}<i>') for n, example in enumerate(QUESTIONS)]
    examples[0] = replace(examples[0], answer=HOSTILE, meta={"organ": HOSTILE})
    page, _ = write_page(tmp_path / "page.html", write_vqa_run(tmp_path / 'a"<b>', {0}, examples), images=False)
    assert len(page.all("script")) == len(page.all("style")) == 1 and page.all("b") == page.all("i") == []
    text = "".join(page.words)
    assert text.count(HOSTILE) >= len(examples) + 1 and "49" not in text
    assert page.facts[0]["strata"]["organ"] == [HOSTILE]


def test_reports_show_word_differences(tmp_path: Path) -> None:
    changed = {0: "Something else. " + TEST_REPORTS[0].answer}
    runs = [
        write_report_run(tmp_path / name, texts, TEST_REPORTS, data=DATA | {"task": "report"})
        for name, texts in (("a", {}), ("b", changed))
    ]
    page, result = write_page(tmp_path / "page.html", *runs)
    assert result["images"] == 4 and len(page.all("ins")) == 2  # one in the legend
    assert page.facts[1]["value"] == [1.0, 1.0] and page.facts[0]["value"][1] < 1
    assert {"gain 1", "loss 1", "down gain 1", "up value 0"} <= {option["value"] for option in page.all("option")}


def test_the_bins_of_the_confidence_are_a_table(tmp_path: Path) -> None:
    interval = {"value": 0.25, "low": 0.1, "high": 0.5}
    report = {
        "mean_confidence": 0.62,
        "right": interval,
        "ece": {**interval, "bins": 10},
        "aurc": interval,
        "bins": [{"from": 0.6, "to": 0.7, "rows": 12, "confidence": 0.62, "right": interval}],
        "risk_coverage": [{"coverage": 0.5, "risk": 0.5, "confidence": 0.61}],
    }
    run = write_vqa_run(tmp_path / "a", {0}, confidence={"all": report})
    page, _ = write_page(tmp_path / "page.html", run, images=False)
    assert {"60 to 70", "12", "25.0"} <= set(page.words)
    assert any(line.startswith("confidence (all): mean 62.0, right 25.0, ECE 25.0 [10.0, 50.0]") for line in page.words)
    assert any(mark["class"] == "mark" and mark["x"] == "62.0" for mark in page.all("rect"))


def test_the_limit_applies_to_rows_and_not_to_tables(tmp_path: Path) -> None:
    run = write_vqa_run(tmp_path / "a", set(range(10)), TEST_QUESTIONS, data=DATA)
    page, result = write_page(tmp_path / "page.html", run, limit=8, pixels=32)
    assert (result["shown"], len(page.all("li"))) == (8, 8)
    assert sum(facts["value"] == [1] for facts in page.facts) == 2
    assert f"All {len(TEST_QUESTIONS)} rows" in " ".join(page.words) and "The tables count all rows" in page.html
    assert result["bytes"] == (tmp_path / "page.html").stat().st_size < 60_000
    assert f"8 of {len(TEST_QUESTIONS)} rows" in review_text(result)


def test_the_page_names_images_that_cannot_be_read(tmp_path: Path) -> None:
    root = tmp_path / "data"
    root.mkdir()
    for name in ("0", "1"):
        Image.new("RGB", (40, 20), (90, 90, 90)).save(root / f"{name}.png")
    rows = [{"id": f"q{n}", "image": f"{n}.png", "question": "?", "answer": "yes"} for n in range(2)]
    (root / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    examples = [Example(row["id"], (row["image"],), "?", "yes", "closed", "test") for row in rows]
    options = EvaluateConfig(model="m", out=tmp_path, data="jsonl", root=root, text_only=True).data_options()
    run = write_vqa_run(tmp_path / "a", {0}, examples, data=options)
    (root / "1.png").write_bytes(b"no image")
    page, result = write_page(tmp_path / "page.html", run, pixels=16)
    assert (result["images"], result["unreadable"]) == (1, 1)
    assert "Image 1.png could not be read." in " ".join(page.words)
    assert page.all("image")[0]["width"] == "16" and page.all("image")[0]["height"] == "8"
    assert "1 more could not be read" in review_text(result)


def test_data_that_was_not_evaluated_is_refused(tmp_path: Path) -> None:
    run = write_vqa_run(tmp_path / "a", {0}, TEST_QUESTIONS, data=DATA)
    with pytest.raises(InputError, match=r"first 'b-000002-00', of .* are not those of phantom-b:1/0/4"):
        review([run], tmp_path / "page.html", data="phantom-b:1/0/4")
    with pytest.raises(InputError, match="are not those of phantom-a"):
        review([run], tmp_path / "page.html", data="phantom-a")
    assert not (tmp_path / "page.html").exists()


def test_a_result_with_an_unknown_dataset_needs_data_or_no_images(tmp_path: Path) -> None:
    run = write_vqa_run(tmp_path / "a", {0}, TEST_QUESTIONS)  # its dataset is called "fake"
    with pytest.raises(InputError, match=r"no dataset 'fake'.*--no-images"):
        review([run], tmp_path / "page.html")
    _, result = write_page(tmp_path / "page.html", run, images=False)
    assert (result["images"], result["unreadable"]) == (0, 0)
    with pytest.raises(InputError, match="--limit takes 1"):
        review([run], tmp_path / "page.html", limit=0)


def test_a_result_records_the_folder_of_its_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    config = EvaluateConfig(model="m", out=Path("out"), data="jsonl", root=Path("data"), task="report")
    options = config.data_options()
    assert options["root"] == str(tmp_path.resolve() / "data") and options["task"] == "report"
    assert "model" not in options and json.loads(json.dumps(options)) == options
    hub = EvaluateConfig(model="m", out=Path("out"), data="parquet", root=Path("owner/name"))
    assert hub.data_options()["root"] == "owner/name"


def test_the_command_prints_counts_and_no_texts_of_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_vqa_run(
        tmp_path / "a", {0}, [replace(TEST_QUESTIONS[0], answer="a secret answer"), *TEST_QUESTIONS[1:4]], data=DATA
    )
    command = ["review", str(run), "--no-images", "--out", str(tmp_path / "page.html")]
    for more in ([], ["--json"]):
        monkeypatch.setattr(sys, "argv", ["normtune", *command, *more])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        assert ended.value.code == 0 and "page.html" in printed.out
        assert not any(text in printed.out + printed.err for text in ("secret", TEST_QUESTIONS[0].question))
    assert json.loads(printed.out)["shown"] == 4 and "a secret answer" in (tmp_path / "page.html").read_text()


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs a browser: chromium is not installed")
def test_a_browser_runs_the_page_without_errors(tmp_path: Path) -> None:
    run = write_vqa_run(tmp_path / "a", {0}, TEST_QUESTIONS[:6], data=DATA)
    page, _ = write_page(tmp_path / "page.html", run)
    assert hidden_form(page.html), "without a script the filters would do nothing"
    quiet = ("--disable-background-networking", "--disable-component-update", "--disable-sync")
    isolated = ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}")
    ran = subprocess.run(
        ["chromium", *isolated, *quiet, "--enable-logging=stderr", "--dump-dom", f"file://{tmp_path / 'page.html'}"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert not hidden_form(ran.stdout) and ">6 rows</span>" in ran.stdout
    assert "CONSOLE" not in ran.stderr, ran.stderr
