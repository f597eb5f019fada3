"""Commands on what evaluations wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from normtune.commands.app import Json, app, emit, plain, takes
from normtune.errors import InputError, did_you_mean
from normtune.evaluation.config import EvaluateConfig
from normtune.runtime import distributed
from normtune.runtime.progress import progress_bar


@app.command()
def score(
    predictions: Annotated[Path, typer.Argument(help='JSONL of {"id", "prediction"}.')],
    references: Annotated[Path, typer.Argument(help='JSONL of {"id", "reference"[, "images", "kind"]}.')],
    task: Annotated[str | None, typer.Option(help="report or vqa; by default as `kind` says.")] = None,
    normalisation: Annotated[
        list[str] | None, typer.Option(help="Of the texts, repeatable: none, r2gen-iu, r2gen-mimic; vqa.")
    ] = None,
    chexbert: Annotated[Path | None, typer.Option(help="Folder of chexbert.pth and vocab.txt.")] = None,
    bertscore: Annotated[Path | None, typer.Option(help="Folder of the model for BERTScore.")] = None,
    radgraph: Annotated[bool, typer.Option("--radgraph", help="Add RadGraph F1.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the result there as JSON.")] = None,
    json: Json = False,
) -> None:
    """Score a file of predictions against a file of references, joined by id, with 95% intervals."""
    from normtune.evaluation.score_files import TASKS, score_files, score_text

    if task not in (None, *TASKS):
        hint = did_you_mean(str(task), TASKS) or "."
        raise InputError(f"--task {task}: unknown{hint} Known: {', '.join(TASKS)}.")
    found = score_files(
        predictions,
        references,
        task=task,  # type: ignore[arg-type]  # checked above
        normalisations=normalisation,
        chexbert=chexbert,
        bertscore=bertscore,
        radgraph=radgraph,
        out=out,
    )
    emit(json, found, score_text(found))


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Result folders of evaluate, baseline first.")],
    out: Annotated[Path | None, typer.Option(help="Write the table there, as Markdown.")] = None,
    json: Json = False,
) -> None:
    """Evaluations of the same questions: every metric's difference from the first, paired by image."""
    from normtune.evaluation.compare import compare_runs, comparison_text, write_comparison

    found = compare_runs(runs).to_json()
    if out is not None:
        write_comparison(found, out)
    emit(json, found, comparison_text(found))


@app.command()
def review(
    runs: Annotated[list[Path], typer.Argument(help="Result folders of evaluate, of the same questions.")],
    out: Annotated[Path, typer.Option(help="The HTML file.")],
    data: Annotated[str | None, typer.Option(help="The dataset; by default as the results name it.")] = None,
    root: Annotated[Path | None, typer.Option(help="Where the dataset's files lie, likewise.")] = None,
    images: Annotated[bool, typer.Option(help="Show the images.")] = True,
    limit: Annotated[int, typer.Option(help="Rows shown at most; wrong ones first.")] = 400,
    pixels: Annotated[int, typer.Option(help="Longest side of an image.")] = 256,
    json: Json = False,
) -> None:
    """A page of right and wrong answers with their images, to look through: one file, no server."""
    from normtune.evaluation.review.page import review, review_text

    with progress_bar("images", quiet=json) as tick:
        found = review(
            runs, out, data=data, root=root, images=images, limit=limit, pixels=pixels, progress=tick
        )
    emit(json, found, review_text(found))


@app.command("export-predictions")
def export_predictions(
    run: Annotated[Path, typer.Argument(help="A result folder of evaluate.")],
    to: Annotated[str, typer.Option(help="The harness: lmms-eval or vlmevalkit.")],
    out: Annotated[Path, typer.Option(help="The file: .json for lmms-eval, .tsv for vlmevalkit.")],
    task: Annotated[str | None, typer.Option(help="lmms-eval's task; known for SLAKE.")] = None,
    json: Json = False,
) -> None:
    """Answers in the form that another harness scores again, without a model."""
    from normtune.evaluation.export_predictions import export_predictions, export_text

    found = export_predictions(run, to, out, task=task)
    emit(json, plain(found), export_text(found))


@app.command()
@takes(EvaluateConfig, positional="model")
def evaluate(config: EvaluateConfig, *, as_json: bool) -> None:
    """Answer every question of a split and score the answers, with 95% intervals."""
    from normtune.evaluation.evaluate import evaluate_config, metrics_text

    with progress_bar("answering", quiet=as_json or not distributed.is_main_process()) as tick:
        found = evaluate_config(config, progress=tick)
    emit(as_json, found, metrics_text(found))
