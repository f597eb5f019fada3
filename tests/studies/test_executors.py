"""The same study through Ray and through submitit: the same table as on one machine."""

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
from tests.studies.test_run import here, same, study_of
from tests.support.base_models import outcome as told

GRID = "  main: {recipes: [ln], train: b, seeds: [0, 1], budget: {pairs: 20}}\n"
PLACES = {"ray": "ray", "slurm": "submitit"}


@pytest.mark.parametrize("place", PLACES)
def test_a_study_ends_with_the_same_table_wherever_its_cells_run(
    place: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec(PLACES[place]) is None:
        pytest.skip(f"{PLACES[place]} is not installed: pip install 'normtune[{place}]'")
    file = study_of(base, tmp_path, GRID)
    command = [
        sys.executable,
        "-m",
        "normtune",
        "study",
        str(file),
        "--out",
        str(tmp_path / place),
        "--on",
        place,
    ]
    subprocess.run(
        [*command, "--workers", "2", "--json"],
        env={**os.environ, "NORMTUNE_SUBMITIT_CLUSTER": "local", "RAY_memory_monitor_refresh_ms": "0"},
        check=True,
        capture_output=True,
        timeout=280,
    )
    monkeypatch.setattr(running, "get_executor", lambda on: here)
    study = read_study(file)
    run_study(study, tmp_path / "here", workers=1)
    write_tables(study, tmp_path / "here")
    assert same(read_tables(tmp_path / place)) == same(read_tables(tmp_path / "here"))


@pytest.mark.parametrize("place", PLACES)
def test_a_package_that_is_not_there_is_named(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, PLACES[place], None)
    study = read_study(study_of(Path("nowhere"), tmp_path, GRID))
    assert f"pip install 'normtune[{place}]'" in told(lambda: run_study(study, tmp_path, on=place))
