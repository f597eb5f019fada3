"""Commands that run a study or the demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from normtune.commands.app import Json, app, emit


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where the results are written.")] = Path("demo"),
    images: Annotated[int, typer.Option(min=8, help="Training images of hospital B.")] = 160,
    seed: Annotated[int, typer.Option(help="Of data and training.")] = 0,
    json: Json = False,
) -> None:
    """The main job on the embedded default, offline: adapt 'nano' to another hospital with every recipe."""
    from normtune.studies.demo import run_demo

    results, text = run_demo(out, images=images, seed=seed, quiet=json)
    emit(json, results, text)


@app.command()
def study(
    file: Annotated[Path, typer.Argument(help="The study's YAML file.")],
    out: Annotated[Path | None, typer.Option(help="The study's folder; by default its name.")] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Cells side by side; by default as cores and memory allow.")
    ] = None,
    on: Annotated[str, typer.Option(help="Where cells run: local, ray or slurm.")] = "local",
    root: Annotated[
        list[str] | None, typer.Option(help="NAME=DIR, repeatable: where a data set of the study lies.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the cells and their pairs only.")] = False,
    report_only: Annotated[
        bool,
        typer.Option("--report-only", help="Run nothing: write the tables and the page of what is there."),
    ] = False,
    examples: Annotated[
        bool,
        typer.Option(
            "--examples",
            help="Show some images with answers on the page, where the data's licence allows it.",
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Run what is missing of a grid of trainings and evaluations, and write its tables.

    Run again after a kill, and it goes on. Exit status 1 where a cell failed.
    """
    from normtune.studies.spec import read_study

    found = read_study(file, root or ())
    folder = out or Path(found.study)
    if dry_run:
        from normtune.studies.console import listing, listing_text
        from normtune.studies.plan import Sizes
        from normtune.studies.run import current_plan

        listed = listing(current_plan(found, folder), Sizes(found), folder)
        emit(json, listed, listing_text(listed))
        return
    from normtune.studies.study import run_study_and_report

    summary, text = run_study_and_report(
        found, folder, workers=workers, on=on, quiet=json, report_only=report_only, examples=examples
    )
    emit(json, summary, text)
    if not report_only and (summary["failed"] or summary["waiting"]):
        raise typer.Exit(1)
