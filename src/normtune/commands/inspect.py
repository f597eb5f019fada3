"""Commands that show the parts of a model and the contents of a dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from normtune.commands.app import Device, Json, Model, Quantize, app, emit, options_from
from normtune.data.options import DataOptions


@app.command()
def inspect(
    model: Model,
    tune: Annotated[str | None, typer.Option(help="Recipe; shows what it would train.")] = None,
    data: Annotated[str | None, typer.Option(help="Dataset; shows the memory of training on it.")] = None,
    root: Annotated[Path | None, typer.Option(help="Folder or file of the dataset.")] = None,
    limit: Annotated[int | None, typer.Option(help="Plan for the first LIMIT pairs only.")] = None,
    batch: Annotated[int | None, typer.Option(help="Question-answer pairs per step.")] = None,
    cap: Annotated[int | None, typer.Option(help="Maximum number of questions per image in a group.")] = None,
    memory: Annotated[str | None, typer.Option(help="fast, balanced or tight; see train --help.")] = None,
    quantize: Quantize = None,
    dtype: Annotated[str | None, typer.Option(help="Dtype of the base: float32, bfloat16 or auto.")] = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Show a model's parts and what a recipe trains.

    With --data, also plans the memory of a training run. No weights are loaded.
    """
    from normtune.training.inspection import add_memory_plan, inspect_model, inspect_text

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
    report = add_memory_plan(model, tune, options, inspect_model(model, tune))
    emit(json, report, inspect_text(report))


@app.command()
@options_from(DataOptions, positional="data")
def data(*, as_json: bool, **options: Any) -> None:
    """Show what a dataset contains.

    Lists its splits, images, open and closed questions, problems in its files, and images that several splits
    share.
    """
    from normtune.data.registry import open_dataset

    emit(as_json, open_dataset(options.pop("data"), **options).summary())
