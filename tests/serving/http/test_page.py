"""The web page in a browser: upload, ask, compare, zoom; without other hosts, and on a phone's width."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest

from normtune.data.images.files import open_image
from normtune.data.phantom import phantom_dataset
from normtune.serving.http.state import Settings
from tests.support.browser import CHROMIUM, Browser
from tests.support.dataset_samples import dicom_bytes, make_dicom
from tests.support.fake_engine import FakeEngine
from tests.support.test_server import call, serving


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    with Browser() as started_browser:
        yield started_browser


@pytest.fixture(scope="module")
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture(scope="module")
def url(engine: FakeEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    reviews = tmp_path_factory.mktemp("reviews")
    (reviews / "phantoms.html").write_text("<p>rows</p>")
    with serving(engine, Settings(base="nano", reviews=reviews)) as server_url:
        yield server_url


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "doe_jane.png"
    phantom_dataset("b", 1).open_image("b-000000").save(path)
    return path


def show(browser: Browser, url: str, width: int, dark: bool = False) -> None:
    browser.events.clear()
    browser.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.call("Emulation.setEmulatedMedia", media="", features=[scheme])
    browser.call("Page.navigate", url=url)
    until(browser, f"location.href.startsWith({json.dumps(url)}) && document.readyState === 'complete'")
    until(browser, "document.querySelectorAll('[name=model]').length === 3")


def until(browser: Browser, expression: str) -> None:
    end = time.monotonic() + 20
    while not browser.evaluate(expression):
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
def test_two_adapters_answer_a_question_about_an_image(
    browser: Browser, url: str, picture: Path, tmp_path: Path, width: int, dark: bool
) -> None:
    show(browser, url, width, dark)
    assert browser.evaluate("getComputedStyle(document.querySelector('.notice')).display") != "none"
    assert "Research use, not for diagnosis" in browser.evaluate("document.querySelector('.notice').innerText")
    choose(browser, picture)
    assert browser.evaluate("[...document.querySelectorAll('[name=model]:checked')].map((box) => box.value)") == [
        "nano"
    ]
    for model in ("nano", "chest", "brain"):  # the base is the default; the test asks two adapters instead
        browser.evaluate(f"document.querySelector('[value={model}]').click()")
    browser.evaluate("document.getElementById('question').focus()")
    browser.call("Input.insertText", text="Is any disease shown?")
    press(browser, "Enter")
    until(browser, "document.querySelectorAll('.asked .facts span').length === 2")
    texts = browser.evaluate("[...document.querySelectorAll('.asked .text')].map((one) => one.innerText)")
    assert texts == [f"{who} sees 96x96: Is any disease shown?" for who in ("chest", "brain")]
    top = browser.evaluate("document.querySelector('.asked').getBoundingClientRect().top")
    assert 0 <= top < 900, "the answer is off the screen"
    assert browser.evaluate("document.querySelectorAll('.copy').length") == 2
    assert not browser.evaluate("document.getElementById('export').hidden")
    assert "confidence 78%" in browser.evaluate("document.querySelector('.facts').innerText")
    until(browser, "document.querySelector('.asked > p').innerText === 'The two answers differ.'")
    browser.evaluate("document.getElementById('report').click()")
    until(browser, "document.querySelectorAll('.asked .facts span').length === 4")
    assert "a report" in browser.evaluate("document.querySelector('.asked .text').innerText")
    assert browser.evaluate("document.documentElement.scrollWidth") == width, "the page scrolls sideways"
    assert browser.events_named("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown") == []
    urls = {urlsplit(item["request"]["url"]) for item in browser.events_named("Network.requestWillBeSent")}
    assert {item.netloc for item in urls if item.scheme not in ("blob", "data")} == {urlsplit(url).netloc}
    sent = [item["request"].get("postData", "") for item in browser.events_named("Network.requestWillBeSent")]
    assert not any("doe_jane" in item for item in sent)
    small = browser.evaluate(
        "[...document.querySelectorAll('button, .models label')].filter((one) => one.offsetParent && "
        "one.getBoundingClientRect().height < 44).length"
    )
    assert small == 0, "controls are too small for a finger"
    browser.screenshot(tmp_path / "page.png")


def test_a_model_names_its_recipe_and_its_data_and_an_example_is_one_click_away(browser: Browser, url: str) -> None:
    show(browser, url, 390)
    labels = browser.evaluate("[...document.querySelectorAll('.models label')].map((label) => label.innerText)")
    assert any("trained on" in label for label in labels) and any("without an adapter" in label for label in labels)
    browser.evaluate("document.getElementById('example').click()")
    until(browser, "!document.getElementById('canvas').hidden")
    assert browser.evaluate("document.getElementById('example').hidden")


GREY = """(() => {
  const canvas = document.getElementById('canvas');
  const d = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
  let sum = 0;
  for (let i = 0; i < d.length; i += 4) sum += d[i];
  return sum;
})()"""


def test_keys_and_sliders_zoom_and_window_the_image(browser: Browser, url: str, picture: Path) -> None:
    show(browser, url, 1280)
    choose(browser, picture)
    until(browser, f"{GREY} > 0")
    whole = browser.evaluate(GREY)
    browser.evaluate("document.getElementById('canvas').focus()")
    press(browser, "+")
    assert browser.evaluate("document.getElementById('zoom-value').innerText") == "1.3×"
    assert browser.evaluate(GREY) != whole
    press(browser, "0")
    assert browser.evaluate(GREY) == whole
    slide = (
        "(() => {{ const one = document.getElementById('{}'); one.value = {}; "
        "one.dispatchEvent(new Event('input')) }})()"
    )
    browser.evaluate(slide.format("level", 255))
    assert browser.evaluate(GREY) < whole
    browser.evaluate(slide.format("level", 0))
    assert browser.evaluate(GREY) > whole
    browser.evaluate("document.getElementById('reset').click()")
    assert browser.evaluate(GREY) == whole


@pytest.mark.parametrize("width", [390, 1280])
def test_a_window_of_dicom_is_applied_and_the_question_asked_again(
    browser: Browser, url: str, engine: FakeEngine, tmp_path: Path, width: int
) -> None:
    phantom = np.asarray(phantom_dataset("b", 1).open_image("b-000000").convert("L")).astype(np.uint16)
    scan = tmp_path / "scan.dcm"
    scan.write_bytes(
        dicom_bytes(make_dicom(phantom * 8, RescaleIntercept=-1024, RescaleSlope=1, WindowCenter=40.5, WindowWidth=400))
    )
    show(browser, url, width)
    choose(browser, scan)
    note = "document.getElementById('display-note').innerText"
    apply_hidden = "document.getElementById('apply').hidden"
    assert "with window 400 and level 40.5, as its file says" in browser.evaluate(note)
    assert browser.evaluate(apply_hidden)
    until(browser, f"{GREY} > 0")
    own = browser.evaluate(GREY)
    browser.evaluate("document.getElementById('controls').open = true")
    browser.evaluate("document.getElementById('report').click()")
    until(browser, "document.querySelectorAll('.asked .facts span').length === 1")
    slide = (
        "document.getElementById('{0}').value = {1}; document.getElementById('{0}').dispatchEvent(new Event('input'))"
    )
    browser.evaluate(slide.format("level", -300))
    browser.evaluate(slide.format("window", 1200))
    until(browser, f"Math.abs({GREY} - {own}) > 1000")  # the page draws the server's pixels
    assert "with window 400" in browser.evaluate(note)
    assert browser.evaluate("document.getElementById('apply').innerText") == "Apply and ask again"
    browser.screenshot(tmp_path / "before.png")
    browser.evaluate("document.getElementById('apply').click()")
    until(browser, "document.querySelectorAll('.asked .facts span').length === 2")
    assert engine.requests[-1].images[0].tobytes() == open_image(scan, window=(-300, 1200)).tobytes()
    assert "window 1200, level -300" in browser.evaluate("document.querySelector('.asked .facts').innerText")
    assert "with window 1200 and level -300." in browser.evaluate(note)
    assert browser.evaluate(apply_hidden)
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    browser.screenshot(tmp_path / "window.png")
    browser.evaluate("document.getElementById('reset').click()")
    until(browser, f"{GREY} === {own}")
    assert not browser.evaluate(apply_hidden)
    assert browser.events_named("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown") == []


def test_errors_are_shown_beside_their_control(browser: Browser, url: str, picture: Path, tmp_path: Path) -> None:
    show(browser, url, 390)
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"nothing")
    root = browser.call("DOM.getDocument")["root"]["nodeId"]
    node = browser.call("DOM.querySelector", nodeId=root, selector="#file")["nodeId"]
    browser.call("DOM.setFileInputFiles", nodeId=node, files=[str(bad)])
    until(browser, "document.getElementById('image-status').innerText.includes('not a PNG')")
    browser.evaluate("document.getElementById('ask-button').click()")
    assert browser.evaluate("document.getElementById('ask-status').innerText") == "Choose an image first."
    assert browser.evaluate("document.activeElement.id") == "file"
    names = browser.evaluate(
        "[...document.querySelectorAll('input, textarea, button')].filter((one) => one.offsetParent && "
        "!(one.labels?.length || one.innerText.trim() || one.getAttribute('aria-label'))).length"
    )
    assert names == 0, "a control without a name"


def test_a_question_can_be_stopped(browser: Browser, url: str, picture: Path, engine: FakeEngine) -> None:
    show(browser, url, 1280)
    choose(browser, picture)
    engine.may_answer.clear()
    try:
        browser.evaluate("document.getElementById('report').click()")
        until(browser, "!document.getElementById('stop').hidden")
        browser.evaluate("document.getElementById('stop').click()")
        until(browser, "document.querySelector('.asked .text').innerText === 'Stopped.'")
        assert not browser.evaluate("document.getElementById('ask-button').disabled")
    finally:
        engine.may_answer.set()


def test_reviews_are_linked(browser: Browser, url: str) -> None:
    show(browser, url, 1280)
    until(browser, "!document.getElementById('reviews').hidden")
    assert browser.evaluate("document.querySelector('#review-list a').href") == f"{url}/reviews/phantoms.html"


def test_the_page_has_a_security_policy_and_no_other_host(url: str) -> None:
    for path in ("/", "/page.css", "/page.js", "/viewer.js"):
        response = call(url, "GET", path)
        policy = response.headers["content-security-policy"]
        assert response.status == 200 and "default-src 'none'" in policy and "unsafe" not in policy
        text = response.body.decode().replace("http://www.w3.org/2000/svg", "")
        assert "://" not in text, path
