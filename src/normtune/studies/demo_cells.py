"""Cells of the demo and of the benchmarks: one recipe trained and evaluated.

Each cell runs in its own process, so that the peak memory of the process is the cell's.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from normtune.errors import InputError
from normtune.evaluation.config import EvaluateConfig
from normtune.runtime import distributed
from normtune.runtime.files import read_json, write_json
from normtune.runtime.worker_pool import run_in_processes
from normtune.training.config import TrainConfig


@dataclass(frozen=True)
class Cell:
    """What to train (None: the base as it is), and what to evaluate afterwards."""

    name: str
    train: TrainConfig | None
    evaluate: EvaluateConfig


def run_cell(cell: Cell) -> dict[str, Any]:
    """Train, evaluate, and return one row: trainable share, seconds, peak memory, metrics with intervals."""
    from dataclasses import asdict

    from normtune.evaluation.evaluate import evaluate_config
    from normtune.runtime import memory
    from normtune.training.train import train

    training = asdict(train(cell.train)) if cell.train else None
    memory.reset_peak()
    evaluation = evaluate_config(cell.evaluate).to_dict()
    return {"name": cell.name, "training": training, "evaluation": evaluation}


def run_cells(cells: Sequence[Cell], workers: int, *, rows_folder: Path | None = None) -> Iterator[dict[str, Any]]:
    """Run cells, `workers` processes at a time; yield each row when its cell ends.

    No cell's memory is counted in another cell's peak (see `normtune.runtime.worker_pool`).

    Args:
        rows_folder: each row is written to this folder when its cell ends, and a cell that has a row there
            with the same options is not run again. None: no row is written or read.

    Raises:
        InputError: a cell failed; the message names it. Or a launcher started several processes, each of
            which would run all cells.
    """
    if distributed.launched_count() > 1:
        raise InputError("this command starts processes. Run it without torchrun or accelerate launch.")
    remaining = []
    for cell in cells:
        row = None if rows_folder is None else _read_row(rows_folder, cell)
        if row is None:
            remaining.append(cell)
        else:
            yield row
    if not remaining:
        return
    threads = max(1, (os.cpu_count() or 1) // workers)
    for cell, outcome in run_in_processes(run_cell, remaining, workers, threads=threads):
        if outcome.error is not None:
            raise InputError(f"cell '{cell.name}': {outcome.error}")
        if rows_folder is not None:
            write_json(_row_file(rows_folder, cell), {"options": _options(cell), "row": outcome.value})
        yield outcome.value


def _row_file(rows_folder: Path, cell: Cell) -> Path:
    """The file of a cell's row; the name is quoted because recipe names may hold a slash."""
    return rows_folder / f"{quote(cell.name, safe='@')}.json"


def _options(cell: Cell) -> dict[str, Any]:
    """The options that decide a cell's row."""
    return {
        "train": cell.train and cell.train.model_dump(mode="json"),
        "evaluate": cell.evaluate.model_dump(mode="json"),
    }


def _read_row(rows_folder: Path, cell: Cell) -> dict[str, Any] | None:
    """The cell's row of an earlier run; None if there is none or if its options differ.

    Options that were added after the row was written count as set to their defaults.
    """
    file = _row_file(rows_folder, cell)
    if not file.is_file():
        return None
    stored = read_json(file)
    try:
        train, evaluate = stored["options"]["train"], stored["options"]["evaluate"]
        same = cell.train == (train and TrainConfig(**train)) and cell.evaluate == EvaluateConfig(**evaluate)
        row: dict[str, Any] | None = stored["row"] if same else None
    except (KeyError, TypeError, ValueError):  # another kind of file, or an option that no longer exists
        return None
    return row
