"""Commands that look at data and models, train, evaluate and measure."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from normtune.commands.app import Device, Json, Model, Quantize, app, emit, takes
from normtune.data.options import DataOptions


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
    from normtune.training.inspection import inspect_text, inspection, planned

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
    from normtune.data.registry import open_configured
    from normtune.data.summary import summarize, summary_text

    found = summarize(open_configured(options))
    emit(as_json, found, summary_text(found))
