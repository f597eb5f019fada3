"""Commands that run a study or the demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from normtune.commands.app import Json, app, emit


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("demo"),
    images: Annotated[int, typer.Option(min=8, help="Number of training images of hospital B.")] = 160,
    seed: Annotated[int, typer.Option(help="Seed of the data and of training.")] = 0,
    json: Json = False,
) -> None:
    """Run a small demo offline.

    Adapts the built-in model 'nano' from synthetic images of one hospital to those of another, with several
    recipes, and compares the results.
    """
    from normtune.studies.demo import run_demo

    results, text = run_demo(out, images=images, seed=seed, quiet=json)
    emit(json, results, text)


@app.command()
def study(
    file: Annotated[Path, typer.Argument(help="YAML file of the study.")],
    out: Annotated[Path | None, typer.Option(help="Results folder; default: the study's name.")] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Parallel cells; default: as cores and memory allow.")
    ] = None,
    on: Annotated[str, typer.Option(help="Where cells run: local, ray or slurm.")] = "local",
    root: Annotated[
        list[str] | None, typer.Option(help="NAME=DIR: folder of a dataset of the study; repeatable.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the cells, but run nothing.")] = False,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Run nothing; write tables and page of the finished cells.")
    ] = False,
    examples: Annotated[
        bool,
        typer.Option(
            "--examples", help="Show some images with answers on the page, if the licence of the data allows it."
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Run a grid of trainings and evaluations.

    Runs the cells that have no result yet, and writes tables and an HTML page of all results. If the command
    is interrupted, run it again to continue. The exit status is 1 if a cell failed.
    """
    if dry_run:
        from normtune.studies.spec import read_study

        spec = read_study(file, root or ())
        folder = out or Path(spec.study)
        from normtune.studies.listing import PairCounts, format_listing, list_cells
        from normtune.studies.run import current_plan

        cells = list_cells(current_plan(spec, folder), PairCounts(spec), folder)
        emit(json, cells, format_listing(cells))
        return
    from normtune.api.runs import study

    result = study(
        file,
        out,
        roots=root or (),
        workers=workers,
        on=on,
        report_only=report_only,
        examples=examples,
        progress=not json,
    )
    emit(json, result)
    if not report_only and (result.summary.failed or result.summary.waiting):
        raise typer.Exit(1)
