"""What `normtune study` does: run what is missing, then write the tables and the page."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from normtune.errors import InputError
from normtune.studies.console import Bars, summary_text
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
    """Run a study, write its tables and its page; returns the summary, and it with the files for people.

    With `report_only` nothing is run: the tables and the page are those of what is there. With `examples` the
    page shows some images and answers of data sets whose licence lets one pass them on.

    Raises:
        InputError: see `run_study` and `write_tables`.
    """
    if report_only:
        summary = study_status(study, out)
        if not summary.done:
            raise InputError(
                f"{out} holds no finished cell of this study. Leave --report-only out to run it."
            )
    else:
        with nullcontext() if quiet else Bars() as bars:
            summary = run_study(study, out, workers=workers, on=on, show=bars)
    tables = write_tables(study, out)
    roots = {name: data.root for name, data in study.datasets.items()} if examples else None
    tables.append(write_study_report(out, examples=roots))
    return {**asdict(summary), "out": str(out), "tables": [str(path) for path in tables]}, summary_text(
        summary, tables
    )
