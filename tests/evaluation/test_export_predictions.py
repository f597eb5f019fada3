from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from normtune.errors import InputError
from normtune.evaluation.export_predictions import export_predictions, export_text
from tests.support.evaluation_runs import QUESTIONS, answered, question, reported


def test_lmms_evals_from_log_finds_each_answer_by_its_place(tmp_path: Path) -> None:
    run = answered(tmp_path / "a", {2}, base="nano", adapter="runs/ln")
    found = export_predictions(run, "lmms-eval", tmp_path / "out.json", task="mine")
    assert (found.task, found.rows) == ("mine", len(QUESTIONS)) and "task mine" in export_text(found)
    log = json.loads((tmp_path / "out.json").read_text())
    # what from_log of lmms-eval 0.7.3 reads: args, limit (none, or the file is passed over), task and logs
    assert log["args"] == {"model": "normtune", "model_args": "base=nano,adapter=runs/ln", "limit": None}
    assert log["model_configs"]["task"] == "mine" and len(log["time"]) == len("1231_2359")
    answers = {row["doc_id"]: row["resps"][0][0] for row in log["logs"]}
    assert answers == {at: example.answer if at == 2 else "wrong" for at, example in enumerate(QUESTIONS)}
    assert [row["target"] for row in log["logs"]] == [example.answer for example in QUESTIONS]


def test_vlmevalkit_gets_a_table_of_tabs_whatever_the_texts_hold(tmp_path: Path) -> None:
    hard = ['a\tb "q"', "two\nlines", "None", "", "='x"]
    examples = [replace(question(n, text or "x"), question=text) for n, text in enumerate(hard)]
    run = answered(tmp_path / "a", set(range(len(hard))), examples)
    found = export_predictions(run, "vlmevalkit", tmp_path / "ln_SLAKE.tsv")
    with open(tmp_path / "ln_SLAKE.tsv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert list(rows[0]) == ["index", "id", "question", "answer", "prediction", "category"]
    assert [row["question"] for row in rows] == hard and [row["index"] for row in rows] == list("01234")
    assert [row["prediction"] for row in rows] == [example.answer for example in examples]
    assert found.misread == 2 and "2 texts are words that pandas takes for missing" in export_text(found)


def slake(rows: int, **about: Any) -> dict[str, Any]:
    return {"dataset": "slake", "splits": ["test"], "data": {"data": "slake", "language": "en"}} | about


def test_slakes_task_is_known_and_must_be_whole(tmp_path: Path) -> None:
    few = [question(n) for n in range(5)]
    run = answered(tmp_path / "few", {0}, few)
    about = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").write_text(json.dumps(about | slake(5)))
    with pytest.raises(InputError, match=r"slake_en is the whole test split of SLAKE, 1061 rows; .* holds 5"):
        export_predictions(run, "lmms-eval", tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()
    every = [question(n) for n in range(1061)]
    run = answered(tmp_path / "all", {0}, every)
    about = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").write_text(json.dumps(about | slake(1061)))
    assert export_predictions(run, "lmms-eval", tmp_path / "out.json").task == "slake_en"
    (run / "metrics.json").write_text(json.dumps(about | slake(1061, splits=["train"])))
    with pytest.raises(InputError, match="the result holds 1061 of train"):
        export_predictions(run, "lmms-eval", tmp_path / "out.json")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"to": "lmmseval", "out": "a.json"}, "did you mean 'lmms-eval'"),
        ({"to": "lmms-eval", "out": "a.jsonl", "task": "x"}, r"files that end in \.json\."),
        ({"to": "vlmevalkit", "out": "a.xlsx"}, r"files that end in \.tsv"),
        ({"to": "lmms-eval", "out": "a.json"}, "no task of fake that is known here"),
        ({"to": "vlmevalkit", "out": "a.tsv", "task": "x"}, "--task goes with lmms-eval"),
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path: Path, options: dict[str, str], told: str) -> None:
    run = answered(tmp_path / "a", {0})
    with pytest.raises(InputError, match=told):
        export_predictions(run, options["to"], tmp_path / options["out"], task=options.get("task"))
    assert not (tmp_path / options["out"]).exists()


def test_reports_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds reports"):
        export_predictions(reported(tmp_path / "a", {}), "vlmevalkit", tmp_path / "a.tsv")
