"""How many cells can run at once: the planned memory of the largest cells against the free memory."""

from __future__ import annotations

from collections.abc import Sequence

from normtune.errors import InputError
from normtune.studies.cell import with_absolute_paths
from normtune.studies.plan import Cell
from normtune.training.inspection import inspect_model

# Share of the free memory that cells may use; evaluation and the C library need some too.
USABLE_SHARE = 0.85


def fitting_workers(cells: Sequence[Cell]) -> int:
    """The number of cells to run at once, at least one.

    It is the number of cores, or fewer if the free memory holds fewer of the largest cells. For each model
    and data set, the recipe that trains most parameters is planned. On CUDA all cells share the same device.
    """
    from normtune.runtime.worker_pool import count_cores

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
