from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from normtune.data.records import Example
from normtune.evaluation.compare import read_runs
from normtune.evaluation.review.rows import Row, Said, chosen, count, read_rows, strata
from tests.support.evaluation_runs import QUESTIONS, REPORTS, answered, question, reported


def rows_of(right: int, wrong: int, kind: str = "open") -> list[Row]:
    """Rows r0, r1, ... of which the first `right` are right."""
    return [
        Row(
            Example(f"r{n}", (f"{n}",), "?", "lung", kind, "test"),  # type: ignore[arg-type]
            (Said("x", float(n < right), None, None),),
        )
        for n in range(right + wrong)
    ]


def test_rows_hold_what_each_run_said_joined_by_id(tmp_path: Path) -> None:
    first = answered(tmp_path / "a", {0, 8}, scores={0: -0.5, 1: float("nan")})
    second = answered(tmp_path / "b", {1})
    lines = (second / "predictions.jsonl").read_text().rstrip("\n").split("\n")
    (second / "predictions.jsonl").write_text("\n".join(reversed(lines)) + "\n")
    rows = read_rows(read_runs([first, second]), {"q0": {"organ": "lung"}})
    assert [row.example.id for row in rows] == [example.id for example in QUESTIONS]
    assert [[said.value for said in row.said] for row in rows[:3]] == [[1, 0], [0, 1], [0, 0]]
    assert rows[0].said[0] == Said("lung", 1.0, 1.0, -0.5)
    assert rows[1].said[0].score is None, "a score that is no number is left out"
    assert rows[8].said[0].recall is None, "closed questions have no recall"
    assert rows[0].example.meta["organ"] == "lung" and "organ" not in rows[1].example.meta


def test_reports_are_valued_by_rouge_l(tmp_path: Path) -> None:
    rows = read_rows(read_runs([reported(tmp_path / "a", {0: "", 1: "No effusion in case 1."})]), {})
    assert [row.said[0].value for row in rows][::3] == [0.0, 1.0]
    assert 0.5 < rows[1].said[0].value < 1


def test_strata_that_the_results_name_win_over_the_datas(tmp_path: Path) -> None:
    named = [replace(example, meta={"organ": "liver"}) for example in QUESTIONS]
    rows = read_rows(
        read_runs([answered(tmp_path / "a", set(), named)]), {"q0": {"organ": "x", "plane": "y"}}
    )
    assert rows[0].example.meta == {"organ": "liver", "plane": "y"}


def test_counts_are_shares_of_each_run(tmp_path: Path) -> None:
    runs = read_runs([answered(tmp_path / "a", {0, 8}), answered(tmp_path / "b", set(range(8)))])
    rows = read_rows(runs, {})
    by_id = {row.example.id: row for row in rows}
    (field, parts), *others = strata(rows).items()
    assert (field, others) == ("kind", [])
    found = {value: count([by_id[id] for id in ids], value) for value, ids in parts.items()}
    assert found["open"].rows == 8 and found["open"].shares == (1 / 8, 1.0)
    assert found["closed"].rows == 4 and found["closed"].shares == (1 / 4, 0.0)
    assert count(rows, "all").shares == (2 / 12, 8 / 12)


def test_few_rows_are_all_shown() -> None:
    rows = rows_of(3, 2)
    assert chosen(rows, 5) == (rows, "All 5 rows are shown.")


@pytest.mark.parametrize(
    ("right", "wrong", "shown_wrong"),
    [(50, 50, 15), (100, 4, 4), (2, 98, 18), (0, 100, 20), (100, 0, 0)],
)
def test_three_quarters_of_the_rows_shown_are_wrong_ones(right: int, wrong: int, shown_wrong: int) -> None:
    rows = rows_of(right, wrong)
    shown, sentence = chosen(rows, 20)
    assert len(shown) == 20 and sum(not row.all_right for row in shown) == shown_wrong
    assert f"{shown_wrong} of the {wrong} that some run got wrong" in sentence
    assert f"{20 - shown_wrong} of the {right} others" in sentence
    assert [rows.index(row) for row in shown] == sorted(rows.index(row) for row in shown)


def test_rows_are_drawn_by_their_ids_whatever_their_order() -> None:
    rows = rows_of(0, 60, "report")
    shown, sentence = chosen(rows, 10)
    assert "10 of 60 reports" in sentence
    backwards, _ = chosen(rows[::-1], 10)
    assert backwards == shown[::-1]
    least = sorted((row.example.id for row in rows), key=lambda id: hashlib.sha256(id.encode()).digest())
    assert {row.example.id for row in shown} == set(least[:10])


def test_results_without_strata_or_scores_are_read(tmp_path: Path) -> None:
    run = answered(tmp_path / "a", {0}, [question(0), question(1)])
    path = run / "predictions.jsonl"
    old = [json.loads(line) for line in path.read_text().rstrip("\n").split("\n")]
    for row in old:
        row.pop("strata", None)
        row.pop("score")
    path.write_text("".join(json.dumps(row) + "\n" for row in old))
    rows = read_rows(read_runs([run]), {})
    assert [row.said[0].score for row in rows] == [None, None] and strata(rows) == {}


def test_reports_of_one_kind_have_no_strata(tmp_path: Path) -> None:
    assert strata(read_rows(read_runs([reported(tmp_path / "a", {}, REPORTS)]), {})) == {}
