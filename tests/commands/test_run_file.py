"""A run as a file on the command line: init, train run.yaml, evaluate run.yaml, train --dry-run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
import yaml

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(run_command: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """`run_command` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return run_command


def test_a_run_file_trains_and_the_file_beside_the_adapter_makes_it_again(base: Path, run: Run, tmp_path: Path) -> None:
    options = ("--data", "phantom-b:4", "--model", base, "--epochs", 1, "--out", "first", "--yes")
    assert run("init", "my.yaml", *options)[0] == 0
    status, _, errors = run("train", "my.yaml", "--seed", 3, "--epochs", 2, "--json")
    assert status == 0 and errors == "my.yaml: --epochs 2.0 replaces 1.0\n"
    resolved = yaml.safe_load((tmp_path / "first" / "run.yaml").read_text())
    assert (resolved["seed"], resolved["epochs"], resolved["device"]) == (3, 2.0, "cpu")
    status, _, errors = run("train", "first/run.yaml", "--out", "second", "--json")
    assert status == 0 and errors == "first/run.yaml: --out second replaces first\n"
    for name in ("adapter.safetensors", "training_rows.json"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    # the same run in the same folder is finished
    assert json.loads(run("train", "first/run.yaml", "--json")[1])["already_finished"]


def test_an_evaluation_is_repeated_from_its_file(base: Path, run: Run, tmp_path: Path) -> None:
    assert run("evaluate", base, "--data", "phantom-b:4", "--limit", 6, "--out", "first")[0] == 0
    assert run("evaluate", "first/run.yaml", "--out", "second")[0] == 0
    predictions = [(tmp_path / name / "predictions.jsonl").read_bytes() for name in ("first", "second")]
    assert predictions[0] == predictions[1]


def test_errors_of_a_run_file_name_its_line(run: Run, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: nano\nepoch: 3\n")
    status, out, errors = run("train", "run.yaml")
    assert status == 2 and out == "" and "run.yaml, line 2: epoch: unknown, did you mean 'epochs'?" in errors
    (tmp_path / "run.yaml").write_text("model: nano\n")
    assert run("train", "run.yaml")[2] == "normtune: --data is missing; --out is missing\n"
    assert run("train", "nano")[2] == "normtune: --data is missing; --out is missing\n"


def test_init_asks_for_what_is_not_given(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    questions: list[str] = []

    def prompt(question: str, default: str, **_: object) -> str:
        questions.append(question)
        return {"ln": "lora(r=4)"}.get(default, default)

    monkeypatch.setattr(typer, "prompt", prompt)
    status, out, _ = run("init", "--data", "phantom-a", "--json")
    assert status == 0 and len(questions) == 4 and json.loads(out)["tune"] == "lora(r=4)"
    assert yaml.safe_load((tmp_path / "run.yaml").read_text()) == {
        "data": "phantom-a", "model": "nano", "tune": "lora(r=4)", "epochs": 10.0, "out": "runs/ln",
    }  # fmt: skip
    assert "run.yaml exists" in run("init", "--yes")[2]
    assert "unknown method 'lm'" in run("init", "other.yaml", "--yes", "--tune", "lm")[2]
    assert not (tmp_path / "other.yaml").exists()


def test_a_dry_run_checks_and_plans_but_writes_nothing(run: Run, tmp_path: Path) -> None:
    options = ("train", "nano", "--data", "phantom-b:4", "--epochs", 2, "--batch", 8, "--out", "out", "--dry-run")
    status, out, _ = run(*options, "--json")
    report = json.loads(out)
    assert status == 0 and list(tmp_path.iterdir()) == []
    assert report["run"]["steps"] == 2 * report["run"]["steps_an_epoch"] and report["run"]["folder"] == "new"
    assert report["preflight"]["rows"]["used"] == report["run"]["pairs"]
    assert report["recipe"]["trainable"] > 0 and report["plan"]["asked"]["total"] > 0
    status, out, _ = run(*options)
    assert status == 0 and "nothing was trained" in out and "peak memory" in out
    assert "unknown method" in run(*options, "--tune", "lm")[2]


@pytest.mark.parametrize(("kind", "field"), [("train", "epochs"), ("evaluate", "candidates"), ("study", "grids")])
def test_the_schema_of_a_file_describes_its_fields(run: Run, kind: str, field: str) -> None:
    status, out, _ = run("schema", kind)
    values = json.loads(out)
    assert status == 0 and field in values["properties"]
    assert ("required" in values) == (kind == "study"), "a run's options may come from the command line"
