"""Commands that merge or export an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from normtune.commands.app import Json, Model, app, emit, plain
from normtune.errors import InputError, did_you_mean


@app.command()
def merge(
    model: Model,
    adapter: Annotated[Path, typer.Option(help="The adapter to merge.")],
    out: Annotated[Path, typer.Option(help="Where the merged model is written.")],
    json: Json = False,
) -> None:
    """A loadable model that links the base's own files and adds the trained tensors."""
    from normtune.adapters.merge import merge_text, merge_to_disk

    found = merge_to_disk(model, adapter, out)
    emit(json, plain(found), merge_text(found))


@app.command()
def export(
    adapter: Annotated[Path, typer.Option(help="The adapter to export.")],
    out: Annotated[Path, typer.Option(help="Where it is written.")],
    to: Annotated[str, typer.Option(help="The format: peft.")] = "peft",
    json: Json = False,
) -> None:
    """An adapter in the form that `PeftModel.from_pretrained` loads, to the same answers."""
    if to != "peft":
        raise InputError(f"--to {to}: unknown format{did_you_mean(to, ['peft']) or '.'} Known: peft.")
    from normtune.adapters.export_peft import export_peft, export_text

    found = export_peft(adapter, out)
    emit(json, plain(found), export_text(found))
