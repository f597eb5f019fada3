"""A study as people read it: its cells before it runs, bars while it runs, what came of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from normtune.runtime.files import read_json
from normtune.studies.cell import PROGRESS, RESULT, failure_reason, is_finished
from normtune.studies.plan import Cell, Plan, Sizes
from normtune.studies.run import Summary

SHOWN = ("closed_label", "open_exact", "global_exact", "rouge_l/none", "bleu_4/none")


def listing(found: Plan, sizes: Sizes, out: Path) -> dict[str, Any]:
    """What `--dry-run --json` prints: every cell, whether it is there, and the pairs it takes."""
    rows = [
        {
            "key": cell.key,
            "state": "done"
            if is_finished(out, cell)
            else "failed"
            if failure_reason(out, cell)
            else "to run",
            "cell": str(cell),
            "grids": list(cell.grids),
            "rates": cell.rates,
            "pairs": sizes.training(cell),
            "answers": sizes.answering(cell),
            "evaluated_on": [one.dataset for one in cell.evaluations],
        }
        for cell in found.cells
    ]
    left = [row for row in rows if row["state"] != "done"]
    return {
        "cells": rows,
        "waiting": found.waiting,
        "searches": len(found.trials),
        "to_run": len(left),
        "pairs": _sum(left, "pairs"),
        "answers": _sum(left, "answers"),
        "unknown": sum(row["pairs"] is None or row["answers"] is None for row in left),
    }


def _sum(rows: Sequence[dict[str, Any]], column: str) -> int:
    return sum(row[column] or 0 for row in rows)


def listing_text(found: dict[str, Any]) -> str:
    """The listing for people."""
    lines = []
    for row in found["cells"]:
        pairs, answers = ("?" if row[what] is None else f"{row[what]:,}" for what in ("pairs", "answers"))
        lines.append(
            f"{row['key']}  {row['state']:<6}  {pairs:>10} pairs  {answers:>7} answers  {row['cell']}"
            f"  -> {', '.join(row['evaluated_on'])}  ({', '.join(row['grids'])})"
        )
    lines.append(
        f"{len(found['cells'])} cells, {found['to_run']} of them to run: "
        f"about {found['pairs']:,} pairs to train, {found['answers']:,} to answer"
    )
    if found["unknown"]:
        lines.append(f"{found['unknown']} cells are not counted: no data here (see --root), or minutes given")
    if found["waiting"]:
        lines.append(
            f"and {found['waiting']} cells whose learning rate {found['searches']} searches above will find"
        )
    return "\n".join(lines)


def summary_text(summary: Summary, tables: Sequence[Path]) -> str:
    """What came of a run."""
    lines = [
        f"{summary.done} of {summary.cells} cells done, {summary.ran} of them now, in {summary.seconds:.0f} s"
    ]
    lines += [f"failed: {cell}: {error}" for cell, error in summary.failed.items()]
    if summary.waiting:
        lines.append(f"not run: {summary.waiting} cells whose search of a learning rate has a failed trial")
    return "\n".join([*lines, "Written:", *(f"  {path}" for path in tables)])


class Bars:
    """Bars on stderr: the cells, and each that runs; a line for each that ends."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.console = Console(stderr=True)
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self.console,
        )
        self.total: Any = None
        self.running: dict[Path, tuple[Cell, Any]] = {}

    def __enter__(self) -> Bars:
        self.bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bars.stop()

    def begin(self, cells: Sequence[Cell], done: int, workers: int) -> None:
        if self.total is not None:
            self.bars.remove_task(self.total)
        self.console.print(
            f"{len(cells)} cells to run, {done} there already; {workers} side by side", highlight=False
        )
        self.total = self.bars.add_task("cells", total=len(cells))

    def started(self, cell: Cell, directory: Path) -> None:
        self.running[directory] = cell, self.bars.add_task(f"  {cell}", total=None)

    def ended(self, cell: Cell, directory: Path, error: str | None) -> None:
        if directory in self.running:
            self.bars.remove_task(self.running.pop(directory)[1])
        self.bars.advance(self.total)
        if error is not None:
            self.console.print(f"failed: {cell}: {error}", style="red", highlight=False, markup=False)
        else:
            self.console.print(f"{cell}: {_scores(directory)}", highlight=False, markup=False)

    def tick(self) -> None:
        for directory, (cell, task) in self.running.items():
            try:
                found = json.loads((directory / PROGRESS).read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue
            self.bars.update(
                task, description=f"  {cell}: {found['what']}", completed=found["done"], total=found["total"]
            )


def _scores(directory: Path) -> str:
    """The headline metrics of each evaluation, in %."""
    parts = []
    for one in read_json(directory / RESULT)["evaluations"]:
        shown = [
            f"{name} {100 * one['metrics'][name]['value']:.1f}" for name in SHOWN if name in one["metrics"]
        ]
        parts.append(f"{one['dataset']} ({one['role']}) {', '.join(shown)}")
    return "; ".join(parts)
