"""How many cells fit side by side: the planner's word on the dearest of them, and what is free."""

from __future__ import annotations

from collections.abc import Sequence

from normtune.errors import InputError
from normtune.studies.cell import with_absolute_paths
from normtune.studies.plan import Cell
from normtune.training.inspection import inspection

USABLE_SHARE = (
    0.85  # share of the free memory that cells may take; evaluation and the C library take some too
)


def fitting_workers(cells: Sequence[Cell]) -> int:
    """As many as there are cores, or as the free memory holds of the dearest cell; at least one.

    Of each model and data set the recipe that trains most is planned. On CUDA the same device is shared.
    """
    from normtune.runtime.worker_pool import cores

    dearest: dict[tuple[str, str | None], tuple[int, Cell]] = {}
    counted: dict[tuple[str, str], int] = {}
    for cell in cells:
        if cell.train is None:
            continue
        of = (cell.model_path, cell.recipe_text)
        if of not in counted:
            counted[of] = _trainable(cell)
        pair = (cell.model_path, cell.trained_on)
        if pair not in dearest or counted[of] > dearest[pair][0]:
            dearest[pair] = (counted[of], cell)
    most = min(cores(), len(cells))
    for _, cell in dearest.values():
        most = min(most, _fit(cell, most))
    return max(1, most)


def _trainable(cell: Cell) -> int:
    try:
        return int(inspection(cell.model_path, cell.recipe_text)["recipe"]["trainable"])
    except InputError:
        return 0  # the cell will say why


def _fit(cell: Cell, most: int) -> int:
    from normtune.training.memory_plan.plan import plan

    train = with_absolute_paths(cell).train
    assert train is not None
    try:
        found = plan(train)
    except InputError:
        return most
    return most if found.free is None else int(USABLE_SHARE * found.free // found.requested.total)
