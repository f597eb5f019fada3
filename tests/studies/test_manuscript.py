from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from normtune.runtime.files import read_json, write_json, write_text
from normtune.studies import manuscript
from normtune.studies.manuscript import write_manuscript
from tests.support.study_results import FakeStudy

CONFIG = {"batch": 24, "schedule": "cosine", "warmup": 0.05, "dtype": "float32"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a study with two recipes and two seeds, and the records of its evaluations."""
    made = FakeStudy(losses=2)
    made.add_cell("nano", "frozen", None, {"slake": "zero-shot"}, grids=["methods"], seed=None)
    for recipe in ("ln", "full"):
        for seed in (0, 1):
            made.add_cell("nano", recipe, "slake", {"slake": "in"}, grids=["methods"], seed=seed)
    for cell in made.tables["cells"]:
        cell |= {"recipe_text": f"all={cell['recipe']}", "base_fingerprint": "0123456789abcdef", "total": 2_731_737}
        if cell["trained_on"]:
            budget = {"until": "plateau", "max_epochs": 10.0, "patience": 3}
            cell |= {"config": CONFIG, "budget": budget, "rate_source": "search", "pairs_available": 4918}
    for row in made.tables["evaluations"]:
        row["folder"] = f"cells/{row['key']}/evaluations/slake"
        record = {
            "dataset": "slake",
            "licence": "CC BY 4.0",
            "base": "nano",
            "rows": 1061,
            "images": 96,
            "split_hash": "fedcba9876543210",
            "prompt": "[ENC] {question} [SEP]",
            "settings": {"beams": 1, "max_new_tokens": 124},
            "intervals": "95%, by image",
            "preflight": {"rows": {"dropped": {"answer is empty": 1}}},
            "trained_rows": {"rows": 1, "rows_evaluated": 1061, "pictures": 0, "pictures_evaluated": 96},
        }
        write_json(tmp_path / row["folder"] / "metrics.json", record)
    results = made.build_results(margin=0.02) | {"study": "tiny_study", "about": "50% & more"}
    write_json(tmp_path / "results.json", results)
    write_text(tmp_path / "tables.tex", "% no tables\n")
    return tmp_path


def test_the_text_has_what_the_records_say_and_marks_the_rest(folder: Path) -> None:
    text = write_manuscript(folder)[0].read_text(encoding="utf-8")
    for part in (
        "nano (2,731,737 parameters, fingerprint 0123456789ab)",
        "Seeds: 0 and 1.",
        "at most 10 passes and a patience of 3 validations",
        "the test split was not used",
        "Answers were generated greedily; the limits in tokens were 124 (slake).",
        "'[ENC] {question} [SEP]'",
        "licence CC BY 4.0; 4,918 training pairs; 1,061 test rows on 96 images (hash fedcba987654)",
        "rows not used: 1 (answer is empty)",
        "5 of the evaluated rows were in the training data",  # one in each of five evaluations
        "Equivalence was tested with a margin of 2 points",
        "**Ethics**: TODO",
        "Research use, not for diagnosis.",
    ):
        assert part in text, part


def test_conversations_are_not_said_to_be_single_questions(folder: Path) -> None:
    alone = "every question was asked in a conversation of its own"
    assert alone in write_manuscript(folder)[0].read_text(encoding="utf-8")
    for path in folder.glob("cells/*/evaluations/*/metrics.json"):
        write_json(path, read_json(path) | {"data": {"history": True}})
    text = write_manuscript(folder)[0].read_text(encoding="utf-8")
    assert "was asked after its earlier turns, with the answers of the data (slake)" in text and alone not in text
    mixed = manuscript._conversations([{"dataset_name": "chat", "data": {"history": True}}, {"dataset_name": "slake"}])
    assert f"with the answers of the data (chat); of the other data sets, {alone}" in mixed


def test_a_study_without_evaluations_has_a_text_too(tmp_path: Path) -> None:
    write_json(tmp_path / "results.json", {"study": "empty", "cells": []})
    assert "TODO: the exact prompts" in write_manuscript(tmp_path)[0].read_text(encoding="utf-8")


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex")
def test_latex_compiles(folder: Path) -> None:
    path = write_manuscript(folder)[1]
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", path.name]
    run = subprocess.run(command, cwd=path.parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-2000:]
    assert path.with_suffix(".pdf").stat().st_size > 10_000
