"""Commands that convert original checkpoints to transformers' format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from normtune.commands.app import Json, app, emit
from normtune.runtime.progress import progress_bar


@app.command("import-miss")
def import_miss(
    source: Annotated[Path, typer.Argument(help="The .pth file of MISS, or the directory of BLIP-VQA.")],
    out: Annotated[Path, typer.Argument(help="Folder of the converted model.")],
    vocab: Annotated[Path | None, typer.Option(help="The file vocab.txt of bert-base-uncased.")] = None,
    image_size: Annotated[int | None, typer.Option(help="Resize the position embeddings to it.")] = None,
    vision_heads: Annotated[int | None, typer.Option(help="Image encoder heads; default: width / 64.")] = None,
    text_heads: Annotated[int | None, typer.Option(help="Text model heads; default: width / 64.")] = None,
    divide_twice: Annotated[
        bool, typer.Option(help="Preprocess images as MISS's code: /255 twice, no normalisation.")
    ] = False,
    json: Json = False,
) -> None:
    """Convert a checkpoint of MISS or BLIP-VQA.

    Normtune and transformers can load the converted model.
    """
    from normtune.models.importers.miss.importer import import_miss

    result = import_miss(
        source,
        out,
        vocab=vocab,
        image_size=image_size,
        vision_heads=vision_heads,
        text_heads=text_heads,
        divide_twice=divide_twice,
    )
    emit(json, result)


@app.command("import-llava-med")
def import_llava_med(
    source: Annotated[str, typer.Argument(help="LLaVA-Med in its original format: a directory or Hub name.")],
    out: Annotated[Path, typer.Argument(help="Folder of the converted model.")],
    vision: Annotated[str | None, typer.Option(help="CLIP model, if SOURCE has none: a directory or Hub name.")] = None,
    stock_tower: Annotated[
        bool, typer.Option("--stock-tower", help="Use the weights of --vision even if SOURCE has its own.")
    ] = False,
    vision_heads: Annotated[
        int | None, typer.Option(help="Attention heads of SOURCE's own CLIP; default: width / 64.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="LLaMA model, if SOURCE is a difference from it.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Tokenizer to use instead of SOURCE's.")] = None,
    json: Json = False,
) -> None:
    """Convert an original LLaVA-Med checkpoint.

    Normtune and transformers can load the converted model. If the command is interrupted, run it again to
    continue.
    """
    from normtune.models.importers.llava_med.importer import import_llava_med

    with progress_bar("writing tensors", quiet=json) as tick:
        result = import_llava_med(
            source,
            out,
            vision=vision,
            stock_tower=stock_tower,
            vision_heads=vision_heads,
            base=base,
            tokenizer=tokenizer,
            on_progress=tick,
        )
    emit(json, result)
