from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from normtune.data.records import Example
from normtune.evaluation.compare import read_runs
from normtune.evaluation.review.rows import Row, RunPrediction, count_rows, ids_by_stratum, read_rows, select_rows
from tests.support.evaluation_runs import QUESTIONS, REPORTS, make_question, write_report_run, write_vqa_run


def rows_of(right: int, wrong: int, kind: str = "open") -> list[Row]:
    """Rows r0, r1, ...; the first `right` of them are right."""
    return [
        Row(
            Example(f"r{n}", (f"{n}",), "?", "lung", kind, "test"),  # type: ignore[arg-type]
            (RunPrediction("x", float(n < right), None, None),),
        )
        for n in range(right + wrong)
    ]


def test_rows_have_the_predictions_of_each_run_joined_by_id(tmp_path: Path) -> None:
    first = write_vqa_run(tmp_path / "a", {0, 8}, scores={0: -0.5, 1: float("nan")})
    second = write_vqa_run(tmp_path / "b", {1})
    lines = (second / "predictions.jsonl").read_text().rstrip("\n").split("\n")
    (second / "predictions.jsonl").write_text("\n".join(reversed(lines)) + "\n")
    rows = read_rows(read_runs([first, second]), {"q0": {"organ": "lung"}})
    assert [row.example.id for row in rows] == [example.id for example in QUESTIONS]
    assert [[prediction.value for prediction in row.predictions] for row in rows[:3]] == [[1, 0], [0, 1], [0, 0]]
    assert rows[0].predictions[0] == RunPrediction("lung", 1.0, 1.0, -0.5)
    assert rows[1].predictions[0].score is None, "a score that is not a number is omitted"
    assert rows[8].predictions[0].recall is None, "closed questions have no recall"
    assert rows[0].example.meta["organ"] == "lung" and "organ" not in rows[1].example.meta


def test_reports_are_scored_by_rouge_l(tmp_path: Path) -> None:
    rows = read_rows(read_runs([write_report_run(tmp_path / "a", {0: "", 1: "No effusion in case 1."})]), {})
    assert [row.predictions[0].value for row in rows][::3] == [0.0, 1.0]
    assert 0.5 < rows[1].predictions[0].value < 1


def test_strata_of_the_results_have_precedence_over_those_of_the_dataset(tmp_path: Path) -> None:
    named = [replace(example, meta={"organ": "liver"}) for example in QUESTIONS]
    rows = read_rows(read_runs([write_vqa_run(tmp_path / "a", set(), named)]), {"q0": {"organ": "x", "plane": "y"}})
    assert rows[0].example.meta == {"organ": "liver", "plane": "y"}


def test_counts_are_shares_of_each_run(tmp_path: Path) -> None:
    runs = read_runs([write_vqa_run(tmp_path / "a", {0, 8}), write_vqa_run(tmp_path / "b", set(range(8)))])
    rows = read_rows(runs, {})
    by_id = {row.example.id: row for row in rows}
    (field, values), *other_fields = ids_by_stratum(rows).items()
    assert (field, other_fields) == ("kind", [])
    counts = {value: count_rows([by_id[id] for id in ids], value) for value, ids in values.items()}
    assert counts["open"].rows == 8 and counts["open"].shares == (1 / 8, 1.0)
    assert counts["closed"].rows == 4 and counts["closed"].shares == (1 / 4, 0.0)
    assert count_rows(rows, "all").shares == (2 / 12, 8 / 12)


def test_all_rows_are_shown_below_the_limit() -> None:
    rows = rows_of(3, 2)
    assert select_rows(rows, 5) == (rows, "The page shows all 5 rows.")


@pytest.mark.parametrize(
    ("right", "wrong", "selected_wrong"), [(50, 50, 15), (100, 4, 4), (2, 98, 18), (0, 100, 20), (100, 0, 0)]
)
def test_three_quarters_of_the_selected_rows_are_wrong(right: int, wrong: int, selected_wrong: int) -> None:
    rows = rows_of(right, wrong)
    selected, sentence = select_rows(rows, 20)
    assert len(selected) == 20 and sum(not row.all_right for row in selected) == selected_wrong
    assert f"{selected_wrong} of the {wrong} that at least one run got wrong" in sentence
    assert f"{20 - selected_wrong} of the {right} others" in sentence
    assert [rows.index(row) for row in selected] == sorted(rows.index(row) for row in selected)


def test_the_selection_does_not_depend_on_the_order_of_rows() -> None:
    rows = rows_of(0, 60, "report")
    selected, sentence = select_rows(rows, 10)
    assert "10 of 60 reports" in sentence
    backwards, _ = select_rows(rows[::-1], 10)
    assert backwards == selected[::-1]
    smallest = sorted((row.example.id for row in rows), key=lambda id: hashlib.sha256(id.encode()).digest())
    assert {row.example.id for row in selected} == set(smallest[:10])


def test_results_without_strata_or_scores_are_read(tmp_path: Path) -> None:
    run = write_vqa_run(tmp_path / "a", {0}, [make_question(0), make_question(1)])
    path = run / "predictions.jsonl"
    old = [json.loads(line) for line in path.read_text().rstrip("\n").split("\n")]
    for row in old:
        row.pop("strata", None)
        row.pop("score")
    path.write_text("".join(json.dumps(row) + "\n" for row in old))
    rows = read_rows(read_runs([run]), {})
    assert [row.predictions[0].score for row in rows] == [None, None] and ids_by_stratum(rows) == {}


def test_reports_of_one_kind_have_no_strata(tmp_path: Path) -> None:
    assert ids_by_stratum(read_rows(read_runs([write_report_run(tmp_path / "a", {}, REPORTS)]), {})) == {}
