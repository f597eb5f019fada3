"""Commands that show the parts of a model and the contents of a dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from normtune.commands.app import Device, Json, Model, Quantize, app, emit, options_from
from normtune.data.options import InspectOptions


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
@options_from(InspectOptions, positional="data")
def data(*, as_json: bool, **options: Any) -> None:
    """Show what a dataset contains, and what would be lost of it.

    Lists its splits, images, open and closed questions, problems in its files, and images and patients that
    several splits share. Opens every picture once. With --model, also counts the texts that its limits cut.
    """
    from normtune.data.registry import open_dataset
    from normtune.data.summary import summarize
    from normtune.evaluation.recipe_differences import plan_comparison, plan_text
    from normtune.inference.limits import inspect_data

    model, strict = options.pop("model"), options.pop("strict")
    dataset = open_dataset(options.pop("data"), **options)
    counts = inspect_data(dataset, model, text_only=options["text_only"])
    if model is not None:
        from normtune.training.inspection import estimate_training

        counts.memory = estimate_training(model, dataset)
    summary = summarize(dataset, counts.leaks)
    plan = plan_comparison(dataset.examples.where(dataset.examples.flags("split", "test".__eq__)))
    text = f"{summary}\n\n{plan_text(plan)}" if plan else str(summary)
    emit(
        as_json,
        summary | {"smallest_difference": plan, "preflight": counts.to_dict()},
        f"{text}\n\nPreflight\n{counts.text()}",
    )
    if strict:
        counts.require_no_loss()
