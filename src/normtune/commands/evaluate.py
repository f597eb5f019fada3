"""Commands that evaluate a model, and compare, show or convert the results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from normtune.commands.app import Json, app, emit, options_from
from normtune.evaluation.config import EvaluateConfig
from normtune.runtime import distributed
from normtune.runtime.progress import progress_bar
from normtune.runtime.transformers_import import import_transformers


@app.command()
def score(
    predictions: Annotated[Path, typer.Argument(help='JSONL of {"id", "prediction"}.')],
    references: Annotated[Path, typer.Argument(help='JSONL of {"id", "reference"[, "images", "kind"]}.')],
    task: Annotated[str | None, typer.Option(help='report or vqa; default: by "kind" in the file.')] = None,
    normalisation: Annotated[
        list[str] | None, typer.Option(help="Text normalisation, repeatable: none, r2gen-iu, r2gen-mimic, vqa.")
    ] = None,
    chexbert: Annotated[Path | None, typer.Option(help="Folder with chexbert.pth and vocab.txt.")] = None,
    bertscore: Annotated[Path | None, typer.Option(help="Folder of a model for BERTScore.")] = None,
    radgraph: Annotated[bool, typer.Option("--radgraph", help="Add RadGraph F1.")] = False,
    meteor15: Annotated[Path | None, typer.Option(help="Path of meteor-1.5.jar, for METEOR 1.5; needs Java.")] = None,
    metric_model: Annotated[
        str | None, typer.Option(help="Metrics that need a model, as of normtune evaluate: green=DIR:PYTHON,...")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the result to this JSON file.")] = None,
    json: Json = False,
) -> None:
    """Score a file of predictions against references.

    Rows are joined by id. Each metric has a 95% confidence interval.
    """
    from normtune.evaluation.score_files import score_files, score_text

    scores = score_files(
        predictions,
        references,
        task=task,  # type: ignore[arg-type]  # checked there
        normalisations=normalisation,
        chexbert=chexbert,
        bertscore=bertscore,
        radgraph=radgraph,
        meteor15=meteor15,
        metric_model=metric_model,
        out=out,
    )
    emit(json, scores, score_text(scores))


@app.command()
def compare(
    runs: Annotated[
        list[str],
        typer.Argument(help="Result folders of evaluate, the baseline first; NAME=FOLDER,FOLDER: seeds of a recipe."),
    ],
    margin: Annotated[
        float | None, typer.Option(help="Points that do not matter: tests equivalence within this margin.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the table to this Markdown file.")] = None,
    json: Json = False,
) -> None:
    """Compare evaluations of the same questions.

    Shows each metric's difference from the first evaluation, paired by image, with its interval. Recipes with the
    results of three seeds or more are compared over seeds and images.
    """
    from normtune.evaluation.compare import compare, parse_groups

    comparison = compare(parse_groups(runs), margin=margin)
    if out is not None:
        comparison.save(out)
    emit(json, comparison)


@app.command()
def review(
    runs: Annotated[list[Path], typer.Argument(help="Result folders of evaluate, for the same questions.")],
    out: Annotated[Path, typer.Option(help="The HTML file to write.")],
    data: Annotated[str | None, typer.Option(help="Dataset; default: as recorded in the results.")] = None,
    root: Annotated[Path | None, typer.Option(help="Folder of the dataset; default: as recorded.")] = None,
    images: Annotated[bool, typer.Option(help="Include the images.")] = True,
    limit: Annotated[int, typer.Option(help="Maximum number of rows; wrong answers come first.")] = 400,
    pixels: Annotated[int, typer.Option(help="Longest side of an image, in pixels.")] = 256,
    json: Json = False,
) -> None:
    """Write an HTML page of right and wrong answers.

    The page is one file, which opens in a browser without a server.
    """
    from normtune.evaluation.review.page import review, review_text

    with progress_bar("images", quiet=json) as tick:
        summary = review(runs, out, data=data, root=root, images=images, limit=limit, pixels=pixels, progress=tick)
    emit(json, summary, review_text(summary))


@app.command("export-predictions")
def export_predictions(
    run: Annotated[Path, typer.Argument(help="Result folder of normtune evaluate.")],
    to: Annotated[str, typer.Option(help="Evaluation harness: lmms-eval or vlmevalkit.")],
    out: Annotated[Path, typer.Option(help="File to write: .json for lmms-eval, .tsv for vlmevalkit.")],
    task: Annotated[str | None, typer.Option(help="Task name of lmms-eval; default for SLAKE only.")] = None,
    json: Json = False,
) -> None:
    """Convert predictions for another evaluation harness.

    The harness can score them again without running a model.
    """
    from normtune.evaluation.export_predictions import export_predictions

    emit(json, export_predictions(run, to, out, task=task))


@app.command()
@options_from(EvaluateConfig, positional="model", run_file=True)
def evaluate(*, as_json: bool, **options: Any) -> None:
    """Evaluate a model on a dataset.

    Answers every question of a split and scores the answers, with 95% confidence intervals. The options of the
    evaluation are written to run.yaml in --out: `normtune evaluate run.yaml` repeats it.
    """
    config = EvaluateConfig.checked(**options)  # an option may be missing
    if distributed.launched_count() == 1:
        import_transformers()
    from normtune.api.runs import evaluate

    emit(as_json, evaluate(**config.model_dump(), progress=not as_json))
