"""Runs the unfinished cells of a study: learning-rate trials first, then the grids.

A cell that fails does not stop the others. Several commands may run the same study at once, in one folder: a
lock for each cell makes sure that no cell runs twice.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from normtune.errors import InputError
from normtune.runtime.files import read_json, try_lock
from normtune.runtime.worker_pool import count_cores
from normtune.studies.cell import (
    LOCK,
    RESULT,
    CellJob,
    failure_reason,
    is_finished,
    record_failure,
    run_cell,
    validation_score,
    with_absolute_paths,
)
from normtune.studies.changes import Changes, move_aside
from normtune.studies.executors import Executor, get_executor
from normtune.studies.folds import with_split_files, write_split_files
from normtune.studies.plan import Cell, Plan, Rates, RateSearch, plan
from normtune.studies.spec import Study
from normtune.training.inspection import inspect_model

WAIT_S = 1.0  # seconds between two looks at the cells that other commands run
# Share of the free memory that cells may use; evaluation and the C library need some too.
USABLE_SHARE = 0.85


class ProgressListener:
    """Receives the progress of a study and ignores it; `tick` is called about once a second."""

    def begin(self, cells: Sequence[Cell], done: int, workers: int) -> None: ...
    def started(self, cell: Cell, directory: Path) -> None: ...
    def ended(self, cell: Cell, directory: Path, error: str | None) -> None: ...
    def tick(self) -> None: ...


@dataclass
class Summary:
    """The outcome of a run of a study; it is printed as JSON, so its field names are keys."""

    cells: int  # in the plan, with those that wait for a learning rate
    done: int
    ran: int  # how many of the done cells this command ran
    seconds: float
    failed: dict[str, str] = field(default_factory=dict)  # the cell as text -> why it failed
    waiting: int = 0  # cells without a learning rate, because a trial of their search failed
    changed: dict[str, str] = field(default_factory=dict)  # the cell as text -> what has changed since it ran


def choose_rates(study: Study, out: Path, searches: Iterable[RateSearch]) -> dict[str, Rates]:
    """The learning rates that each finished search chooses.

    By default the lowest rate within one standard error of the best: trials are short and validation splits small,
    so the best trial often has a rate that is too high for the whole run (Breiman et al., 1984: the
    one-standard-error rule; here the lower rate is the simpler choice). `choose: best` takes the best trial.

    Returns:
        The rate of each method by `RateSearch.id`; a search with an unfinished trial is left out.
    """
    rates = {}
    for search in searches:
        if all(is_finished(out, cell) for cell in search.cells):
            scores = [validation_score(out, cell, study.search.metric) for cell in search.cells]
            best, error = max(scores)
            lowest_score = best if study.search.choose == "best" else best - error
            # cells are in ascending order of their rates, so the first one is that with the lowest rate
            rates[search.id] = next(
                cell.rates for cell, (score, _) in zip(search.cells, scores, strict=True) if score >= lowest_score
            )
    return rates


def current_plan(study: Study, out: Path) -> Plan:
    """The study's plan with the learning rates that finished searches have chosen."""
    study = with_split_files(study, out)
    return plan(study, choose_rates(study, out, plan(study).searches))


