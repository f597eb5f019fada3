"""The page in a browser: upload, ask, compare, look; without the network, and within a phone's width."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from normtune.data.phantom import dataset
from normtune.serving.http.state import Settings
from tests.support.browser import CHROMIUM, Browser
from tests.support.fake_engine import FakeEngine
from tests.support.test_server import call, serving


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    with Browser() as found:
        yield found


@pytest.fixture(scope="module")
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture(scope="module")
def url(engine: FakeEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    reviews = tmp_path_factory.mktemp("reviews")
    (reviews / "phantoms.html").write_text("<p>rows</p>")
    with serving(engine, Settings(base="nano", reviews=reviews)) as found:
        yield found


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "doe_jane.png"
    dataset("b", 1).open_image("b-000000").save(path)
    return path


def show(browser: Browser, url: str, width: int, dark: bool = False) -> None:
    browser.events.clear()
    browser.call(
        "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
    )
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.call("Emulation.setEmulatedMedia", media="", features=[scheme])
    browser.call("Page.navigate", url=url)
    until(browser, f"location.href.startsWith({json.dumps(url)}) && document.readyState === 'complete'")
    until(browser, "document.querySelectorAll('[name=model]').length === 3")


def until(browser: Browser, expression: str) -> None:
    end = time.monotonic() + 20
    while not browser.ask(expression):
        assert time.monotonic() < end, expression
        time.sleep(0.02)


def choose(browser: Browser, *files: Path) -> None:
    root = browser.call("DOM.getDocument")["root"]["nodeId"]
    node = browser.call("DOM.querySelector", nodeId=root, selector="#file")["nodeId"]
    browser.call("DOM.setFileInputFiles", nodeId=node, files=[str(file) for file in files])
    until(browser, "!document.getElementById('canvas').hidden")


def press(browser: Browser, key: str) -> None:
    text = {"Enter": "\r", "Tab": ""}.get(key, key if len(key) == 1 else "")
    for kind in ("keyDown", "keyUp"):
        more = {"text": text} if text and kind == "keyDown" else {}
        code = {"Enter": 13, "Tab": 9}.get(key, 0)
        browser.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **more)


@pytest.mark.parametrize(("width", "dark"), [(390, False), (1280, True)])
def test_an_image_is_chosen_and_two_adapters_are_asked_side_by_side(
    browser: Browser, url: str, picture: Path, tmp_path: Path, width: int, dark: bool
) -> None:
    show(browser, url, width, dark)
    assert browser.ask("getComputedStyle(document.querySelector('.notice')).display") != "none"
    assert "Research use, not for diagnosis" in browser.ask("document.querySelector('.notice').innerText")
    choose(browser, picture)
    browser.ask("document.querySelector('[value=brain]').click()")
    browser.ask("document.getElementById('question').focus()")
    browser.call("Input.insertText", text="Is any disease shown?")
    press(browser, "Enter")
    until(browser, "document.querySelectorAll('.asked .facts span').length === 2")
    texts = browser.ask("[...document.querySelectorAll('.asked .text')].map((one) => one.innerText)")
    assert texts == [f"{who} sees 96x96: Is any disease shown?" for who in ("chest", "brain")]
    assert "confidence 78%" in browser.ask("document.querySelector('.facts').innerText")
    until(browser, "document.querySelector('.asked > p').innerText === 'The two answers differ.'")
    browser.ask("document.getElementById('report').click()")
    until(browser, "document.querySelectorAll('.asked .facts span').length === 4")
    assert "a report" in browser.ask("document.querySelector('.asked .text').innerText")
    assert browser.ask("document.documentElement.scrollWidth") == width, "the page scrolls sideways"
    assert browser.told("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown") == []
    asked = {urlsplit(one["request"]["url"]) for one in browser.told("Network.requestWillBeSent")}
    assert {one.netloc for one in asked if one.scheme not in ("blob", "data")} == {urlsplit(url).netloc}
    sent = [one["request"].get("postData", "") for one in browser.told("Network.requestWillBeSent")]
    assert not any("doe_jane" in one for one in sent)
    small = browser.ask(
        "[...document.querySelectorAll('button, .models label')].filter((one) => one.offsetParent && "
        "one.getBoundingClientRect().height < 44).length"
    )
    assert small == 0, "too small for a finger"
    browser.picture(tmp_path / "page.png")


GREY = """(() => {
  const canvas = document.getElementById('canvas');
  const d = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
  let sum = 0;
  for (let i = 0; i < d.length; i += 4) sum += d[i];
  return sum;
})()"""


def test_the_image_is_zoomed_and_windowed_by_keys_and_sliders(
    browser: Browser, url: str, picture: Path
) -> None:
    show(browser, url, 1280)
    choose(browser, picture)
    until(browser, f"{GREY} > 0")
    whole = browser.ask(GREY)
    browser.ask("document.getElementById('canvas').focus()")
    press(browser, "+")
    assert browser.ask("document.getElementById('zoom-value').innerText") == "1.3×"
    assert browser.ask(GREY) != whole
    press(browser, "0")
    assert browser.ask(GREY) == whole
    slide = (
        "(() => {{ const one = document.getElementById('{}'); one.value = {}; "
        "one.dispatchEvent(new Event('input')) }})()"
    )
    browser.ask(slide.format("level", 255))
    assert browser.ask(GREY) < whole
    browser.ask(slide.format("level", 0))
    assert browser.ask(GREY) > whole
    browser.ask("document.getElementById('reset').click()")
    assert browser.ask(GREY) == whole


def test_a_bad_file_and_a_missing_question_are_told_where_they_are(
    browser: Browser, url: str, picture: Path, tmp_path: Path
) -> None:
    show(browser, url, 390)
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"nothing")
    root = browser.call("DOM.getDocument")["root"]["nodeId"]
    node = browser.call("DOM.querySelector", nodeId=root, selector="#file")["nodeId"]
    browser.call("DOM.setFileInputFiles", nodeId=node, files=[str(bad)])
    until(browser, "document.getElementById('image-status').innerText.includes('not a PNG')")
    browser.ask("document.getElementById('ask-button').click()")
    assert browser.ask("document.getElementById('ask-status').innerText") == "Choose an image first."
    assert browser.ask("document.activeElement.id") == "file"
    names = browser.ask(
        "[...document.querySelectorAll('input, textarea, button')].filter((one) => one.offsetParent && "
        "!(one.labels?.length || one.innerText.trim() || one.getAttribute('aria-label'))).length"
    )
    assert names == 0, "a control without a name"


def test_a_question_can_be_stopped(browser: Browser, url: str, picture: Path, engine: FakeEngine) -> None:
    show(browser, url, 1280)
    choose(browser, picture)
    engine.let.clear()
    try:
        browser.ask("document.getElementById('report').click()")
        until(browser, "!document.getElementById('stop').hidden")
        browser.ask("document.getElementById('stop').click()")
        until(browser, "document.querySelector('.asked .text').innerText === 'Stopped.'")
        assert not browser.ask("document.getElementById('ask-button').disabled")
    finally:
        engine.let.set()


def test_reviews_are_linked(browser: Browser, url: str) -> None:
    show(browser, url, 1280)
    until(browser, "!document.getElementById('reviews').hidden")
    assert browser.ask("document.querySelector('#review-list a').href") == f"{url}/reviews/phantoms.html"


def test_the_page_and_its_parts_are_served_with_a_policy_and_name_no_other_host(url: str) -> None:
    for path in ("/", "/page.css", "/page.js", "/viewer.js"):
        found = call(url, "GET", path)
        policy = found.headers["content-security-policy"]
        assert found.status == 200 and "default-src 'none'" in policy and "unsafe" not in policy
        text = found.body.decode().replace("http://www.w3.org/2000/svg", "")
        assert "://" not in text, path
