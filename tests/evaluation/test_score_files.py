from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from normtune.errors import InputError
from normtune.evaluation.score_files import read_texts, score_files, score_lists, score_text

REFERENCES = [
    {"id": "a", "reference": "The heart is enlarged. No effusion.", "images": ["x"]},
    {"id": "b", "reference": "Lungs are clear. No pneumothorax.", "images": ["x"]},
    {"id": 3, "reference": "Small left pleural effusion.", "images": ["y"]},
]
PREDICTIONS = [
    {"id": "3", "prediction": "Small left pleural effusion."},
    {"id": "a", "prediction": "The heart is normal. No effusion.", "score": -1.0},
    {"id": "b", "prediction": ""},
]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    return write(tmp_path / "pred.jsonl", PREDICTIONS), write(tmp_path / "ref.jsonl", REFERENCES)


def test_reports_are_joined_by_id_and_resampled_by_image(files: tuple[Path, Path], tmp_path: Path) -> None:
    result = score_files(*files, out=tmp_path / "scores.json")
    assert (result["task"], result["rows"], result["images"]) == ("report", 3, 2)
    assert result["normalisations"] == ["none", "r2gen-iu"]
    texts = {str(row["id"]): str(row["prediction"]) for row in PREDICTIONS}
    expected = score_lists([texts[str(row["id"])] for row in REFERENCES], [str(row["reference"]) for row in REFERENCES])
    assert {name: metric["value"] for name, metric in result["metrics"].items()} == pytest.approx(expected)
    assert result["findings"]["findings_rules"]["Pleural Effusion"]["f1"] == 1.0
    assert result["findings"]["findings_rules"]["Cardiomegaly"]["recall"] == 0.0
    assert json.loads((tmp_path / "scores.json").read_text()) == result
    text = score_text(result)
    assert "bleu_4/r2gen-iu" in text and "Pleural Effusion" in text and "left pleural" not in text


def test_the_order_of_rows_does_not_matter(files: tuple[Path, Path], tmp_path: Path) -> None:
    backwards = write(tmp_path / "backwards.jsonl", PREDICTIONS[::-1])
    assert score_files(backwards, files[1]) == score_files(*files)


def test_the_predictions_of_an_evaluation_can_be_both_files(tmp_path: Path) -> None:
    rows = [
        {"id": "q1", "images": ["x"], "kind": "closed", "reference": "Yes", "prediction": "yes"},
        {"id": "q2", "images": ["x"], "kind": "open", "reference": "lung", "prediction": "left lung"},
        {"id": "q3", "images": ["y"], "kind": "open", "reference": 2, "prediction": "two"},
    ]
    path = write(tmp_path / "predictions.jsonl", rows)
    result = score_files(path, path)
    assert result["task"] == "vqa" and result["normalisations"] == ["vqa"]
    assert result["metrics"]["closed_label"]["value"] == 1.0
    assert result["metrics"]["open_exact"]["value"] == 0.5
    assert "findings" not in result and "open_exact" in score_text(result)


def test_answers_without_a_kind_are_closed_if_they_are_yes_or_no(tmp_path: Path) -> None:
    references = write(tmp_path / "r.jsonl", [{"id": "1", "answer": "yes"}, {"id": "2", "answer": "heart"}])
    predictions = write(tmp_path / "p.jsonl", [{"id": "1", "prediction": "Yes"}, {"id": "2", "prediction": "x"}])
    result = score_files(predictions, references, task="vqa")
    assert (result["metrics"]["closed_label"]["rows"], result["metrics"]["open_exact"]["value"]) == (1, 0.0)
    assert score_lists(["Yes", "x"], ["yes", "heart"], task="vqa")["closed_label"] == 1.0