def run_study(
    study: Study, out: Path, *, workers: int | None = None, on: str = "local", listener: ProgressListener | None = None
) -> Summary:
    """Run every cell that has no result yet. Several commands may run the same study in the same folder.

    Args:
        workers: the number of cells that run at once; by default as many as cores and memory allow.
        on: where cells run: local, ray or slurm.

    Raises:
        InputError: `on` is unknown, or a package that it needs is not installed; a data set that is to be divided
            into folds cannot be opened, or has too few pictures for them.
    """
    started = time.perf_counter()
    out, listener = out.absolute(), listener or ProgressListener()
    execute = get_executor(on)
    write_split_files(study, out)
    failed: dict[str, tuple[Cell, str]] = {}
    changes, changed = Changes(out), dict[str, str]()
    ran = 0
    while True:
        # Planned anew in each round: a finished search adds the cells that waited for its learning rate.
        current = current_plan(study, out)
        if changed_now := _move_changed_cells(current.cells, out, changes):
            changed |= changed_now
            continue  # a search may have to choose its rate anew
        todo = [cell for cell in current.cells if cell.key not in failed and not is_finished(out, cell)]
        if not todo:
            break
        if current.waiting:  # trials first, because other cells wait for their result
            trial_keys = {cell.key for search in current.searches for cell in search.cells}
            todo = sorted(todo, key=lambda cell: cell.key not in trial_keys)
        if workers is None:
            workers = fitting_workers(todo) if on == "local" else len(todo)
        listener.begin(todo, len(current.cells) - len(todo), workers)
        for cell, error in _run_cells(todo, out, workers, execute, listener):
            ran += error is None
            if error is not None:
                failed[cell.key] = (cell, error)
    return replace(
        study_status(study, out),
        ran=ran,
        seconds=time.perf_counter() - started,
        failed={str(cell): error for cell, error in failed.values()},
        changed=changed,
    )


def _move_changed_cells(cells: Sequence[Cell], out: Path, changes: Changes) -> dict[str, str]:
    """Move results of other data or another base aside; cells that another command runs now are left alone.

    Returns:
        The cell as text -> what has changed, and where the former results are.
    """
    changed = {}
    outdated = changes.find(cells)
    for cell in (cell for cell in cells if cell.key in outdated):
        directory = cell.directory(out)
        with try_lock(directory / LOCK) as acquired:
            # looked at again: another command may have moved them meanwhile
            if acquired and (reasons := changes.find(cells).get(cell.key)):
                targets = ", ".join(str(path) for path in move_aside(directory, reasons))
                changed[str(cell)] = f"{', '.join(dict.fromkeys(reasons.values()))}; former results: {targets}"
    return changed


def run_cells(
    cells: Sequence[Cell], out: Path, *, workers: int, listener: ProgressListener | None = None
) -> Iterator[dict[str, Any]]:
    """Run the cells of the demo or of a benchmark that have no result yet; yield a row for each cell.

    Args:
        cells: from `single_cell`.
        out: the folder of their results. Cells that are finished there come first and are not run again.
        workers: the number of cells that run at once.

    Yields:
        `name` of the cell; `training`: the contents of train_result.json, or None; `evaluation`: the contents of
        metrics.json of the cell's last evaluation. Both have the path of their folder as `out`.

    Raises:
        InputError: a cell failed; the message names it.
    """
    out, listener = out.absolute(), listener or ProgressListener()
    finished = [cell for cell in cells if is_finished(out, cell)]
    yield from (_read_row(out, cell) for cell in finished)
    remaining = {cell.key: cell for cell in cells if cell not in finished}
    if remaining:
        listener.begin(list(remaining.values()), len(finished), workers)
    for cell, error in _run_cells(list(remaining.values()), out, workers, get_executor("local"), listener):
        if error is not None:
            raise InputError(f"cell '{cell.recipe}': {error}")
        yield _read_row(out, remaining.pop(cell.key))
    yield from (_read_row(out, cell) for cell in remaining.values())  # other commands have run these


def _read_row(out: Path, cell: Cell) -> dict[str, Any]:
    """The row of a finished cell; see `run_cells`."""
    directory = cell.directory(out)
    training = read_json(directory / RESULT)["training"]
    folder = directory / "evaluations" / cell.evaluations[-1].folder
    return {
        "name": cell.recipe,
        "training": training and {"out": str(directory / "adapter"), **training},
        "evaluation": {**read_json(folder / "metrics.json"), "out": str(folder)},
    }


def study_status(study: Study, out: Path) -> Summary:
    """The summary of a study's folder as it is now; nothing is run."""
    current = current_plan(study, out)
    changes = Changes(out).find(current.cells)
    unfinished = [cell for cell in current.cells if not is_finished(out, cell)]
    return Summary(
        cells=len(current.cells) + current.waiting,
        done=len(current.cells) - len(unfinished),
        ran=0,
        seconds=0.0,
        failed={str(cell): error for cell in unfinished if (error := failure_reason(out, cell)) is not None},
        waiting=current.waiting,
        changed={
            str(cell): ", ".join(dict.fromkeys(changes[cell.key].values()))
            for cell in current.cells
            if cell.key in changes
        },
    )


