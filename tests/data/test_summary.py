from __future__ import annotations

import json
from pathlib import Path

from normtune.data.datasets import slake
from normtune.data.summary import summarize, summary_text
from tests.support.dataset_samples import slake_row, write_slake


def summary_of(root: Path, language: str = "en") -> dict[str, object]:
    train = [
        slake_row(1, 1, answer="Yes", answer_type="CLOSED", question="Is it?"),
        slake_row(2, 1, answer="T2", answer_type="CLOSED"),
        slake_row(3, 2, answer="the left lung", modality="CT"),
        slake_row(4, 2, answer=""),
        slake_row(5, 3, "zh"),
    ]
    write_slake(root, train=train, validate=[], test=[slake_row(6, 2)])
    return summarize(slake.read(root, language=language))  # type: ignore[arg-type]


def test_rows_and_kinds_are_counted_over_all_rows_and_images_over_usable_rows(tmp_path: Path) -> None:
    summary = summary_of(tmp_path)
    assert list(summary["parts"]) == ["train", "test"]
    assert summary["parts"]["train"] == {
        "rows": 4,
        "usable": 3,
        "images": 2,
        "open": 2,
        "closed": 2,
        "report": 0,
        "choice": 0,
        "options": {},
        "yes_no": 1,
        "questions_per_image": {"mean": 1.5, "median": 1.5, "max": 2},
        "longest_question_words": 6,
        "longest_answer_words": 3,
        "modalities": {"X-Ray": 2, "CT": 1},
        "organs": {"Lung": 3},
    }
    assert [leak["text"] for leak in summary["leaks"]] == ["1 of 1 images of test are in train too"]
    assert summary["problems"]["by_kind"] == {"answer is empty": 1}
    assert json.loads(json.dumps(summary)) == summary


def test_several_languages_are_counted_separately(tmp_path: Path) -> None:
    summary = summary_of(tmp_path, "all")
    assert {name: part["rows"] for name, part in summary["parts"].items()} == {
        "train (en)": 4,
        "train (zh)": 1,
        "test (en)": 1,
    }


def test_the_text_shows_the_counts_leaks_and_problems_but_no_question_or_answer(tmp_path: Path) -> None:
    text = summary_text(summary_of(tmp_path))
    lines = text.splitlines()
    assert lines[0] == "slake (licence: CC BY 4.0)"
    assert lines[3].split() == [
        "train",
        "4",
        "3",
        "2",
        "2",
        "2",
        "0",
        "1",
        "1.5",
        "mean,",
        "1.5",
        "median,",
        "2",
        "most",
    ]
    assert "  1 of 1 images of test are in train too" in lines
    assert "  train.json, row 4: answer is empty. Row skipped. Fill it in to use the row." in lines
    assert "What is shown" not in text
    assert "left lung" not in text


def test_the_text_reports_no_leaks_and_no_problems_as_none(tmp_path: Path) -> None:
    rows = {split: [slake_row(n, n)] for n, split in enumerate(("train", "validate", "test"))}
    text = summary_text(summarize(slake.read(write_slake(tmp_path, **rows))))
    assert "Leaks between splits: none" in text
    assert "Problems in the files: none" in text
