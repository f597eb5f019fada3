"""Runs in Python: names and objects give the same, models are loaded once, results are printed and plotted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import normtune
from normtune.models.families.miss import MissFamily
from normtune.runtime.files import read_json
from normtune.studies import run as running
from tests.studies.test_run import run_in_this_process, write_study

DATA = "phantom-b:2"
QUIET: dict[str, Any] = {"progress": False}


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The sources of all models that are loaded."""
    sources: list[str] = []
    load = MissFamily.load.__func__  # type: ignore[attr-defined]

    def counting(cls: Any, source: Any, *arguments: Any, **options: Any) -> Any:
        sources.append(str(source))
        return load(cls, source, *arguments, **options)

    monkeypatch.setattr(MissFamily, "load", classmethod(counting))
    return sources


def test_names_and_objects_give_the_same_and_a_loaded_model_is_not_loaded_again(
    base: Path, tmp_path: Path, loads: list[str]
) -> None:
    model, data = normtune.load(base, device="cpu"), normtune.open_dataset(DATA)
    options: dict[str, Any] = {"tune": "ln", "max_steps": 2, "lr": 0.1, **QUIET}
    by_object = normtune.train(model, data, out=tmp_path / "object", **options)
    first = normtune.evaluate(model, data, adapter=by_object.adapter, limit=4, **QUIET)
    normtune.compare({"frozen": normtune.evaluate(model, data, limit=4, **QUIET), "ln": first})
    normtune.ask(model, data.open_image(data.test[0].images[0]), "why?", adapter=by_object.adapter)
    assert loads == [str(base)]
    by_name = normtune.train(str(base), DATA, out=tmp_path / "name", device="cpu", **options)
    second = normtune.evaluate(
        str(base), DATA, adapter=str(by_name.adapter), limit=4, device="cpu", out=tmp_path / "scores", **QUIET
    )
    assert loads == [str(base)] * 3
    files = [(tmp_path / name / "adapter.safetensors").read_bytes() for name in ("object", "name")]
    assert files[0] == files[1] and by_object.losses == by_name.losses
    assert first.predictions == second.predictions and first.metrics == second.metrics
    assert first.out is None and second.out == tmp_path / "scores"
    assert first.record["data"] == second.record["data"] == read_json(tmp_path / "scores" / "metrics.json")["data"]
    assert [first.record[key] for key in ("base", "setting")] == [str(base), "in-distribution"]
    configs = [read_json(tmp_path / name / "train_config.json") | {"out": ""} for name in ("object", "name")]
    assert configs[0] == configs[1]


def test_a_training_run_is_shown_and_plotted(base: Path, tmp_path: Path) -> None:
    run = normtune.train(str(base), DATA, max_steps=3, out=tmp_path, device="cpu", **QUIET)
    assert run.adapter == tmp_path and [step for step, _ in run.losses] == [1, 2, 3]
    assert run.to_dict() == read_json(tmp_path / "train_result.json")
    assert str(run).endswith(f"Written: {tmp_path}") and run._repr_html_().startswith("<pre>vision")
    (line,) = run.plot().get_lines()
    assert list(line.get_ydata()) == [loss for _, loss in run.losses]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochz": 3}, "epochz: unknown, did you mean 'epochs'"),
        ({"epochs": -1}, "--epochs: "),
        ({"tune": "lnn"}, "did you mean 'ln'"),
        ({"device": "cpu"}, r"device is an option of normtune\.load"),
        ({"language": "zh"}, r"language is an option of normtune\.open_dataset"),
    ],
)
def test_options_are_checked_before_anything_is_written(
    base: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    model, data = normtune.load(base, device="cpu"), normtune.open_dataset(DATA)
    with pytest.raises(normtune.InputError, match=message):
        normtune.train(model, data, out=tmp_path / "run", **options, **QUIET)
    assert not (tmp_path / "run").exists()


def test_a_dataset_that_was_made_in_python_is_trained_on_and_evaluated(base: Path, tmp_path: Path) -> None:
    phantom = normtune.open_dataset(DATA)
    data = normtune.Dataset("mine", phantom.examples[:30], phantom.open_image)
    model = normtune.load(base, device="cpu")
    run = normtune.train(model, data, max_steps=1, out=tmp_path, **QUIET)
    result = normtune.evaluate(model, data, adapter=run.adapter, split="train", limit=3, **QUIET)
    assert (result.record["dataset"], result.record["setting"]) == ("mine", "in-distribution")
    json.dumps(result.to_dict())


def test_baselines_and_controls_are_options(base: Path) -> None:
    data = normtune.open_dataset("phantom-b:4/0/4")
    model = normtune.load(base, device="cpu")
    baseline = normtune.evaluate(model, data, baseline="question-only", **QUIET)
    assert baseline.record["base"] is None and baseline.record["baseline"] == "question-only"
    result = normtune.evaluate(model, data, controls="blank", limit=4, **QUIET)
    assert set(result.controls) == {"blank"} and "blank" in str(result)


def test_a_progress_bar_is_drawn_on_stderr_unless_it_is_switched_off(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = normtune.load(base, device="cpu"), normtune.open_dataset(DATA)
    normtune.evaluate(model, data, limit=4)
    printed = capsys.readouterr()
    assert "answering" in printed.err and "4/4" in printed.err and not printed.out
    normtune.evaluate(model, data, limit=4, progress=False)
    assert capsys.readouterr() == ("", "")


def test_a_study_has_a_table_and_a_page(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "get_executor", lambda on: run_in_this_process)
    grids = "  one: {recipes: [frozen, ln], train: b, budget: {pairs: 8}}\n"
    file = write_study(base, tmp_path, grids)
    result = normtune.study(str(file), str(tmp_path / "out"), workers=1, progress=False)
    assert result.summary.done == 2 and not result.summary.failed
    assert result.page == tmp_path / "out" / "report.html" and result.page.is_file()
    assert {row["recipe"] for row in result.table} == {"frozen", "ln"}
    frame = result.table.to_pandas()
    assert set(frame["dataset"]) <= {"a", "b"} and frame["value"].between(0, 1).all()
    assert result.to_dict()["tables"][-1] == str(result.page) and "2 of 2 cells done" in str(result)
    again = normtune.study(file, tmp_path / "out", report_only=True, progress=False)
    assert list(again.table) == list(result.table)
