"""A cell: one recipe trained and evaluated in a process of its own, so that its peak memory is its own."""

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
    """What to train (nothing: the base as it is), and what to evaluate then."""

    name: str
    train: TrainConfig | None
    evaluate: EvaluateConfig


def run_cell(cell: Cell) -> dict[str, Any]:
    """Train, evaluate, and return one row: trainable share, seconds, peak memory, metrics with intervals."""
    from dataclasses import asdict

    from normtune.evaluation.evaluate import evaluate_config
    from normtune.runtime import memory
    from normtune.training.train import train

    trained = asdict(train(cell.train)) if cell.train else None
    memory.reset_peak()
    evaluated = evaluate_config(cell.evaluate)
    return {"name": cell.name, "training": trained, "evaluation": evaluated}


def run_cells(cells: Sequence[Cell], workers: int, *, kept: Path | None = None) -> Iterator[dict[str, Any]]:
    """Run cells in `workers` processes side by side; yields rows as they finish.

    No cell's memory counts in another's peak (`normtune.runtime.worker_pool`). With `kept` each row is written to that
    folder as its cell ends, and a cell whose row lies there, of the same options, is not run again.

    Raises:
        InputError: a cell failed; the message names it. Or a launcher started several processes, each of
            which would run all cells.
    """
    if distributed.launched_count() > 1:
        raise InputError("this starts processes of its own. Run it without torchrun or accelerate launch.")
    waiting = []
    for cell in cells:
        row = None if kept is None else _kept_row(kept, cell)
        if row is None:
            waiting.append(cell)
        else:
            yield row
    if not waiting:
        return
    threads = max(1, (os.cpu_count() or 1) // workers)
    for cell, done in run_in_processes(run_cell, waiting, workers, threads=threads):
        if done.error is not None:
            raise InputError(f"cell '{cell.name}': {done.error}")
        if kept is not None:
            write_json(_row_file(kept, cell), {"options": _options(cell), "row": done.value})
        yield done.value


def _row_file(kept: Path, cell: Cell) -> Path:
    return kept / f"{quote(cell.name, safe='@')}.json"


def _options(cell: Cell) -> dict[str, Any]:
    """What decides a cell's row."""
    return {
        "train": cell.train and cell.train.model_dump(mode="json"),
        "evaluate": cell.evaluate.model_dump(mode="json"),
    }


def _kept_row(kept: Path, cell: Cell) -> dict[str, Any] | None:
    """The row of an earlier run, where its options were these; newer ones stand at their defaults."""
    file = _row_file(kept, cell)
    if not file.is_file():
        return None
    found = read_json(file)
    try:
        train, evaluate = found["options"]["train"], found["options"]["evaluate"]
        same = cell.train == (train and TrainConfig(**train)) and cell.evaluate == EvaluateConfig(**evaluate)
        row: dict[str, Any] | None = found["row"] if same else None
    except (KeyError, TypeError, ValueError):  # not written by this, or an option is gone
        return None
    return row
