"""What `normtune study` does: run the unfinished cells, then write the tables and the page."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from normtune.errors import InputError
from normtune.runtime.notebook import Result, Rows
from normtune.studies.console import ProgressBars, format_summary
from normtune.studies.manuscript import write_manuscript
from normtune.studies.page.page import write_study_report
from normtune.studies.results import read_tables, write_tables
from normtune.studies.run import Summary, run_study, study_status
from normtune.studies.spec import Study


@dataclass(frozen=True)
class StudyResult(Result):
    """The outcome of a study and its files; `print` and Jupyter show it as a few lines of text."""

    summary: Summary
    out: Path
    files: tuple[Path, ...]  # the tables and the page

    @property
    def page(self) -> Path:
        """The HTML page of the results."""
        return next(path for path in self.files if path.suffix == ".html")

    @property
    def table(self) -> Rows:
        """One row for each metric of each evaluation of each cell."""
        tables = read_tables(self.out)
        cells = {cell["key"]: cell for cell in tables["cells"]}
        columns = ("model", "recipe", "trained_on", "share", "seed", "trainable", "train_seconds")
        return Rows(
            {
                **{name: cells[row["key"]][name] for name in columns},
                **{name: value for name, value in row.items() if name != "key"},
            }
            for row in tables["metrics"]
        )

    def to_dict(self) -> dict[str, Any]:
        """Return what `normtune study --json` prints."""
        return {**asdict(self.summary), "out": str(self.out), "tables": [str(path) for path in self.files]}

    def __str__(self) -> str:
        return format_summary(self.summary, self.files)


def run_study_and_report(
    study: Study,
    out: Path,
    *,
    workers: int | None = None,
    on: str = "local",
    quiet: bool = False,
    report_only: bool = False,
    examples: bool = False,
) -> StudyResult:
    """Run a study and write its tables and its page.

    Args:
        report_only: run nothing; write the tables and the page of the cells that are finished.
        examples: show some images and answers on the page, of data sets with a licence that permits it.

    Raises:
        InputError: see `run_study` and `write_tables`.
    """
    if report_only:
        summary = study_status(study, out)
        if not summary.done:
            raise InputError(f"{out} has no finished cell of this study. Run it without --report-only first.")
    else:
        with nullcontext() if quiet else ProgressBars() as bars:
            summary = run_study(study, out, workers=workers, on=on, listener=bars)
    tables = write_tables(study, out)
    roots = {name: data.root for name, data in study.datasets.items()} if examples else None
    tables += write_manuscript(out)
    tables.append(write_study_report(out, examples=roots))
    return StudyResult(summary, out, tuple(tables))
