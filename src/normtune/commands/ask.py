"""Commands that ask a model about one image or study."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from normtune.commands.app import Adapter, Device, Json, MaxPixels, Model, Quantize, app, emit
from normtune.data import tasks
from normtune.runtime.transformers_import import import_transformers


@app.command()
def ask(
    model: Model,
    image: Annotated[Path, typer.Option(help="Image file: PNG, JPEG, TIFF or DICOM.")],
    question: Annotated[list[str], typer.Option(help="A question about the image. Repeat for several.")],
    option: Annotated[
        list[str] | None, typer.Option(help="An option of the answer, for multiple choice. Repeat for each option.")
    ] = None,
    adapter: Adapter = None,
    beams: Annotated[int, typer.Option(min=1, help="Width of the beam search; 1 is greedy decoding.")] = 1,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Maximum length of an answer, in tokens; default: as in training, or 16.")
    ] = None,
    abstain_below: Annotated[
        float | None, typer.Option(min=0, max=1, help="Abstain from answers with a confidence below this.")
    ] = None,
    device: Device = None,
    quantize: Quantize = None,
    max_pixels: MaxPixels = None,
    json: Json = False,
) -> None:
    """Ask a model questions about an image.

    Research use, not for diagnosis.
    """
    import_transformers()
    from normtune.api.questions import ask

    answers = ask(
        model,
        image,
        question,
        adapter=adapter,
        beams=beams,
        max_new_tokens=max_new_tokens,
        options=option or (),
        abstain_below=abstain_below,
        device=device,
        quantize=quantize,
        max_pixels=max_pixels,
    )
    rows = [
        {
            "question": text,
            "answer": answer.text,
            "score": answer.score,
            "confidence": answer.confidence,
            "abstained": answer.abstained,
            "finish_reason": answer.finish_reason,
            "question_tokens_cut": answer.question_tokens_cut,
        }
        for text, answer in zip(question, answers, strict=True)
    ]
    lines = [f"{text}  {answer}" for text, answer in zip(question, answers, strict=True)]
    for number, answer in enumerate(answers):
        if tokens := answer.question_tokens_cut:
            lines[number] += f"  (the last {tokens} tokens of the question were not read)"
    emit(json, {"image": str(image), "answers": rows}, "\n".join(lines))


@app.command()
def describe(
    model: Model,
    image: Annotated[list[Path], typer.Option(help="Image file. Repeat for several views of one study.")],
    adapter: Adapter = None,
    beams: Annotated[int, typer.Option(min=1, help="Width of the beam search; 1 is greedy decoding.")] = 1,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Maximum length of the report, in tokens.")
    ] = tasks.MAX_REPORT_TOKENS,
    device: Device = None,
    quantize: Quantize = None,
    max_pixels: MaxPixels = None,
    json: Json = False,
) -> None:
    """Write a report about an image or study.

    Research use, not for diagnosis.
    """
    import_transformers()
    from normtune.api.questions import describe

    answer = describe(
        model,
        image,
        adapter=adapter,
        beams=beams,
        max_new_tokens=max_new_tokens,
        device=device,
        quantize=quantize,
        max_pixels=max_pixels,
    )
    result = {"report": answer.text, "score": answer.score, "finish_reason": answer.finish_reason}
    emit(json, {"images": [str(path) for path in image], **result}, answer.text)
