"""What `normtune study` does: run the unfinished cells, then write the tables and the page."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from normtune.errors import InputError
from normtune.studies.console import ProgressBars, format_summary
from normtune.studies.page.page import write_study_report
from normtune.studies.results import write_tables
from normtune.studies.run import run_study, study_status
from normtune.studies.spec import Study


def run_study_and_report(
    study: Study,
    out: Path,
    *,
    workers: int | None = None,
    on: str = "local",
    quiet: bool = False,
    report_only: bool = False,
    examples: bool = False,
) -> tuple[dict[str, Any], str]:
    """Run a study and write its tables and its page.

    Args:
        report_only: run nothing; write the tables and the page of the cells that are finished.
        examples: show some images and answers on the page, of data sets with a licence that permits it.
        quiet: show no progress bars.

    Returns:
        The summary with the paths of the files, and the text to print.

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
    tables.append(write_study_report(out, examples=roots))
    return {**asdict(summary), "out": str(out), "tables": [str(path) for path in tables]}, format_summary(
        summary, tables
    )
