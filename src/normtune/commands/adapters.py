"""Commands that merge, mix, export or upload adapters."""

from __future__ import annotations

import sys
from math import isfinite, nan
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from normtune.commands.app import Json, Model, app, emit
from normtune.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from normtune.adapters.hub import Upload


@app.command()
def merge(
    model: Model,
    adapter: Annotated[Path, typer.Option(help="Folder of the adapter, or its name on the hub.")],
    out: Annotated[Path, typer.Option(help="Folder of the merged model.")],
    json: Json = False,
) -> None:
    """Merge an adapter into its base model.

    The merged model loads like any model of its kind. It links the base's files and adds the trained tensors.
    """
    from normtune.api.models import merge

    emit(json, merge(model, adapter=adapter, out=out))


@app.command()
def mix(
    adapters: Annotated[
        list[str], typer.Argument(help="Folder of each adapter, or its name on the hub, with its weight: runs/ln:0.5")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the mixed adapter.")],
    model: Annotated[str | None, typer.Option(help="Base model; default: as the first adapter names it.")] = None,
    json: Json = False,
) -> None:
    """Mix adapters of one base and recipe: a weighted sum of what each has changed.

    One adapter with a weight below 1 keeps part of its change. The base is read only if the weights do not sum to 1.
    """
    from normtune.adapters.mixing import mix_adapters

    weights: dict[str | Path, float] = {}
    for adapter in adapters:
        name, _, weight = adapter.rpartition(":")
        try:
            number = float(weight)
        except ValueError:
            number = nan
        if not name or not isfinite(number):
            raise InputError(f"'{adapter}' has no weight. Give ADAPTER:WEIGHT, such as runs/ln:0.5.")
        if name in weights:
            raise InputError(f"{name} is given twice. Give it once, with the sum of the weights.")
        weights[name] = number
    emit(json, mix_adapters(weights, out=out, model=model))


@app.command()
def export(
    adapter: Annotated[Path, typer.Option(help="Folder of the adapter, or its name on the hub.")],
    out: Annotated[Path, typer.Option(help="Folder of the exported adapter.")],
    to: Annotated[str, typer.Option(help="Format: peft.")] = "peft",
    json: Json = False,
) -> None:
    """Export an adapter to the PEFT format.

    `PeftModel.from_pretrained` loads it, and the answers are the same.
    """
    if to != "peft":
        raise InputError(f"--to {to}: unknown format{did_you_mean(to, ['peft']) or '.'} Known: peft.")
    from normtune.api.models import export_peft

    emit(json, export_peft(adapter=adapter, out=out))


@app.command()
def push(
    adapter: Annotated[Path, typer.Argument(help="Folder of the adapter.")],
    repo: Annotated[str, typer.Argument(help="Repository of the Hugging Face hub: owner/name.")],
    scores: Annotated[
        list[Path] | None, typer.Option(help="Folder of scores that normtune evaluate wrote; repeatable.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Make the repository public; default: private.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would be uploaded, but upload nothing.")
    ] = False,
    json: Json = False,
) -> None:
    """Upload an adapter, its model card and its scores to the Hugging Face hub.

    Lists the files first. Rows, answers, predictions and hashes of rows are never uploaded. `--adapter owner/name`
    loads the adapter on any machine.
    """
    from normtune.adapters.hub import push

    def announce(upload: Upload) -> None:
        if not dry_run:
            print("uploading " + str(upload).rpartition("\n")[0], file=sys.stderr)

    emit(json, push(adapter, repo, scores=scores or (), public=public, dry_run=dry_run, announce=announce))
