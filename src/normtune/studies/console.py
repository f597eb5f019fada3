"""What `normtune study` prints: progress bars during a run, a summary after it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from normtune.runtime.files import read_json
from normtune.runtime.progress import terminal_bars
from normtune.studies.cell import PROGRESS
from normtune.studies.changes import RESULT
from normtune.studies.plan import Cell
from normtune.studies.run import ProgressListener, Summary

# Metrics that the line of a finished cell shows, if its evaluations have them.
HEADLINE_METRICS = ("choice_accuracy", "closed_label", "open_exact", "global_exact", "rouge_l/none", "bleu_4/none")


def format_summary(summary: Summary, tables: Sequence[Path]) -> str:
    """A run's summary as text, with the paths of the files written."""
    lines = [f"{summary.done} of {summary.cells} cells done, {summary.ran} in this run, in {summary.seconds:.0f} s"]
    lines += [f"failed: {cell}: {error}" for cell, error in summary.failed.items()]
    lines += [f"changed since it ran: {cell}: {what}" for cell, what in summary.changed.items()]
    if summary.waiting:
        lines.append(f"not run: {summary.waiting} cells, a trial of their learning-rate search failed")
    return "\n".join([*lines, "Written:", *(f"  {path}" for path in tables)])


class ProgressBars(ProgressListener):
    """Progress on stderr: a bar for all cells, a bar for each running cell, a line for each finished cell."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(stderr=True, force_jupyter=False)  # in Jupyter: a line for each finished cell
        self.bars = terminal_bars(self.console)
        self.total: Any = None
        self.running: dict[Path, tuple[Cell, Any]] = {}

    def __enter__(self) -> ProgressBars:
        self.bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bars.stop()

    def begin(self, cells: Sequence[Cell], done: int, workers: int) -> None:
        if self.total is not None:
            self.bars.remove_task(self.total)
        self.console.print(f"{len(cells)} cells to run, {done} already done; {workers} at a time", highlight=False)
        self.total = self.bars.add_task("cells", total=len(cells), note="")

    def started(self, cell: Cell, directory: Path) -> None:
        self.running[directory] = cell, self.bars.add_task(f"  {cell}", total=None, note="")

    def ended(self, cell: Cell, directory: Path, error: str | None) -> None:
        if directory in self.running:
            self.bars.remove_task(self.running.pop(directory)[1])
        self.bars.advance(self.total)
        if error is not None:
            self.console.print(f"failed: {cell}: {error}", style="red", highlight=False, markup=False)
        else:
            self.console.print(f"{cell}: {_format_scores(directory)}", highlight=False, markup=False)

    def tick(self) -> None:
        """Read the progress files of the running cells and update their bars."""
        for directory, (cell, task) in self.running.items():
            try:
                progress = json.loads((directory / PROGRESS).read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue  # not written yet, or replaced at this moment
            self.bars.update(
                task, description=f"  {cell}: {progress['what']}", completed=progress["done"], total=progress["total"]
            )


def _format_scores(directory: Path) -> str:
    """The headline metrics of each evaluation of a cell, in %."""
    parts = []
    for evaluation in read_json(directory / RESULT)["evaluations"]:
        scores = [
            f"{name} {100 * evaluation['metrics'][name]['value']:.1f}"
            for name in HEADLINE_METRICS
            if name in evaluation["metrics"]
        ]
        parts.append(f"{evaluation['dataset']} ({evaluation['role']}) {', '.join(scores)}")
    return "; ".join(parts)
