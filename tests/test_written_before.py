"""Files that normtune 0.1.0 wrote are read by the current code, through the command line only.

`fixtures/make_written_by_0_1.py` made the files.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.tolerance import approx

WRITTEN = Path(__file__).parent / "fixtures" / "written_by_0_1"
EXPECTED: dict[str, Any] = json.loads((WRITTEN / "expected.json").read_text(encoding="utf-8"))

Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(run_command: Callable[..., tuple[int, str, str]]) -> Run:
    """Run a command in this process with `--json`; return the object that it prints."""

    def call(*arguments: object) -> dict[str, Any]:
        status, printed, errors = run_command(*arguments, "--json")
        assert status == 0, errors
        result: dict[str, Any] = json.loads(printed)
        return result

    return call


def read_rows(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def assert_same_predictions(actual: list[dict[str, Any]], expected: dict[str, dict[str, Any]]) -> None:
    rows = {row["id"]: row for row in actual}
    for row_id, values in expected.items():
        assert rows[row_id]["prediction"] == values["prediction"], row_id
        assert rows[row_id]["score"] == approx(values["score"]), row_id


@pytest.mark.parametrize("name", EXPECTED["adapters"])
def test_evaluate_reads_an_adapter(run: Run, tmp_path: Path, name: str) -> None:
    data = ("--data", "jsonl", "--root", WRITTEN / "data", "--device", "cpu")
    run("evaluate", "nano", "--adapter", WRITTEN / "adapters" / name, *data, "--out", tmp_path / "run")
    assert_same_predictions(read_rows(tmp_path / "run"), EXPECTED["adapters"][name]["predictions"])
    if name == "ln":
        metrics = json.loads((tmp_path / "run" / "metrics.json").read_text(encoding="utf-8"))
        assert _without_intervals(metrics["metrics"]) == _without_intervals(EXPECTED["metrics"]["ln"])
        previous = json.loads((WRITTEN / "evaluation" / "ln" / "metrics.json").read_text(encoding="utf-8"))
        assert metrics.keys() >= previous.keys()  # later versions may add fields
        for file in ("manifest.json", "predictions.jsonl"):
            assert (tmp_path / "run" / file).is_file()
        rows, previous_rows = read_rows(tmp_path / "run"), read_rows(WRITTEN / "evaluation" / "ln")
        assert all(row.keys() >= before.keys() for row, before in zip(rows, previous_rows, strict=True))


@pytest.mark.parametrize("name", EXPECTED["adapters"])
def test_inspect_counts_the_same_trainable_parameters(run: Run, name: str) -> None:
    expected = EXPECTED["adapters"][name]
    result = run("inspect", "nano", "--tune", expected["recipe"])
    assert result["recipe"]["trainable"] == expected["trainable"]
    described = json.loads((WRITTEN / "adapters" / name / "adapter.json").read_text(encoding="utf-8"))
    assert result["recipe"]["resolved"] == described["recipe"]


def test_compare_reads_evaluations(run: Run) -> None:
    result = run("compare", WRITTEN / "evaluation" / "base", WRITTEN / "evaluation" / "ln")
    differences, previous = map(_without_intervals, (result["differences"], EXPECTED["differences"]))
    assert _without_additions(differences, previous) == previous


def test_compare_reads_an_old_and_a_new_evaluation(run: Run, tmp_path: Path) -> None:
    data = ("--data", "jsonl", "--root", WRITTEN / "data", "--device", "cpu")
    run("evaluate", "nano", *data, "--out", tmp_path / "new")
    result = run("compare", WRITTEN / "evaluation" / "base", tmp_path / "new")
    assert all(metric["difference"] == 0 for metric in result["differences"]["new"].values())


def test_review_reads_evaluations(run: Run, tmp_path: Path) -> None:
    runs = (WRITTEN / "evaluation" / "base", WRITTEN / "evaluation" / "ln")
    run("review", *runs, "--root", WRITTEN / "data", "--out", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    for row in read_rows(runs[1]):
        assert row["question"] in page and row["prediction"] in page
    assert page.count("data:image/") >= 3


def test_score_reads_predictions(run: Run, tmp_path: Path) -> None:
    predictions = WRITTEN / "evaluation" / "ln" / "predictions.jsonl"
    result = run("score", predictions, predictions, "--task", "vqa", "--out", tmp_path / "score.json")
    value = result["metrics"]["global_exact"]["value"]
    assert value == EXPECTED["metrics"]["ln"]["global_exact"]["value"]


def test_merge_accepts_an_adapter(run: Run, tmp_path: Path) -> None:
    run("merge", "nano", "--adapter", WRITTEN / "adapters" / "ln", "--out", tmp_path / "merged")
    data = ("--data", "jsonl", "--root", WRITTEN / "data", "--device", "cpu")
    run("evaluate", tmp_path / "merged", *data, "--out", tmp_path / "run")
    assert_same_predictions(read_rows(tmp_path / "run"), EXPECTED["adapters"]["ln"]["predictions"])


def test_export_accepts_a_lora_adapter(run: Run, tmp_path: Path) -> None:
    run("export", "--adapter", WRITTEN / "adapters" / "lora", "--out", tmp_path / "peft")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["peft_type"], config["r"]) == ("LORA", 2)


def _without_intervals(value: Any) -> Any:
    """`value` without what 0.1 computed by the bootstrap and by pooling seeds as rows; the keys stay."""
    if isinstance(value, dict):
        several_seeds = isinstance(seeds := value.get("seeds"), int) and seeds > 1
        changed = ("low", "high", *(("rows", "p", "p_holm", "method", "seeds") if several_seeds else ()))
        return {key: _without_intervals(item) for key, item in value.items() if key not in changed}
    return [_without_intervals(item) for item in value] if isinstance(value, list) else value


def _without_additions(value: Any, previous: Any) -> Any:
    """`value` without the keys that `previous` lacks: later versions add options, and remove none."""
    if isinstance(value, dict) and isinstance(previous, dict):
        return {key: _without_additions(item, previous[key]) for key, item in value.items() if key in previous}
    if isinstance(value, list) and isinstance(previous, list) and len(value) == len(previous):
        return [_without_additions(item, old) for item, old in zip(value, previous, strict=True)]
    return value


def test_a_finished_study_is_not_run_again(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The keys of the cells and the names of the evaluation folders are those of 0.1.0."""
    shutil.copytree(WRITTEN, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    cells = Path("study/cells")
    before = {path: path.read_bytes() for path in cells.rglob("*") if path.is_file()}
    assert sorted(path.name for path in cells.iterdir()) == EXPECTED["study"]["keys"]
    previous = json.loads(Path("study/results.json").read_text(encoding="utf-8"))

    summary = run("study", "study.yaml", "--out", "study")

    assert {key: summary[key] for key in ("cells", "done")} == {
        key: EXPECTED["study"][key] for key in ("cells", "done")
    }
    assert (summary["ran"], summary["failed"], summary["waiting"]) == (0, {}, 0)
    assert {path: path.read_bytes() for path in cells.rglob("*") if path.is_file()} == before
    results = json.loads(Path("study/results.json").read_text(encoding="utf-8"))
    assert _without_additions(_without_intervals(results), previous) == _without_intervals(previous)
    for table in ("seeds", "tests"):
        assert all(row.keys() <= after.keys() for row, after in zip(previous[table], results[table], strict=True))
    assert Path("study/report.html").stat().st_size > 0


def test_a_missing_cell_of_a_study_is_run(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cell that is missing has the key of 0.1.0, and all others are kept."""
    shutil.copytree(WRITTEN, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    frozen = next(
        path.parent
        for path in Path("study/cells").glob("*/result.json")
        if json.loads(path.read_text(encoding="utf-8"))["training"] is None
    )
    previous = json.loads((frozen / "result.json").read_text(encoding="utf-8"))
    (frozen / "result.json").unlink()

    summary = run("study", "study.yaml", "--out", "study", "--workers", 1)

    assert (summary["ran"], summary["done"]) == (1, EXPECTED["study"]["done"])
    result = json.loads((frozen / "result.json").read_text(encoding="utf-8"))
    assert result.keys() == previous.keys()
    assert result["evaluations"] == previous["evaluations"]  # read from the evaluation folders