ROW = {"id": "a", "prediction": "x"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([ROW, ROW], r"pred\.jsonl, line 2: id 'a' is also on line 1\. Keep one"),
        ([{"id": "a", "predicton": "x"}], r"line 1: field 'prediction' is missing, is it 'predicton'\?"),
        ([{"prediction": "x"}], r"line 1: field 'id' is missing or is not text"),
        ([{"id": True, "prediction": "x"}], r"line 1: field 'id' is missing or is not text"),
        ([{"id": "a", "prediction": ["x"]}], r"line 1: field 'prediction' is a list, not text"),
        ([{"id": "a", "prediction": None}], r"line 1: field 'prediction' is null, not text"),
        ([ROW, "{"], r"line 2: not valid JSON"),
        (["[1]"], r"line 1: not a JSON object"),
        ([], r"has no rows"),
        ([{**ROW, "images": [3]}], r"line 1: field 'images' is not a list of texts"),
        ([{**ROW, "kind": "both"}], r"line 1: field 'kind' is unknown"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_texts(write(tmp_path / "pred.jsonl", rows), ("prediction",))


def test_bytes_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_bytes(b'{"id": "a", "prediction": "\xff"}\n')
    with pytest.raises(InputError, match=r"p\.jsonl, line 1: not UTF-8 text"):
        read_texts(tmp_path / "p.jsonl", ("prediction",))
    with pytest.raises(InputError, match=r"cannot read .*nowhere\.jsonl"):
        read_texts(tmp_path / "nowhere.jsonl", ("prediction",))


def test_ids_of_only_one_file_are_named(files: tuple[Path, Path], tmp_path: Path) -> None:
    fewer = write(tmp_path / "fewer.jsonl", PREDICTIONS[:1])
    with pytest.raises(InputError, match=r"ref\.jsonl, line 1: id 'a' \(and 1 more\) is not in .*fewer\.jsonl"):
        score_files(fewer, files[1])
    more = write(tmp_path / "more.jsonl", [*PREDICTIONS, {"id": "z", "prediction": "x"}])
    with pytest.raises(InputError, match=r"more\.jsonl, line 4: id 'z' is not in .*ref\.jsonl"):
        score_files(more, files[1])


def test_an_empty_reference_and_mixed_tasks_are_refused(tmp_path: Path) -> None:
    predictions = write(tmp_path / "p.jsonl", [ROW, {"id": "b", "prediction": "y"}])
    empty = write(tmp_path / "r.jsonl", [{"id": "a", "reference": "x"}, {"id": "b", "reference": " "}])
    with pytest.raises(InputError, match=r"r\.jsonl, line 2: field 'reference' is empty"):
        score_files(predictions, empty)
    questions_and_reports = [
        {"id": "a", "reference": "x", "kind": "open"},
        {"id": "b", "reference": "y", "kind": "report"},
    ]
    with pytest.raises(InputError, match=r"have questions and reports\. Set --task"):
        score_files(predictions, write(tmp_path / "m.jsonl", questions_and_reports))


def test_options_of_reports_are_refused_for_answers(files: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="score reports"):
        score_files(*files, task="vqa", chexbert=tmp_path)
    with pytest.raises(InputError, match="one normalisation at a time"):
        score_files(*files, task="vqa", normalisations=["vqa", "none"])
    with pytest.raises(InputError, match="CheXbert needs"):
        score_files(*files, chexbert=tmp_path)


def test_lists_of_different_lengths_are_refused() -> None:
    with pytest.raises(InputError, match="2 predictions and 1 references"):
        score_lists(["a", "b"], ["a"])


def test_answers_that_are_right_only_without_their_signs_are_counted(tmp_path: Path) -> None:
    pairs = [("HER2-", "HER2+"), ("5 mm", "<5 mm"), ("15 cm", "1,5 cm"), ("5", "-5"), ("x ray", "X-ray"), ("5", "<6")]
    predictions = write(tmp_path / "p", [{"id": n, "prediction": text} for n, (text, _) in enumerate(pairs)])
    references = write(tmp_path / "r", [{"id": n, "reference": text} for n, (_, text) in enumerate(pairs)])
    result = score_files(predictions, references, task="vqa")
    assert result["signs_ignored"] == 4 and result["metrics"]["global_exact"]["value"] == 5 / 6
    assert "4 rows are right only because the normalisation drops signs" in score_text(result)
    unchanged = score_files(predictions, references, task="vqa", normalisations=["none"])
    assert unchanged["signs_ignored"] == 0 and "signs" not in score_text(unchanged)
