from __future__ import annotations

import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from normtune.studies.page.page import render_study_report, write_study_report
from tests.support.browser import Browser
from tests.support.study_results import fake_results

NOWHERE = Path("no/such/folder")
VOID_ELEMENTS = {"meta", "link", "br", "input", "img", "hr", "col"}  # they have no end tag


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return fake_results(recipes=["frozen", "ln", "full", "lora-8", "prefix"], losses=20)


@pytest.fixture(scope="module")
def page(results: dict[str, Any]) -> str:
    return render_study_report(results, NOWHERE)


class Elements(HTMLParser):
    """The elements of a page; raises an AssertionError if they are not nested correctly."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"{tag} has an attribute twice"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID_ELEMENTS:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID_ELEMENTS:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"{tag} is closed but not open"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "title"):
            self.text.append(data)


def test_the_page_is_well_nested(page: str) -> None:
    assert page.startswith("<!DOCTYPE html>")
    assert Elements(page).open == []


def test_ids_are_unique_and_links_have_a_target(page: str) -> None:
    elements = Elements(page).elements
    ids = Counter(a["id"] for _, a in elements if "id" in a)
    assert max(ids.values()) == 1
    for _, attributes in elements:
        for name in ("href", "aria-labelledby", "for"):
            value = attributes.get(name)
            if value and not value.startswith(("data:", "http")):
                assert value.removeprefix("#") in ids, f"{name}={value}"


def test_nothing_is_fetched_and_nothing_is_run(page: str) -> None:
    for tag, attributes in Elements(page).elements:
        assert tag not in ("script", "iframe", "object", "embed"), tag
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "srcset", "data", "poster"):
            if tag != "a" and (value := attributes.get(name)):
                assert value.startswith("data:"), f"{tag} {name}={value}"
    assert not re.search(r"url\(|@import", page)
    policy = next(a["content"] for _, a in Elements(page).elements if a.get("http-equiv"))
    assert policy is not None and policy.startswith("default-src 'none';")


def test_every_chart_and_image_has_a_text_alternative(page: str) -> None:
    elements = Elements(page).elements
    drawings = [attributes for tag, attributes in elements if tag == "svg"]
    assert len(drawings) > 12
    assert all(a.get("role") == "img" and a.get("aria-label") for a in drawings)
    assert all(a.get("alt") for tag, a in elements if tag == "img")


def test_every_table_scrolls_in_a_box_of_its_own(page: str) -> None:
    assert page.count("<table") == len(re.findall(r'<div class="scroll" tabindex="0" role="region"[^>]*><table', page))


def test_the_page_has_every_section(page: str) -> None:
    ids = [a["id"] for tag, a in Elements(page).elements if tag == "section"]
    settings = [f"setting-{number}" for number in range(1, 6)]
    assert ids == ["run", "failed", "short", "models", *settings, "terms"]


def test_further_figures_are_folded(page: str) -> None:
    assert len(re.findall(r"<summary>\d+ figures: Difference to <code>ln</code>, ", page)) == 3


def test_a_small_study_has_a_warning_at_the_top() -> None:
    page = render_study_report(fake_results(recipes=["ln"], seeds=2, losses=2), NOWHERE)
    assert page.index("Read with care.") < page.index("What was run")
    full = render_study_report(fake_results(recipes=["ln"], seeds=5, losses=2), NOWHERE)
    assert "Read with care." not in full


def test_every_table_of_a_setting_says_how_many_images_and_seeds(page: str) -> None:
    tables = [table for table in re.findall(r"<table>.*?</table>", page, re.DOTALL) if "colgroup" in table]
    assert len(tables) == 5
    assert all("96 images" in table and "seeds</th>" in table for table in tables)


def test_a_failed_cell_is_shown_with_its_error(page: str) -> None:
    assert "the loss is not finite at step 12. Lower the learning rate." in page
    assert page.count("Research use, not for diagnosis.") >= 2


def test_texts_of_a_study_are_escaped(results: dict[str, Any]) -> None:
    page = render_study_report({**results, "study": "<b>x</b>", "about": "a & b <script>alert(1)</script>"}, NOWHERE)
    assert "<script" not in page and "<b>x" not in page
    Elements(page)


@pytest.mark.parametrize("empty", [{}, {"study": "started", "cells": [], "seeds": []}])
def test_a_study_that_has_just_started_has_a_page(empty: dict[str, Any]) -> None:
    page = render_study_report(empty, NOWHERE)
    assert Elements(page).open == [] and "What was run" in page


def test_a_study_without_a_finished_cell_has_a_page(results: dict[str, Any]) -> None:
    cells = [{**cell, "status": "failed", "error": "no memory"} for cell in results["cells"]]
    page = render_study_report({"study": "bad", "spec": results["spec"], "cells": cells}, NOWHERE)
    assert "no memory" in page and "<svg" not in page


def test_the_page_is_deterministic(results: dict[str, Any], page: str) -> None:
    assert render_study_report(json.loads(json.dumps(results)), NOWHERE) == page


def test_the_page_is_written_next_to_the_results(tmp_path: Path, results: dict[str, Any], page: str) -> None:
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert write_study_report(tmp_path).read_text(encoding="utf-8") == page


@pytest.mark.parametrize(("width", "dark"), [(390, True), (1280, False)])
def test_a_browser_shows_the_page_without_errors_or_requests(
    browser: Browser, tmp_path: Path, page: str, width: int, dark: bool
) -> None:
    file = tmp_path / "report.html"
    file.write_text(page, encoding="utf-8")
    browser.events.clear()
    browser.open(file, width, dark=dark)
    assert browser.evaluate("document.documentElement.scrollWidth") == width, "the page scrolls sideways"
    assert browser.events_named("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown") == []
    urls = {event["request"]["url"] for event in browser.events_named("Network.requestWillBeSent")}
    assert all(url == file.as_uri() or url.startswith("data:") for url in urls), urls
    background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(22, 24, 27)" if dark else "rgb(252, 252, 251)")
    outside = """[...document.querySelectorAll('figure > .drawing > svg.chart')].filter(svg => {
        const box = svg.getBoundingClientRect();
        return [...svg.querySelectorAll('text')].some(text => {
            const own = text.getBoundingClientRect();
            const over = Math.max(box.left - own.left, own.right - box.right, own.bottom - box.bottom);
            return own.width && over > 3;
        });
    }).map(svg => svg.getAttribute('aria-label'))"""
    assert browser.evaluate(outside) == [], "names run out of their drawing"


def test_the_theme_can_be_chosen_without_a_script(browser: Browser, tmp_path: Path, page: str) -> None:
    file = tmp_path / "report.html"
    file.write_text(page, encoding="utf-8")
    browser.open(file, 1280)
    for theme, colour in (("dark", "rgb(22, 24, 27)"), ("light", "rgb(252, 252, 251)")):
        browser.evaluate(f"document.getElementById('theme-{theme}').click()")
        assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == colour
