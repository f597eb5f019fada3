"""Commands that merge, export or upload an adapter."""

from __future__ import annotations

import sys
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
