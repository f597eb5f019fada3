from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from normtune.errors import InputError
from normtune.evaluation.export_predictions import export_predictions
from tests.support.evaluation_runs import QUESTIONS, make_question, write_report_run, write_vqa_run


def test_lmms_evals_from_log_finds_each_answer_by_its_index(tmp_path: Path) -> None:
    run = write_vqa_run(tmp_path / "a", {2}, base="nano", adapter="runs/ln")
    exported = export_predictions(run, "lmms-eval", tmp_path / "out.json", task="mine")
    assert (exported.task, exported.rows) == ("mine", len(QUESTIONS)) and "task mine" in str(exported)
    log = json.loads((tmp_path / "out.json").read_text())
    # from_log of lmms-eval 0.7.3 reads args, limit (it ignores files with a limit), task and logs
    assert log["args"] == {"model": "normtune", "model_args": "base=nano,adapter=runs/ln", "limit": None}
    assert log["model_configs"]["task"] == "mine" and len(log["time"]) == len("1231_2359")
    answers = {row["doc_id"]: row["resps"][0][0] for row in log["logs"]}
    assert answers == {at: example.answer if at == 2 else "wrong" for at, example in enumerate(QUESTIONS)}
    assert [row["target"] for row in log["logs"]] == [example.answer for example in QUESTIONS]


def test_vlmevalkit_gets_a_tab_separated_table_for_any_texts(tmp_path: Path) -> None:
    hard = ['a\tb "q"', "two\nlines", "None", "", "='x"]
    examples = [replace(make_question(n, text or "x"), question=text) for n, text in enumerate(hard)]
    run = write_vqa_run(tmp_path / "a", set(range(len(hard))), examples)
    exported = export_predictions(run, "vlmevalkit", tmp_path / "ln_SLAKE.tsv")
    with open(tmp_path / "ln_SLAKE.tsv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert list(rows[0]) == ["index", "id", "question", "answer", "prediction", "category"]
    assert [row["question"] for row in rows] == hard and [row["index"] for row in rows] == list("01234")
    assert [row["prediction"] for row in rows] == [example.answer for example in examples]
    assert exported.misread == 2 and "pandas reads 2 of the texts as missing" in str(exported)


def slake(rows: int, **about: Any) -> dict[str, Any]:
    return {"dataset": "slake", "splits": ["test"], "data": {"data": "slake", "language": "en"}} | about


def test_slakes_task_is_known_and_needs_all_rows(tmp_path: Path) -> None:
    few = [make_question(n) for n in range(5)]
    run = write_vqa_run(tmp_path / "few", {0}, few)
    about = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").write_text(json.dumps(about | slake(5)))
    with pytest.raises(InputError, match=r"slake_en is the whole test split of SLAKE, 1061 rows; .* has 5"):
        export_predictions(run, "lmms-eval", tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()
    every = [make_question(n) for n in range(1061)]
    run = write_vqa_run(tmp_path / "all", {0}, every)
    about = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").write_text(json.dumps(about | slake(1061)))
    assert export_predictions(run, "lmms-eval", tmp_path / "out.json").task == "slake_en"
    (run / "metrics.json").write_text(json.dumps(about | slake(1061, splits=["train"])))
    with pytest.raises(InputError, match="the result has 1061 of train"):
        export_predictions(run, "lmms-eval", tmp_path / "out.json")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "lmmseval", "out": "a.json"}, "did you mean 'lmms-eval'"),
        ({"to": "lmms-eval", "out": "a.jsonl", "task": "x"}, r"files that end in \.json\."),
        ({"to": "vlmevalkit", "out": "a.xlsx"}, r"files that end in \.tsv"),
        ({"to": "lmms-eval", "out": "a.json"}, "no task of lmms-eval is known for fake"),
        ({"to": "vlmevalkit", "out": "a.tsv", "task": "x"}, "--task is for lmms-eval"),
    ],
)
def test_impossible_exports_are_refused(tmp_path: Path, options: dict[str, str], message: str) -> None:
    run = write_vqa_run(tmp_path / "a", {0})
    with pytest.raises(InputError, match=message):
        export_predictions(run, options["to"], tmp_path / options["out"], task=options.get("task"))
    assert not (tmp_path / options["out"]).exists()


def test_reports_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has reports"):
        export_predictions(write_report_run(tmp_path / "a", {}), "vlmevalkit", tmp_path / "a.tsv")
