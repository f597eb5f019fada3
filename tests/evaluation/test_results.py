from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from normtune.data.records import Example, Kind, Prediction
from normtune.errors import InputError
from normtune.evaluation.results import Predictions, read_evaluation, split_hash
from normtune.evaluation.score_files import score_files
from normtune.metrics.answers import score_vqa
from normtune.metrics.statistics.intervals import mean_interval
from tests.support.evaluation_runs import write_run


def example(number: int, answer: str = "lung", kind: Kind = "open") -> Example:
    return Example(f"q{number}", (f"{number // 2}",), "which\u2028organ?", answer, kind, "test")


EXAMPLES = [example(n) for n in range(8)] + [example(n, "yes", "closed") for n in range(8, 12)]


def write(out: Path, right: set[int], examples: list[Example] | None = None, normalisation: str = "vqa") -> Path:
    examples = examples or EXAMPLES
    predictions = [Prediction(e.id, e.answer if int(e.id[1:]) in right else "wrong", -0.1) for e in reversed(examples)]
    metrics = score_vqa(examples, predictions, normalisation=normalisation)
    return write_run(out, examples, predictions, metrics=metrics, normalisation=normalisation)


def test_a_written_run_reads_back_unchanged(tmp_path: Path) -> None:
    run = read_evaluation(write(tmp_path, {0, 1}))
    assert run.examples == [Example(e.id, e.images, e.question, e.answer, e.kind, "") for e in EXAMPLES]
    assert run.texts["q0"] == "lung" and run.texts["q5"] == "wrong" and run.out == tmp_path
    assert [(row.id, row.score) for row in run.predictions] == [(example.id, -0.1) for example in EXAMPLES]
    assert run.record["split_hash"] == split_hash([e.id for e in EXAMPLES])
    assert run.metrics == score_vqa(EXAMPLES, run.predictions)
    with pytest.raises(InputError, match="the results do not contain image 0"):
        run.examples.dataset.open_image("0")


def test_the_hash_depends_on_the_rows_and_not_on_their_order() -> None:
    assert split_hash(["b", "a"]) == split_hash(["a", "b"]) != split_hash(["a", "c"])
    # printf 'a\nb' | sha256sum
    assert split_hash(["b", "a"]) == "7e18f737311b2dc3b2f269dd78396b0351f14fb66efa879f768cb23181883c78"


def test_a_damaged_row_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, {0}) / "predictions.jsonl"
    path.write_text(path.read_text().replace('"reference": "lung"', '"ref": "lung"', 1))
    with pytest.raises(InputError, match="line 1: not a prediction row"):
        read_evaluation(tmp_path)


def test_removed_rows_are_detected(tmp_path: Path) -> None:
    path = write(tmp_path, {0}) / "predictions.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(InputError, match=r"does not have the rows|not a prediction row"):
        read_evaluation(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    (write(tmp_path, {0}) / "predictions.jsonl").unlink()
    with pytest.raises(InputError, match=r"predictions\.jsonl is missing"):
        read_evaluation(tmp_path)
    with pytest.raises(InputError, match=r"metrics\.json is missing"):
        read_evaluation(tmp_path / "elsewhere")


def test_no_temporary_file_remains(tmp_path: Path) -> None:
    names = {path.name for path in write(tmp_path, {0}).iterdir()}
    assert names == {"predictions.jsonl", "manifest.json", "metrics.json"}
    assert json.loads((tmp_path / "metrics.json").read_text())["intervals"].startswith("95%")


def test_patients_are_clusters_after_reading_too(tmp_path: Path) -> None:
    examples = [Example(str(n), (f"i{n}",), "?", "yes", "closed", "test", {"patient": f"p{n // 2}"}) for n in range(4)]
    rows = Predictions(examples, [Prediction(str(n), "yes") for n in range(4)]).rows()
    assert [row["patient"] for row in rows] == ["i0", "i0", "i2", "i2"]
    path = tmp_path / "predictions.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    expected = mean_interval(*(np.full(2, 2.0),) * 3)
    result = score_files(path, path)
    assert result["metrics"]["global_exact"]["low"] == expected.low and result["images"] == 4
    unnamed = [replace(example, meta={}) for example in examples]
    without = Predictions(unnamed, [Prediction(str(n), "") for n in range(4)])
    assert "patient" not in without.rows()[0]
