"""Commands that make one form of a model or an adapter into another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from normtune.commands.app import Json, app, emit, plain
from normtune.runtime.progress import progress_bar


@app.command("import-miss")
def import_miss(
    source: Annotated[Path, typer.Argument(help="MISS's .pth, or a directory of BLIP-VQA.")],
    out: Annotated[Path, typer.Argument(help="Where the model is written.")],
    vocab: Annotated[Path | None, typer.Option(help="The vocab.txt of bert-base-uncased.")] = None,
    image_size: Annotated[int | None, typer.Option(help="Resize the position embeddings to it.")] = None,
    vision_heads: Annotated[int | None, typer.Option(help="Attention heads, where not width / 64.")] = None,
    text_heads: Annotated[int | None, typer.Option(help="Attention heads, where not width / 64.")] = None,
    divide_twice: Annotated[
        bool, typer.Option(help="Prepare images as MISS's released code does: /255 twice, not normalised.")
    ] = False,
    json: Json = False,
) -> None:
    """MISS's original checkpoint, or BLIP-VQA's, as a model that normtune and transformers load."""
    from normtune.models.importers.miss.importer import import_miss, import_text

    found = import_miss(
        source,
        out,
        vocab=vocab,
        image_size=image_size,
        vision_heads=vision_heads,
        text_heads=text_heads,
        divide_twice=divide_twice,
    )
    emit(json, plain(found), import_text(found))


@app.command("import-llava-med")
def import_llava_med(
    source: Annotated[str, typer.Argument(help="LLaVA-Med's original layout: a directory or hub name.")],
    out: Annotated[Path, typer.Argument(help="Where the model is written.")],
    vision: Annotated[
        str | None, typer.Option(help="Its CLIP, where SOURCE holds none: a directory or hub name.")
    ] = None,
    stock_tower: Annotated[
        bool, typer.Option("--stock-tower", help="Take --vision's weights even where SOURCE has its own.")
    ] = False,
    vision_heads: Annotated[
        int | None, typer.Option(help="Attention heads of SOURCE's own CLIP, where not width / 64.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="The LLaMA that SOURCE is a delta of.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="A tokenizer in place of SOURCE's.")] = None,
    json: Json = False,
) -> None:
    """LLaVA-Med's original checkpoint as a model that normtune and transformers load.

    Run again after a kill, and it goes on.
    """
    from normtune.models.importers.llava_med.importer import import_llava_med, import_text

    with progress_bar("writing tensors", quiet=json) as tick:
        found = import_llava_med(
            source,
            out,
            vision=vision,
            stock_tower=stock_tower,
            vision_heads=vision_heads,
            base=base,
            tokenizer=tokenizer,
            tick=tick,
        )
    emit(json, plain(found), import_text(found))
