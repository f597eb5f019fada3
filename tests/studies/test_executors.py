"""A study run through Ray and through submitit gives the same tables as one run in this process."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from normtune.studies import executors as running
from normtune.studies.results import read_tables, write_tables
from normtune.studies.run import run_study
from normtune.studies.spec import read_study
from tests.studies.test_run import drop_measured, run_in_this_process, write_study
from tests.support.base_models import input_error

GRID = "  main: {recipes: [ln], train: b, seeds: [0, 1], budget: {pairs: 20}}\n"
PACKAGES = {"ray": "ray", "slurm": "submitit"}


@pytest.mark.parametrize("executor", PACKAGES)
def test_every_executor_gives_the_same_tables(
    executor: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec(PACKAGES[executor]) is None:
        pytest.skip(f"{PACKAGES[executor]} is not installed: pip install 'normtune[{executor}]'")
    file = write_study(base, tmp_path, GRID)
    command = [
        sys.executable,
        "-m",
        "normtune",
        "study",
        str(file),
        "--out",
        str(tmp_path / executor),
        "--on",
        executor,
    ]
    subprocess.run(
        [*command, "--workers", "2", "--json"],
        env={**os.environ, "NORMTUNE_SUBMITIT_CLUSTER": "local", "RAY_memory_monitor_refresh_ms": "0"},
        check=True,
        capture_output=True,
        timeout=280,
    )
    monkeypatch.setattr(running, "get_executor", lambda on: run_in_this_process)
    study = read_study(file)
    run_study(study, tmp_path / "here", workers=1)
    write_tables(study, tmp_path / "here")
    assert drop_measured(read_tables(tmp_path / executor)) == drop_measured(read_tables(tmp_path / "here"))


@pytest.mark.parametrize("executor", PACKAGES)
def test_a_missing_package_is_named(executor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, PACKAGES[executor], None)
    study = read_study(write_study(Path("nowhere"), tmp_path, GRID))
    assert f"pip install 'normtune[{executor}]'" in input_error(lambda: run_study(study, tmp_path, on=executor))
