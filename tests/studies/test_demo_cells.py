"""Cells of the demo: rows are stored, and a cell with a stored row is not run again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from normtune.evaluation.config import EvaluateConfig
from normtune.runtime.files import read_json, write_json
from normtune.studies import demo_cells
from normtune.studies.demo_cells import Cell, run_cells


def make_cell(name: str, out: Path, **options: Any) -> Cell:
    return Cell(name, None, EvaluateConfig(model="nano", data="phantom-b:4", out=out, **options))


@pytest.fixture
def rows_folder(tmp_path: Path) -> Path:
    """A folder that holds the row of the cell "ln@0.1/2"."""
    options = demo_cells._options(make_cell("ln@0.1/2", tmp_path / "out"))
    write_json(tmp_path / "rows" / "ln@0.1%2F2.json", {"options": options, "row": {"name": "stored"}})
    return tmp_path / "rows"


def fail_if_called(*arguments: Any, **options: Any) -> Any:
    raise AssertionError("a process was started")


def test_a_cell_with_a_stored_row_of_the_same_options_is_not_run(
    rows_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_cells, "run_in_processes", fail_if_called)
    assert list(run_cells([make_cell("ln@0.1/2", tmp_path / "out")], 1, rows_folder=rows_folder)) == [
        {"name": "stored"}
    ]
    with pytest.raises(AssertionError, match="a process was started"):
        list(run_cells([make_cell("ln@0.1/2", tmp_path / "out", beams=3)], 1, rows_folder=rows_folder))
    with pytest.raises(AssertionError, match="a process was started"):
        list(run_cells([make_cell("ln@0.1/2", tmp_path / "out")], 1))


def test_an_option_missing_in_a_stored_row_counts_as_its_default(rows_folder: Path, tmp_path: Path) -> None:
    file = rows_folder / "ln@0.1%2F2.json"
    stored = read_json(file)
    del stored["options"]["evaluate"]["baseline"]
    file.write_text(json.dumps(stored))
    assert list(run_cells([make_cell("ln@0.1/2", tmp_path / "out")], 1, rows_folder=rows_folder)) == [
        {"name": "stored"}
    ]


@pytest.mark.parametrize("damage", [{}, {"options": {"train": None, "evaluate": {"gone": 1}}, "row": {}}])
def test_a_file_that_is_not_a_stored_row_is_ignored(
    damage: dict[str, Any], rows_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_cells, "run_in_processes", fail_if_called)
    write_json(rows_folder / "ln@0.1%2F2.json", damage)
    with pytest.raises(AssertionError, match="a process was started"):
        list(run_cells([make_cell("ln@0.1/2", tmp_path / "out")], 1, rows_folder=rows_folder))


def test_a_row_is_stored_when_its_cell_ends(tmp_path: Path) -> None:
    cell = make_cell("base", tmp_path / "out", baseline="question-only")
    rows = list(run_cells([cell], 1, rows_folder=tmp_path / "rows"))
    assert read_json(tmp_path / "rows" / "base.json")["row"] == rows[0]
    assert rows[0]["name"] == "base" and rows[0]["training"] is None
    assert list(run_cells([cell], 1, rows_folder=tmp_path / "rows")) == rows
