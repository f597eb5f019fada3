"""Cells: rows that are kept, and not made again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from normtune.evaluation.config import EvaluateConfig
from normtune.runtime.files import read_json, write_json
from normtune.studies import demo_cells
from normtune.studies.demo_cells import Cell, run_cells


def cell(name: str, out: Path, **options: Any) -> Cell:
    return Cell(name, None, EvaluateConfig(model="nano", data="phantom-b:4", out=out, **options))


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A folder that holds the row of cell "ln@0.1/2"."""
    options = demo_cells._options(cell("ln@0.1/2", tmp_path / "out"))
    write_json(tmp_path / "rows" / "ln@0.1%2F2.json", {"options": options, "row": {"name": "kept"}})
    return tmp_path / "rows"


def refuse(*arguments: Any, **options: Any) -> Any:
    raise AssertionError("a process was started")


def test_a_kept_row_of_the_same_options_is_not_made_again(
    kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_cells, "run_in_processes", refuse)
    assert list(run_cells([cell("ln@0.1/2", tmp_path / "out")], 1, kept=kept)) == [{"name": "kept"}]
    with pytest.raises(AssertionError, match="a process was started"):
        list(run_cells([cell("ln@0.1/2", tmp_path / "out", beams=3)], 1, kept=kept))
    with pytest.raises(AssertionError, match="a process was started"):
        list(run_cells([cell("ln@0.1/2", tmp_path / "out")], 1))


def test_an_option_that_came_later_stands_at_its_default_in_a_kept_row(kept: Path, tmp_path: Path) -> None:
    file = kept / "ln@0.1%2F2.json"
    found = read_json(file)
    del found["options"]["evaluate"]["baseline"]
    file.write_text(json.dumps(found))
    assert list(run_cells([cell("ln@0.1/2", tmp_path / "out")], 1, kept=kept)) == [{"name": "kept"}]


@pytest.mark.parametrize("damage", [{}, {"options": {"train": None, "evaluate": {"gone": 1}}, "row": {}}])
def test_a_file_that_is_no_kept_row_is_not_taken_for_one(
    damage: dict[str, Any], kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_cells, "run_in_processes", refuse)
    write_json(kept / "ln@0.1%2F2.json", damage)
    with pytest.raises(AssertionError, match="a process was started"):
        list(run_cells([cell("ln@0.1/2", tmp_path / "out")], 1, kept=kept))


def test_a_row_is_kept_as_its_cell_ends(tmp_path: Path) -> None:
    chosen = cell("base", tmp_path / "out", baseline="question-only")
    made = list(run_cells([chosen], 1, kept=tmp_path / "rows"))
    assert read_json(tmp_path / "rows" / "base.json")["row"] == made[0]
    assert made[0]["name"] == "base" and made[0]["training"] is None
    assert list(run_cells([chosen], 1, kept=tmp_path / "rows")) == made
