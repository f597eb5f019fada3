from __future__ import annotations

from html import unescape
from pathlib import Path
from typing import Any

import pytest

from normtune.data.records import Prediction
from normtune.data.registry import open_dataset
from normtune.runtime.files import read_json, write_json
from normtune.studies.page.page import render_study_report
from tests.support.browser import Browser
from tests.support.evaluation_runs import write_run


def write_study(folder: Path, licence: str, answer: str = "an answer <made up>") -> dict[str, Any]:
    """Write the evaluation of a frozen base on two phantom images; return the study's results."""
    examples = open_dataset("phantom-a:1/0/2").split("test")
    target = folder / "cells" / "k" / "evaluations" / "x"
    predictions = [Prediction(example.id, answer) for example in examples]
    write_run(target, examples, predictions, metrics={}, normalisation="vqa")
    write_json(target / "metrics.json", read_json(target / "metrics.json") | {"licence": licence})
    evaluation = {
        "key": "k", "dataset": "a", "role": "zero-shot", "task": "vqa", "split": "test", "rows": len(examples),
        "images": 2, "folder": "cells/k/evaluations/x",
    }  # fmt: skip
    cell = {"key": "k", "status": "done", "grids": ["main"], "model": "nano", "recipe": "frozen", "trained_on": None}
    spec = {"datasets": {"a": {"data": "phantom-a:1/0/2", "test_split": "test"}}}
    return {"study": "s", "spec": spec, "cells": [cell], "evaluations": [evaluation]}


def test_examples_are_shown_only_if_requested(tmp_path: Path) -> None:
    page = render_study_report(write_study(tmp_path, "Apache-2.0 (synthetic)"), tmp_path)
    assert "<img" not in page and "made up" not in page
    assert "Apache-2.0 (synthetic)" in page


def test_examples_show_image_and_answers(tmp_path: Path) -> None:
    page = render_study_report(write_study(tmp_path, "Apache-2.0 (synthetic)"), tmp_path, examples={})
    assert page.count('<img src="data:image/png;base64,') == 6
    assert page.count("an answer &lt;made up&gt;") == 6


@pytest.mark.parametrize(
    "licence",
    [
        "unknown",
        "CC BY-NC-SA 4.0",
        "MIT (the images' copyright is the books')",
        "PhysioNet Credentialed Health Data License",
    ],
)
def test_examples_without_an_open_licence_are_never_shown(tmp_path: Path, licence: str) -> None:
    page = render_study_report(write_study(tmp_path, licence), tmp_path, examples={})
    assert "<img" not in page and "made up" not in page
    assert f"Not shown: its licence is {licence}." in unescape(page)


def test_a_long_answer_fits_a_phone(browser: Browser, tmp_path: Path) -> None:
    results = write_study(tmp_path, "Apache-2.0 (synthetic)", "normal chest " * 40)
    (tmp_path / "report.html").write_text(render_study_report(results, tmp_path, examples={}), encoding="utf-8")
    browser.open(tmp_path / "report.html", 390)
    assert browser.evaluate("document.documentElement.scrollWidth") == 390
