"""`normtune doctor`: what it reports, its self-test, and its exit status."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import normtune
from normtune.cli import app
from normtune.commands import doctor
from normtune.models import loading

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["doctor", "--device", "cpu", *arguments])
    return result.exit_code, result.stdout


def test_the_version() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"normtune {normtune.__version__}\n")


def test_a_working_installation_passes() -> None:
    status, text = run("--json")
    report: dict[str, Any] = json.loads(text)
    assert status == 0
    test = report["self_test"]
    assert test["passed"] and test["losses"][1] < test["losses"][0] and len(test["answers"]) == 2
    assert report["versions"]["normtune"] and report["devices"][0]["device"] == "cpu"
    assert report["devices"][0]["total_bytes"] >= report["devices"][0]["free_bytes"] > 0
    lines = doctor.doctor_text(report).splitlines()
    assert lines[-1].startswith("self-test passed in ")
    assert any(line.startswith("cpu: ") and "GiB free" in line for line in lines)


def test_a_failed_self_test_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ImportError("libcudart.so: cannot open shared object file")

    monkeypatch.setattr(loading, "load", fail)
    status, text = run()
    assert status == 1
    assert "self-test FAILED: ImportError: libcudart.so" in text and "pip install -c constraints.txt" in text


def test_a_model_that_does_not_learn_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.optim.AdamW.step", lambda *_, **__: None)
    status, text = run("--json")
    assert status == 1 and "lower loss after one step: False" in json.loads(text)["self_test"]["error"]


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        doctor, "package_version", lambda name: "not installed" if name in ("torchao", "submitit") else "1"
    )
    extras = doctor._extras()
    assert [name for name, extra in extras.items() if not extra["installed"]] == ["quantize", "slurm"]
    report = {"versions": {}, "extras": extras, "self_test": {"passed": False, "error": "x"}}
    assert "pip install 'normtune[slurm]'" in doctor.doctor_text(report)


def test_the_extras_are_those_of_the_project() -> None:
    """Names of packages without their versions."""
    extras = {
        name: tuple(package.partition(">=")[0] for package in packages)
        for name, packages in PROJECT["optional-dependencies"].items()
        if name not in ("docs", "dev")
    }
    assert extras == {name: packages for name, (packages, _) in doctor.EXTRAS.items()}


def test_the_version_is_that_of_the_project() -> None:
    assert normtune.__version__ == PROJECT["version"]