def _run_cells(
    todo: Sequence[Cell], out: Path, workers: int, execute: Executor, listener: ProgressListener
) -> Iterator[tuple[Cell, str | None]]:
    """Run cells; yield each with its error (None if it succeeded) when it ends.

    Cells that other commands run are waited for.
    """
    remaining = {cell.key: cell for cell in todo}
    while remaining:
        unlocked = [cell for cell in remaining.values() if _is_unlocked(out, cell)]

        def jobs(cells: Sequence[Cell] = unlocked) -> Iterator[CellJob]:
            for cell in cells:
                if not is_finished(out, cell):
                    listener.started(cell, cell.directory(out))
                    yield CellJob(with_absolute_paths(cell), out)

        # A cell can be locked between this look and its start; `run_cell` then returns "busy".
        locked_elsewhere = len(unlocked) < len(remaining)
        for job, outcome in execute(run_cell, jobs(), workers, listener.tick, out):
            cell = remaining[job.cell.key]
            if outcome.value == "busy":
                locked_elsewhere = True
                continue
            if outcome.error is not None:  # the process ended before it could write the reason
                record_failure(job, outcome.error)
            error = outcome.error or (outcome.value.removeprefix("failed: ") if outcome.value != "done" else None)
            del remaining[cell.key]
            listener.ended(cell, job.directory, error)
            yield cell, error
        # Cells that other commands ended meanwhile: finished, or failed and unlocked again.
        for cell in list(remaining.values()):
            if is_finished(out, cell):
                del remaining[cell.key]
                listener.ended(cell, cell.directory(out), None)
            elif cell not in unlocked and _is_unlocked(out, cell) and (error := failure_reason(out, cell)):
                del remaining[cell.key]
                listener.ended(cell, cell.directory(out), error)
                yield cell, error
        if locked_elsewhere and remaining:
            listener.tick()
            time.sleep(WAIT_S)


def _is_unlocked(out: Path, cell: Cell) -> bool:
    """Whether no process is running the cell."""
    with try_lock(cell.directory(out) / LOCK) as acquired:
        return acquired


def fitting_workers(cells: Sequence[Cell]) -> int:
    """The number of cells to run at once, at least one.

    It is the number of cores, or fewer if the free memory holds fewer of the largest cells. For each model
    and data set, the recipe that trains most parameters is planned. On CUDA all cells share the same device.
    """
    largest: dict[tuple[str, str | None], tuple[int, Cell]] = {}
    trainable: dict[tuple[str, str], int] = {}
    for cell in cells:
        if cell.train is None:
            continue
        recipe_key = (cell.model_path, cell.recipe_text)
        if recipe_key not in trainable:
            trainable[recipe_key] = _count_trainable(cell)
        data_key = (cell.model_path, cell.trained_on)
        if data_key not in largest or trainable[recipe_key] > largest[data_key][0]:
            largest[data_key] = (trainable[recipe_key], cell)
    workers = min(count_cores(), len(cells))
    for _, cell in largest.values():
        workers = min(workers, _count_fitting(cell, workers))
    return max(1, workers)


def _count_trainable(cell: Cell) -> int:
    """The number of parameters that the cell trains; 0 if its model or recipe is not valid."""
    try:
        return int(inspect_model(cell.model_path, cell.recipe_text)["recipe"]["trainable"])
    except InputError:
        return 0  # the run of the cell reports the error


def _count_fitting(cell: Cell, limit: int) -> int:
    """How many cells like this one fit into the free memory; `limit` if that is unknown."""
    from normtune.training.memory_plan.plan import plan_memory

    train = with_absolute_paths(cell).train
    assert train is not None
    try:
        plan = plan_memory(train)
    except InputError:
        return limit
    return limit if plan.free is None else int(USABLE_SHARE * plan.free // plan.requested.total)
