"""Commands that look at data and models, train, evaluate and measure."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from normtune import processes
from normtune.commands.app import Device, Json, Model, Quantize, app, emit, takes
from normtune.config import DataOptions, EvaluateConfig, TrainConfig
from normtune.progress import bar


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where the results are written.")] = Path("demo"),
    images: Annotated[int, typer.Option(min=8, help="Training images of hospital B.")] = 160,
    seed: Annotated[int, typer.Option(help="Of data and training.")] = 0,
    json: Json = False,
) -> None:
    """The main job on the embedded default, offline: adapt 'nano' to another hospital with every recipe."""
    from normtune.demo import run_demo

    results, text = run_demo(out, images=images, seed=seed, quiet=json)
    emit(json, results, text)


@app.command("inspect")
def inspect_model(
    model: Model,
    tune: Annotated[str | None, typer.Option(help="A recipe: what would it train?")] = None,
    data: Annotated[str | None, typer.Option(help="A dataset: what memory would training take?")] = None,
    root: Annotated[Path | None, typer.Option(help="Where the dataset's files lie.")] = None,
    limit: Annotated[int | None, typer.Option(help="Plan for the first so many pairs only.")] = None,
    batch: Annotated[int | None, typer.Option(help="Question-answer pairs a step.")] = None,
    cap: Annotated[int | None, typer.Option(help="At most so many questions of one image.")] = None,
    memory: Annotated[str | None, typer.Option(help="fast, balanced or tight.")] = None,
    quantize: Quantize = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16.")] = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Parts x roles of a model, what a recipe would train, and the memory it would take with --data.

    No weights are loaded.
    """
    from normtune.inspection import inspect_text, inspection, planned

    options = {
        "data": data,
        "root": root,
        "limit": limit,
        "batch": batch,
        "cap": cap,
        "memory": memory,
        "quantize": quantize,
        "dtype": dtype,
        "device": device,
    }
    found = planned(model, tune, options, inspection(model, tune))
    emit(json, found, inspect_text(found))


@app.command()
@takes(DataOptions, positional="data")
def data(options: DataOptions, *, as_json: bool) -> None:
    """What a dataset holds: splits, images, open and closed counts, problems, leaks between splits."""
    from normtune.catalog import open_from
    from normtune.data.survey import survey, survey_text

    found = survey(open_from(options))
    emit(as_json, found, survey_text(found))


@app.command()
@takes(TrainConfig, positional="model")
def train(config: TrainConfig, *, as_json: bool) -> None:
    """Train a recipe on a dataset; writes the adapter to --out. Run again after a kill, and it goes on."""
    from normtune.train import PrintProgress, train

    quiet = as_json or not processes.is_first()
    result = train(config, progress=None if quiet else PrintProgress())
    emit(as_json, asdict(result), result.text())


@app.command()
@takes(EvaluateConfig, positional="model")
def evaluate(config: EvaluateConfig, *, as_json: bool) -> None:
    """Answer every question of a split and score the answers, with 95% intervals."""
    from normtune.evaluate import evaluate_config, metrics_text

    with bar("answering", quiet=as_json or not processes.is_first()) as tick:
        found = evaluate_config(config, progress=tick)
    emit(as_json, found, metrics_text(found))


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
    from normtune.study.spec import read_study

    found = read_study(file, root or ())
    folder = out or Path(found.study)
    if dry_run:
        from normtune.study.plan import Sizes
        from normtune.study.run import current_plan
        from normtune.study.show import listing, listing_text

        listed = listing(current_plan(found, folder), Sizes(found), folder)
        emit(json, listed, listing_text(listed))
        return
    from normtune.study.command import run_and_tabulate

    summary, text = run_and_tabulate(
        found, folder, workers=workers, on=on, quiet=json, report_only=report_only, examples=examples
    )
    emit(json, summary, text)
    if not report_only and (summary["failed"] or summary["waiting"]):
        raise typer.Exit(1)


@app.command(context_settings={"allow_interspersed_args": False, "ignore_unknown_options": True})
def bench(
    name: Annotated[str | None, typer.Argument(help="A benchmark; none lists them.")] = None,
    options: Annotated[
        list[str] | None, typer.Argument(help="Its own options: normtune bench NAME --help.")
    ] = None,
    json: Json = False,
) -> None:
    """The benchmarks of the source checkout: list them, or run one and print its table."""
    from normtune.bench import benchmarks, listing, recorded, run_benchmark

    given = [option for option in options or () if option != "--json"]
    if name is None:
        found = benchmarks()
        rows = [{"name": one.name, "summary": one.summary} for one in found.values()]
        emit(json, {"benchmarks": rows}, listing(found))
    elif json or len(given) < len(options or ()):
        emit(True, recorded(name, given), "")
    else:
        run_benchmark(name, given)
