"""Runs what is missing of a study: searches first, then the grid; a cell that fails stops no other."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from normtune.studies.cell import (
    CellJob,
    cell_directory,
    failure_reason,
    is_finished,
    record_failure,
    run_cell,
    try_lock,
    validation_score,
    with_absolute_paths,
)
from normtune.studies.executors import Executor, get_executor
from normtune.studies.plan import Cell, Plan, RateSearch, plan
from normtune.studies.spec import Study

WAIT_S = 1.0  # before looking again for a cell that another command is at


class ProgressListener(Protocol):
    """Who is told how it goes."""

    def begin(self, cells: Sequence[Cell], done: int, workers: int) -> None: ...
    def started(self, cell: Cell, directory: Path) -> None: ...
    def ended(self, cell: Cell, directory: Path, error: str | None) -> None: ...
    def tick(self) -> None: ...


class NoProgress:
    """Tells nobody."""

    def begin(self, cells: Sequence[Cell], done: int, workers: int) -> None: ...
    def started(self, cell: Cell, directory: Path) -> None: ...
    def ended(self, cell: Cell, directory: Path, error: str | None) -> None: ...
    def tick(self) -> None: ...


@dataclass
class Summary:
    """What a run of a study came to."""

    cells: int
    done: int
    ran: int  # of those done, by this command
    seconds: float
    failed: dict[str, str] = field(default_factory=dict)  # cell in words -> why
    waiting: int = 0  # cells whose learning rate could not be found, since a trial failed


def chosen_rates(study: Study, out: Path, trials: Iterable[RateSearch]) -> dict[str, float]:
    """The rate of each search whose trials have all ended: the lowest within a standard error of the best.

    Trials are short and validation splits small: the best of them is often a rate that is too high for the
    whole run (Breiman et al., 1984: the one-standard-error rule; the lower rate is the simpler choice here).
    """
    found = {}
    for trial in trials:
        if all(is_finished(out, cell) for cell in trial.cells):
            scores = [validation_score(out, cell, study.search.metric) for cell in trial.cells]
            best, error = max(scores)
            lowest = next(
                cell for cell, (score, _) in zip(trial.cells, scores, strict=True) if score >= best - error
            )
            (found[trial.id],) = lowest.rates.values()
    return found


def current_plan(study: Study, out: Path) -> Plan:
    """The plan with the learning rates that are known by now."""
    return plan(study, chosen_rates(study, out, plan(study).trials))


def run_study(
    study: Study,
    out: Path,
    *,
    workers: int | None = None,
    on: str = "local",
    show: ProgressListener | None = None,
) -> Summary:
    """Run every cell that has no result yet. Several commands may run one study in one folder.

    Args:
        study: as `read_study` gives it.
        out: the study's folder.
        workers: cells side by side; by default as many as cores and memory allow.
        on: local, ray or slurm.
        show: is told of every cell.

    Raises:
        InputError: no such place, or what it needs is not installed.
    """
    started = time.perf_counter()
    out, show = out.absolute(), show or NoProgress()
    execute = get_executor(on)
    failed: dict[str, tuple[Cell, str]] = {}
    ran = 0
    while True:
        found = current_plan(study, out)
        todo = [cell for cell in found.cells if cell.key not in failed and not is_finished(out, cell)]
        if not todo:
            break
        if found.waiting:  # trials first: others wait for them
            trials = {cell.key for trial in found.trials for cell in trial.cells}
            todo = sorted(todo, key=lambda cell: cell.key not in trials)
        if workers is None:
            from normtune.studies.worker_count import fitting_workers

            workers = fitting_workers(todo) if on == "local" else len(todo)
        show.begin(todo, len(found.cells) - len(todo), workers)
        for cell, error in _round(todo, out, workers, execute, show):
            ran += error is None
            if error is not None:
                failed[cell.key] = (cell, error)
    return replace(
        study_status(study, out),
        ran=ran,
        seconds=time.perf_counter() - started,
        failed={str(cell): error for cell, error in failed.values()},
    )


def study_status(study: Study, out: Path) -> Summary:
    """How a study stands, without running anything of it."""
    found = current_plan(study, out)
    left = [cell for cell in found.cells if not is_finished(out, cell)]
    return Summary(
        cells=len(found.cells) + found.waiting,
        done=len(found.cells) - len(left),
        ran=0,
        seconds=0.0,
        failed={str(cell): error for cell in left if (error := failure_reason(out, cell)) is not None},
        waiting=found.waiting,
    )


def _round(
    todo: Sequence[Cell], out: Path, workers: int, execute: Executor, show: ProgressListener
) -> Iterator[tuple[Cell, str | None]]:
    """Run cells; yields each with its error, if any, as it ends. What others are at is waited for."""
    left = {cell.key: cell for cell in todo}
    while left:
        free = [cell for cell in left.values() if _is_free(out, cell)]

        def works(cells: Sequence[Cell] = free) -> Iterator[CellJob]:
            for cell in cells:
                if not is_finished(out, cell):
                    show.started(cell, cell_directory(out, cell))
                    yield CellJob(with_absolute_paths(cell), out)

        busy = len(free) < len(left)
        for work, found in execute(run_cell, works(), workers, tick=show.tick, folder=out):
            cell = left[work.cell.key]
            if found.value == "busy":
                busy = True
                continue
            if found.error is not None:  # its process ended before it could write why
                record_failure(work, found.error)
            error = found.error or (found.value.removeprefix("failed: ") if found.value != "done" else None)
            del left[cell.key]
            show.ended(cell, work.directory, error)
            yield cell, error
        for cell in list(left.values()):  # what others ended meanwhile
            if is_finished(out, cell):
                del left[cell.key]
                show.ended(cell, cell_directory(out, cell), None)
            elif cell not in free and _is_free(out, cell) and (error := failure_reason(out, cell)):
                del left[cell.key]
                show.ended(cell, cell_directory(out, cell), error)
                yield cell, error
        if busy and left:
            show.tick()
            time.sleep(WAIT_S)


def _is_free(out: Path, cell: Cell) -> bool:
    with try_lock(cell_directory(out, cell)) as free:
        return free
