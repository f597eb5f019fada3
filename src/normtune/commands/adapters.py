"""Commands that merge or export an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from normtune.commands.app import Json, Model, app, emit
from normtune.errors import InputError, did_you_mean


@app.command()
def merge(
    model: Model,
    adapter: Annotated[Path, typer.Option(help="Folder of the adapter.")],
    out: Annotated[Path, typer.Option(help="Folder of the merged model.")],
    json: Json = False,
) -> None:
    """Merge an adapter into its base model.

    The merged model loads like any model of its kind. It links the base's files and adds the trained tensors.
    """
    from normtune.api.models import merge

    emit(json, merge(model, adapter=adapter, out=out))


@app.command()
def export(
    adapter: Annotated[Path, typer.Option(help="Folder of the adapter.")],
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
