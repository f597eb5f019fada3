"""The cells of a study and what they need, before anything runs: `normtune study --dry-run`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from normtune.data.records import Dataset
from normtune.data.registry import open_configured
from normtune.errors import InputError
from normtune.runtime.text_table import text_table
from normtune.studies.cell import failure_reason, is_finished
from normtune.studies.plan import Cell, Plan
from normtune.studies.spec import Study


@dataclass
class PairCounts:
    """Counts the pairs that cells train on and answer; opens each data set once.

    With folds, a count assumes folds of equal size. A count is None if the data set cannot be opened on this
    machine, or if the budget is in minutes.
    """

    study: Study
    _opened: dict[str, Dataset | None] = field(default_factory=dict)

    def training_pairs(self, cell: Cell) -> int | None:
        """The pairs that a cell trains on, exact up to the last step; the most for a plateau; 0 for the frozen base."""
        if cell.train is None or cell.budget is None:
            return 0
        if "pairs" in cell.budget:
            return int(cell.budget["pairs"])
        assert cell.trained_on is not None
        dataset = self._open(cell.trained_on)
        if dataset is None or cell.passes is None:
            return None
        if folds := self.study.datasets[cell.trained_on].folds:  # one is the test split, and one validates
            return round(cell.passes * len(dataset.examples) * (folds - 2) / folds * cell.share)
        return round(cell.passes * len(cell.train.select(dataset.split(cell.train.split))))

    def answered_pairs(self, cell: Cell) -> int | None:
        """The pairs that a cell answers in its evaluations."""
        total = 0
        for evaluation in cell.evaluations:
            if (dataset := self._open(evaluation.dataset)) is None:
                return None
            folds = self.study.datasets[evaluation.dataset].folds
            rows = len(dataset.examples) // folds if folds else len(dataset.split(evaluation.config.split))
            total += min(rows, evaluation.config.limit or rows)
        return total

    def _open(self, name: str) -> Dataset | None:
        if name not in self._opened:
            try:
                self._opened[name] = open_configured(self.study.datasets[name])
            except InputError:
                self._opened[name] = None
        return self._opened[name]


def list_cells(plan: Plan, sizes: PairCounts, out: Path) -> dict[str, Any]:
    """What `--dry-run --json` prints: every cell, whether it is finished, and the pairs that it needs."""
    rows: list[dict[str, Any]] = [
        {
            "key": cell.key,
            "state": "done" if is_finished(out, cell) else "failed" if failure_reason(out, cell) else "to run",
            "cell": str(cell),
            "grids": list(cell.grids),
            "rates": cell.rates,
            "pairs": sizes.training_pairs(cell),
            "answers": sizes.answered_pairs(cell),
            "evaluated_on": [evaluation.dataset for evaluation in cell.evaluations],
        }
        for cell in plan.cells
    ]
    unfinished = [row for row in rows if row["state"] != "done"]
    pairs, answers = (sum(row[column] or 0 for row in unfinished) for column in ("pairs", "answers"))
    return {
        "cells": rows,
        "waiting": plan.waiting,
        "searches": len(plan.searches),
        "to_run": len(unfinished),
        "pairs": pairs,
        "answers": answers,
        "unknown": sum(row["pairs"] is None or row["answers"] is None for row in unfinished),
    }


def format_listing(listing: dict[str, Any]) -> str:
    """The result of `list_cells` as text."""
    rows = []
    for row in listing["cells"]:
        counts = ["? " + what if row[what] is None else f"{row[what]:,} {what}" for what in ("pairs", "answers")]
        evaluated_on, grids = ", ".join(row["evaluated_on"]), ", ".join(row["grids"])
        rows.append([row["key"], row["state"], *counts, row["cell"], f"-> {evaluated_on}", f"({grids})"])
    lines = text_table(rows, "llrrl")
    lines.append(
        f"{len(listing['cells'])} cells, {listing['to_run']} to run: "
        f"about {listing['pairs']:,} pairs to train on and {listing['answers']:,} to answer"
    )
    if listing["unknown"]:
        lines.append(f"{listing['unknown']} cells not counted: no data (see --root), or a budget in minutes")
    if listing["waiting"]:
        lines.append(f"{listing['waiting']} more cells wait for {listing['searches']} learning-rate searches above")
    return "\n".join(lines)
