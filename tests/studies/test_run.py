"""Running a study: interrupted and resumed with the same tables, no cell twice, failing cells, searches."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from normtune import cli
from normtune.errors import InputError
from normtune.runtime.files import try_lock, write_json
from normtune.runtime.worker_pool import CallResult, call_safely
from normtune.studies import cell as cells
from normtune.studies import run as running
from normtune.studies.cell import LOCK, CellJob, run_cell
from normtune.studies.executors import JobOutcomes
from normtune.studies.page.page import write_study_report
from normtune.studies.plan import plan, single_cell
from normtune.studies.results import SCHEMA, read_tables, tabulate, write_tables
from normtune.studies.run import Summary, run_cells, run_study
from normtune.studies.spec import Study, read_study
from tests.support.base_models import input_error

MEASURED = {  # columns that differ from run to run
    "train_seconds", "train_pairs_per_second", "train_peak_bytes", "train_bytes_above_base",
    "validation_seconds", "seconds", "pairs_per_second", "peak_bytes", "started", "finished", "hardware",
}  # fmt: skip


def write_study(base: Path, folder: Path, grids: str, *, more: str = "") -> Path:
    path = folder / "study.yaml"
    path.write_text(
        f"study: tiny\nmodels: {{tiny: {{path: '{base}', home: a}}}}\n"
        'datasets:\n  a: {data: "phantom-a:1/0/2"}\n  b: {data: "phantom-b:4/2/2"}\n' + more + "grids:\n" + grids,
        encoding="utf-8",
    )
    return path


def run_in_this_process(
    call: Callable[[CellJob], str], jobs: Iterable[CellJob], workers: int, tick: Any, folder: Path
) -> JobOutcomes:
    """An executor that runs the cells in this process, one after another."""
    for job in jobs:
        yield job, call_safely(call, job)


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(running, "get_executor", lambda on: run_in_this_process)
    monkeypatch.setattr(running, "WAIT_S", 0.01)
    yield


def drop_measured(tables: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """The tables without measured columns: what is left must not depend on interruptions."""
    return {
        name: [{column: value for column, value in row.items() if column not in MEASURED} for row in rows]
        for name, rows in tables.items()
    }


def test_a_study_killed_in_a_cell_and_run_again_ends_with_the_same_table(
    base: Path, tmp_path: Path, in_this_process: None
) -> None:
    file = write_study(base, tmp_path, "  main: {recipes: [ln], train: b, budget: {epochs: 24}}\n")
    study, killed = read_study(file), tmp_path / "killed"
    key = next(cell.key for cell in plan(study).cells if cell.recipe == "ln")
    command = [sys.executable, "-m", "normtune", "study", str(file), "--out", str(killed), "--workers", "1"]
    process = subprocess.Popen([*command, "--json"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    checkpoints = killed / "cells" / key / "adapter" / "checkpoints"
    while process.poll() is None and not list(checkpoints.glob("checkpoint-*/whole")):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    while not _is_unlocked(killed / "cells" / key):  # its worker process ends with it
        time.sleep(0.005)
    assert checkpoints.is_dir() and not (killed / "cells" / key / "result.json").exists()
    assert run_study(study, killed, workers=1).failed == {}
    assert run_study(study, tmp_path / "whole", workers=1).ran == 2
    assert drop_measured(tabulate(study, killed)) == drop_measured(tabulate(study, tmp_path / "whole"))


def _is_unlocked(directory: Path) -> bool:
    with try_lock(directory / LOCK) as acquired:
        return acquired


def _write_stub_result(job: CellJob, log: Path) -> None:
    """In place of training a cell: log its key, wait a moment, and write a result."""
    with open(log, "a") as handle:
        handle.write(f"{job.cell.key}\n")
    time.sleep(0.01)
    evaluations = [{"folder": evaluation.folder} for evaluation in job.cell.evaluations]
    write_json(
        job.directory / "result.json", {"evaluations": evaluations}
    )  # written atomically, because the other command reads it


def test_two_commands_at_once_run_no_cell_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_this_process: None
) -> None:
    grid = "  main: {recipes: [ln, full, ffn], train: b, seeds: [0, 1, 2, 3]}\n"
    study = read_study(write_study(Path("nowhere"), tmp_path, grid))
    log = tmp_path / "log"
    monkeypatch.setattr(cells, "_train_and_evaluate", lambda job: _write_stub_result(job, log))
    summaries: list[Summary] = []
    threads = [
        threading.Thread(target=lambda: summaries.append(run_study(study, tmp_path / "out", workers=1)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ran = log.read_text().split()
    assert sorted(ran) == sorted({cell.key for cell in plan(study).cells}) and len(ran) == 13
    assert [(summary.done, summary.failed) for summary in summaries] == [(13, {}), (13, {})]


def test_a_cell_that_another_process_runs_is_busy(tmp_path: Path) -> None:
    study = read_study(write_study(Path("nowhere"), tmp_path, "  main: {recipes: [ln], train: b}\n"))
    job = CellJob(plan(study).cells[0], tmp_path)
    with try_lock(job.directory / LOCK) as acquired:
        assert acquired
        assert run_cell(job) == "busy"


def test_a_failed_cell_is_reported_and_the_others_run(
    base: Path,
    tmp_path: Path,
    in_this_process: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    grid = "  main: {recipes: ['connector=ln', ln], train: b, budget: {pairs: 20}}\n"
    file, out = write_study(base, tmp_path, grid), tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["normtune", "study", str(file), "--out", str(out), "--workers", "1", "--json"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    summary = json.loads(capsys.readouterr().out)
    (reason,) = summary["failed"].values()
    assert "no part 'connector'" in reason and (summary["done"], summary["cells"]) == (2, 3)
    written = json.loads((out / "results.json").read_text())
    assert "root" not in written["spec"]["datasets"]["b"], "results may be published, so they hold no folders"
    rows = {row["recipe"]: row for row in written["cells"]}
    assert {name: row["status"] for name, row in rows.items()} == {
        "connector=ln": "failed",
        "ln": "done",
        "frozen": "done",
    }
    assert rows["connector=ln"]["error"] == reason
    assert rows["ln"]["trainable"] > 0 and 0 < rows["ln"]["pairs_seen"] <= 44
    with sqlite3.connect(out / "results.sqlite") as database:
        for name, columns in SCHEMA.items():
            assert [row[1] for row in database.execute(f'PRAGMA table_info("{name}")')] == list(columns)
        stored = database.execute("SELECT rates, train_peak_bytes FROM cells WHERE recipe = 'ln'").fetchone()
        lost = database.execute("SELECT count(*), max(abs(base - tuned - forgotten)) FROM forgetting").fetchone()
        moved = database.execute("SELECT count(*), min(rms) FROM norms").fetchone()
    database.close()
    assert json.loads(stored[0]) == {"ln": 0.03} and stored[1] > 0
    assert lost[0] > 0 and lost[1] == 0
    assert moved[0] == rows["ln"]["trainable"] / 32 and moved[1] > 0
    assert "| ln | ln 0.03 | 1 |" in (out / "tables.md").read_text()
    assert r"\toprule" in (out / "tables.tex").read_text()
    (out / "report.html").unlink()
    monkeypatch.setattr(running, "get_executor", None)  # an error if anything runs
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--report-only"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    again = json.loads(capsys.readouterr().out)
    assert (again["done"], again["ran"], again["failed"]) == (2, 0, summary["failed"])
    assert (out / "report.html").is_file()


@pytest.mark.parametrize(
    ("rule", "rate"),
    [("within-error", 0.03), ("best", 0.1)],  # the score of 0.03 is within a standard error of that of 0.1
)
def test_a_search_chooses_the_rate_by_the_validation_split_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_this_process: None, rule: str, rate: float
) -> None:
    grid = "  main: {recipes: [ln], train: b, seeds: [5], learning_rates: search}\n"
    study = read_study(write_study(Path("nowhere"), tmp_path, grid, more=f"search: {{choose: {rule}}}\n"))
    scores = {0.01: 0.5, 0.03: 0.69, 0.1: 0.7}

    def scored(role: str, rate: float | None) -> dict[str, float | None]:
        value = scores.get(rate or 0, 0) if role == "validate" else rate
        return {"value": value, "low": (value or 0) - 0.05, "high": (value or 0) + 0.05}

    def run(job: CellJob) -> None:
        rate = job.cell.rates.get("ln")
        rows = [
            {
                "folder": evaluation.folder,
                "role": evaluation.role,
                "task": "vqa",
                "dataset": evaluation.dataset,
                "metrics": {"global_exact": scored(evaluation.role, rate)},
            }
            for evaluation in job.cell.evaluations
        ]
        (job.directory / "result.json").write_text(json.dumps({"evaluations": rows}))

    monkeypatch.setattr(cells, "_train_and_evaluate", run)
    summary = run_study(study, tmp_path / "out", workers=1)
    assert (summary.done, summary.waiting) == (5, 0)  # three trials, the frozen base, and the cell that waited
    (last,) = (cell for cell in running.current_plan(study, tmp_path / "out").cells if cell.seed == 5)
    assert last.rates == {"ln": rate} and last.rate_source == "search"


def test_a_plateau_ends_each_training_and_its_curve_is_in_the_tables(
    base: Path, tmp_path: Path, in_this_process: None
) -> None:
    """With a search: trials and cells stop where the validation score rises no more."""
    grid = (
        "  g: {recipes: ln, train: b, seeds: [0, 1], learning_rates: search, budget: {until: plateau, patience: 1}}\n"
    )
    study = read_study(write_study(base, tmp_path, grid, more="search: {rates: {ln: [0.01, 0.03]}}\n"))
    assert run_study(study, tmp_path / "out").failed == {}
    write_tables(study, tmp_path / "out")
    tables = read_tables(tmp_path / "out")
    cells = [cell for cell in tables["cells"] if cell["trained_on"]]
    assert len(cells) == 3  # the chosen trial is the grid's cell of the same seed
    for cell in cells:
        rows = [row for row in tables["curves"] if row["key"] == cell["key"]]
        assert [row["passes"] for row in rows] == [*range(1, len(rows) + 1)] and cell["passes"] == len(rows) < 20
        assert cell["stopped_early"] and cell["validation_metric"] == "global_exact"
        (best,) = (row for row in rows if row["is_best"])
        assert (best["step"], best["score"]) == (cell["best_step"], cell["best_score"])
        assert best["score"] == max(row["score"] for row in rows) == best["metrics"]["global_exact"]
        assert cell["train_bytes_above_base"] < cell["train_peak_bytes"]


def test_a_failed_trial_is_reported_and_its_cells_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_this_process: None
) -> None:
    grid = "  main: {recipes: [ln], train: b, learning_rates: search}\n"
    study = read_study(write_study(Path("nowhere"), tmp_path, grid))

    def run(job: CellJob) -> None:
        if job.cell.rates == {"ln": 0.1}:
            raise ZeroDivisionError("division by zero")
        _write_stub_result(job, tmp_path / "log")

    monkeypatch.setattr(cells, "_train_and_evaluate", run)
    summary = run_study(study, tmp_path / "out", workers=1)
    (reason,) = summary.failed.values()
    assert summary.waiting == 1 and reason.startswith("ZeroDivisionError at test_run.py:")


def test_minutes_become_pairs_once_and_a_later_evaluation_needs_no_training(
    base: Path, tmp_path: Path, in_this_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = "  main: {recipes: [ln], train: b, budget: {minutes: 0.002}}\n"
    out = tmp_path / "out"
    run_study(read_study(write_study(base, tmp_path, grid)), out, workers=1)
    (result,) = (path.parent / "result.json" for path in out.glob("cells/*/adapter"))
    timed = json.loads((result.parent / "budget.json").read_text())
    assert timed["pairs"] == max(1, round(timed["pairs_per_second"] * 0.12))
    pairs_seen = json.loads(result.read_text())["training"]["pairs"]
    assert abs(pairs_seen - timed["pairs"]) <= 48  # up to about one step
    monkeypatch.setattr("normtune.training.train.train", None)
    wider = grid.replace("train: b", "train: b, evaluate: [b, c]")
    more = '  c: {data: "phantom-b:1/0/1"}\n'
    study = read_study(write_study(base, tmp_path, wider, more=more))
    assert run_study(study, out, workers=1).failed == {}
    tables = tabulate(study, out)
    roles = {(row["dataset"], row["role"]) for row in tables["evaluations"]}
    assert {("b", "in"), ("c", "out"), ("a", "home"), ("c", "zero-shot")} <= roles
    study = read_study(write_study(base, tmp_path, grid.replace("train: b", "seeds: [0, 1], train: b")))
    (other,) = (cell for cell in plan(study).cells if cell.seed == 1)
    shutil.copytree(result.parent, out / "cells" / other.key)
    result_of_other_base = json.loads(result.read_text()) | {"base_fingerprint": "0" * 32 + "-" + "1" * 32}
    (out / "cells" / other.key / "result.json").write_text(json.dumps(result_of_other_base))
    assert "have different bases" in input_error(lambda: write_tables(study, out))


def test_an_unknown_executor_is_refused_with_a_hint(tmp_path: Path) -> None:
    study: Study = read_study(write_study(Path("nowhere"), tmp_path, "  main: {recipes: [ln], train: b}\n"))
    assert "did you mean 'slurm'?" in input_error(lambda: run_study(study, tmp_path, on="slrum"))


def _square(number: int) -> int:
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 3:
        raise ValueError("three")
    return number * number


def test_other_calls_finish_when_one_is_killed() -> None:
    from normtune.runtime.worker_pool import run_in_processes

    results = dict(run_in_processes(_square, range(5), workers=2))
    assert [results[number].value for number in (0, 1, 4)] == [0, 1, 16]
    assert results[2].error is not None and "was killed by signal 9" in results[2].error
    assert results[3] == CallResult(
        error=f"ValueError at {Path(__file__).name}:{_square.__code__.co_firstlineno + 4}: three"
    )


PHANTOMS = {"model": "nano", "data": "phantom-b:4", "baseline": "question-only"}


def test_a_single_cell_is_run_once(tmp_path: Path, in_this_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = single_cell("base@0.1/2", None, PHANTOMS)
    (row,) = run_cells([cell], tmp_path, workers=1)
    assert (row["name"], row["training"]) == ("base@0.1/2", None)
    assert (
        row["evaluation"]["metrics"]
        == json.loads((Path(row["evaluation"]["out"]) / "metrics.json").read_text())["metrics"]
    )
    monkeypatch.setattr(cells, "_train_and_evaluate", None)  # a call would fail
    assert list(run_cells([cell], tmp_path, workers=1)) == [row]
    for other in (single_cell("base@0.1/2", None, {**PHANTOMS, "beams": 3}), single_cell("other", None, PHANTOMS)):
        with pytest.raises(InputError, match=f"cell '{other.recipe}': .*not callable"):
            list(run_cells([other], tmp_path, workers=1))


def test_a_single_cell_is_trained_once_for_all_of_its_evaluations(
    base: Path, tmp_path: Path, in_this_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = {"model": str(base), "data": "phantom-b:4/2/2", "device": "cpu"}
    train = {**shared, "tune": "ln", "epochs": 1, "lr": 0.01, "limit": 2}
    evaluations = [{**shared, "split": split} for split in ("validate", "test")]
    (first,) = run_cells([single_cell("ln", train, evaluations[0])], tmp_path, workers=1)
    monkeypatch.setattr("normtune.training.train.train", None)  # a call would fail
    (second,) = run_cells([single_cell("ln", train, *evaluations)], tmp_path, workers=1)
    assert (first["evaluation"]["splits"], second["evaluation"]["splits"]) == (["validate"], ["test"])
    assert first["training"] == second["training"] and first["training"]["trainable"] > 0
    options = json.loads((Path(first["training"]["out"]) / "train_config.json").read_text())
    assert (options["lr"], options["limit"], options["epochs"]) == (0.01, 2, 1)


def test_options_that_decide_the_training_decide_the_key() -> None:
    shared = {"model": "nano", "data": "phantom-b:4"}
    keys = [
        single_cell("ln", {**shared, "tune": "ln", **options}, shared).key
        for options in ({}, {"lr": 0.5}, {"epochs": 7}, {"limit": 3}, {"seed": 2}, {"device": "cpu"})
    ]
    assert len(set(keys)) == 5 and keys[0] == keys[-1]


def write_fold_study(base: Path, folder: Path) -> Path:
    path = folder / "study.yaml"
    path.write_text(
        f"study: folds\nmodels: {{tiny: {{path: '{base}'}}}}\n"
        f'datasets:\n  b: {{data: "phantom-b:2/1/1", folds: 3}}\n  c: {{data: "phantom-a:1/0/2"}}\n'
        "grids:\n  g: {recipes: [frozen, ln], train: b, evaluate: [b, c], seeds: [0, 1], budget: {pairs: 4}}\n",
        encoding="utf-8",
    )
    return path


def test_the_rows_of_all_folds_are_one_evaluation(base: Path, tmp_path: Path, in_this_process: None) -> None:
    study, out = read_study(write_fold_study(base, tmp_path)), tmp_path / "out"
    summary = run_study(study, out, workers=1)
    assert summary.failed == {} and summary.done == 7  # 2 seeds, 3 folds, and the frozen base
    (file,) = (out / "splits").iterdir()
    splits = json.loads(file.read_text())["splits"]
    write_tables(study, out)
    tables = read_tables(out)
    tested = [row for row in tables["evaluations"] if row["dataset"] == "b"]
    assert {row["fold"] for row in tested} == {0, 1, 2}
    assert sum(row["rows"] for row in tested) == 3 * len(splits)
    seeds = {(row["recipe"], row["dataset"], row["metric"]): row for row in tables["seeds"]}
    for recipe, number in (("ln", 2), ("frozen", 1)):
        row = seeds[recipe, "b", "global_exact"]
        assert (row["seeds"], row["rows"], row["images"]) == (number, len(splits), 4)
        by_row = [  # of each row, once for each seed
            float(line["prediction"].strip().lower() == line["reference"].strip().lower())
            for cell in tables["cells"]
            for evaluation in tested
            if evaluation["key"] == cell["key"] and cell["recipe"] == recipe
            for line in map(json.loads, (out / evaluation["folder"] / "predictions.jsonl").read_text().splitlines())
        ]
        assert len(by_row) == number * len(splits)
        assert round(row["mean"] * len(by_row)) == sum(by_row)
    other = seeds["ln", "c", "global_exact"]  # each row is answered by the models of all folds
    values = [row["value"] for row in tables["metrics"] if row["dataset"] == "c" and row["metric"] == "global_exact"]
    assert (other["seeds"], other["images"], len(values)) == (2, 2, 7)
    tests = [row for row in tables["tests"] if row["dataset"] == "b" and row["metric"] == "global_exact"]
    assert [(row["recipe"], row["seeds"], row["rows"]) for row in tests] == [("frozen", 2, len(splits))]
    text = (out / "tables.md").read_text()
    assert "Cross-validation with 3 folds" in text and "a fold is not a seed" in text and "miss a fold" not in text
    assert "splits" not in tables["cells"][-1]["config"] and str(tmp_path) not in (out / "results.json").read_text()
    # The folder can be moved; a run with an unfinished fold is in no score.
    moved = out.rename(tmp_path / "moved")
    assert run_study(study, moved, workers=1).ran == 0
    key = next(cell["key"] for cell in tables["cells"] if cell["recipe"] == "ln" and cell["seed"] == 1)
    (moved / "cells" / key / "result.json").unlink()
    write_tables(study, moved)
    row = next(
        row
        for row in read_tables(moved)["seeds"]
        if (row["recipe"], row["dataset"], row["metric"]) == ("ln", "b", "global_exact")
    )
    assert (row["seeds"], row["rows"]) == (1, len(splits))
    assert "1 of 2 runs miss a fold" in (moved / "tables.md").read_text()
    page = (write_study_report(moved)).read_text()
    assert "Cross-validation with 3 folds" in page and "Score of each fold" in page and "3 folds" in page


def test_a_base_in_a_relative_folder_has_the_folders_that_were_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run makes the paths absolute: a finished cell would else look unfinished, and the study would never end."""
    monkeypatch.chdir(tmp_path)
    Path("bases/mine").mkdir(parents=True)
    planned = single_cell("mine", None, {"model": "bases/mine", "data": "phantom-b:4"})
    (evaluation,) = planned.evaluations
    (run_evaluation,) = cells.with_absolute_paths(planned).evaluations
    assert run_evaluation.config.model == str(tmp_path / "bases/mine")
    assert run_evaluation.folder == evaluation.folder
