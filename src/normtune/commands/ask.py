"""Commands that answer for single images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from normtune.commands.app import Adapter, Device, Json, Model, Quantize, app, emit
from normtune.data import tasks


@app.command()
def ask(
    model: Model,
    image: Annotated[Path, typer.Option(help="PNG, JPEG, TIFF or DICOM.")],
    question: Annotated[list[str], typer.Option(help="Repeat for several questions of the image.")],
    adapter: Adapter = None,
    beams: Annotated[int, typer.Option(min=1, help="Beams of the search; 1 is greedy.")] = 1,
    device: Device = None,
    quantize: Quantize = None,
    json: Json = False,
) -> None:
    """Ask questions of one image."""
    from normtune.inference.ask import ask

    answers = ask(model, image, question, adapter=adapter, beams=beams, device=device, quantize=quantize)
    rows = [
        {"question": q, "answer": a.text, "score": a.score} for q, a in zip(question, answers, strict=True)
    ]
    emit(
        json,
        {"image": str(image), "answers": rows},
        "\n".join(f"{r['question']}  {r['answer']}" for r in rows),
    )


@app.command()
def describe(
    model: Model,
    image: Annotated[list[Path], typer.Option(help="Repeat for the views of one study.")],
    adapter: Adapter = None,
    beams: Annotated[int, typer.Option(min=1, help="Beams of the search; 1 is greedy.")] = 1,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Longest report, in tokens.")
    ] = tasks.MAX_REPORT_TOKENS,
    device: Device = None,
    quantize: Quantize = None,
    json: Json = False,
) -> None:
    """Write a report for one image or study. Research use, not for diagnosis."""
    from normtune.inference.ask import describe

    answer = describe(
        model,
        image,
        adapter=adapter,
        beams=beams,
        max_new_tokens=max_new_tokens,
        device=device,
        quantize=quantize,
    )
    emit(json, {"images": [str(i) for i in image], "report": answer.text, "score": answer.score}, answer.text)
