"""A cell: one recipe trained and evaluated in a process of its own, so that its peak memory is its own."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

from normtune import processes
from normtune.config import EvaluateConfig, TrainConfig
from normtune.errors import InputError


@dataclass(frozen=True)
class Cell:
    """What to train (nothing: the base as it is), and what to evaluate then."""

    name: str
    train: TrainConfig | None
    evaluate: EvaluateConfig


def run_cell(cell: Cell, threads: int | None = None) -> dict[str, Any]:
    """Train, evaluate, and return one row: trainable share, seconds, peak memory, metrics with intervals."""
    import torch

    from normtune import memory
    from normtune.evaluate import evaluate_config
    from normtune.train import train

    if threads:
        torch.set_num_threads(threads)
    from dataclasses import asdict

    trained = asdict(train(cell.train)) if cell.train else None
    memory.reset_peak()
    evaluated = evaluate_config(cell.evaluate)
    return {"name": cell.name, "training": trained, "evaluation": evaluated}


def run_cells(cells: Sequence[Cell], workers: int) -> Iterator[dict[str, Any]]:
    """Run cells in `workers` processes side by side; yields rows as they finish.

    The processes are forked from one that has imported the libraries and done nothing else: they start
    at once, and no cell's memory counts in another's peak.

    Raises:
        InputError: a cell failed; the message names it. Or a launcher started several processes, each of
            which would run all cells.
    """
    if processes.launched() > 1:
        raise InputError("this starts processes of its own. Run it without torchrun or accelerate launch.")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    threads = max(1, (os.cpu_count() or 1) // workers)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["normtune.train", "normtune.evaluate", "normtune.models.miss.family"])
    with ProcessPoolExecutor(
        workers, mp_context=context, max_tasks_per_child=1, initializer=processes.leave_launcher
    ) as pool:
        running = {pool.submit(run_cell, cell, threads): cell for cell in cells}
        for done in as_completed(running):
            try:
                yield done.result()
            except InputError as error:
                pool.shutdown(cancel_futures=True)
                raise InputError(f"cell '{running[done].name}': {error}") from error
