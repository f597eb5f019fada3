"""Writes the review page: right and wrong answers in one HTML file that needs no server."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from importlib.resources import files
from operator import attrgetter
from pathlib import Path
from typing import Any

from normtune.adapters.info import NOTICE
from normtune.data.options import DataOptions
from normtune.data.records import Dataset, confidence
from normtune.data.registry import open_configured
from normtune.errors import InputError
from normtune.evaluation.compare import read_runs
from normtune.evaluation.results import Evaluation
from normtune.evaluation.review.rows import (
    Row,
    RunPrediction,
    Strata,
    count_rows,
    ids_by_stratum,
    read_rows,
    select_rows,
)
from normtune.evaluation.review.thumbnails import Progress, Thumbnail, thumbnails
from normtune.evaluation.review.word_diff import word_difference
from normtune.metrics.calibration import confidence_text
from normtune.metrics.conformal import conformal_text
from normtune.runtime.files import write_text
from normtune.runtime.templates import render_template

LIMIT = 400  # rows on the page by default
PIXELS = 256  # longest side of an image by default
MAX_TABLE_VALUES = 12  # lines in the table of a field


def review(
    directories: Sequence[Path | str],
    out: Path | str,
    *,
    data: str | None = None,
    root: Path | None = None,
    images: bool = True,
    limit: int = LIMIT,
    pixels: int = PIXELS,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the review page of one run, or of several runs of the same questions.

    Args:
        directories: result folders of evaluations; other runs are compared with the first.
        out: the HTML file.
        data: name of the dataset; by default the one that the result records.
        root: folder or file of the dataset; by default the one that the result records.
        images: shows the images; False does not open the dataset.
        limit: maximum number of rows, see `normtune.evaluation.review.rows.select_rows`.
        pixels: longest side of an image.
        progress: called with (images done, images in all).

    Returns:
        A dictionary of `out`, `rows` (of the evaluation), `shown` (rows on the page), `images` (on the page),
        `unreadable` (images that could not be read) and `bytes` (size of the page).

    Raises:
        InputError: as `normtune.evaluation.compare.read_runs`, or if the dataset cannot be opened or has
            other rows.
    """
    if limit < 1 or not 16 <= pixels <= 1024:
        raise InputError("--limit takes 1 or more rows, --pixels 16 to 1024.")
    runs = read_runs(directories)
    dataset = _open_dataset(runs[0], data, root) if images else None
    metas = {} if dataset is None else {example.id: example.meta for example in dataset.examples}
    rows = read_rows(runs, metas)
    selected, sentence = select_rows(rows, limit)
    pictures: dict[str, Thumbnail] = {}
    if dataset is not None:
        keys = [key for row in selected for key in row.example.images]
        pictures = thumbnails(keys, dataset.open_image, pixels=pixels, progress=progress)
    page = _render_page(runs, rows, selected, sentence, pictures)
    write_text(out, page)
    return {
        "out": str(out),
        "rows": len(rows),
        "shown": len(selected),
        "images": sum(bool(picture.url) for picture in pictures.values()),
        "unreadable": sum(not picture.url for picture in pictures.values()),
        "bytes": len(page.encode("utf-8", "backslashreplace")),
    }


def review_text(result: Mapping[str, Any]) -> str:
    """Describe the result of `review` in a few sentences."""
    images = f"{result['images']} images"
    if result["unreadable"]:
        images += f" ({result['unreadable']} more could not be read)"
    size = f"{result['bytes'] / 1e6:.1f} MB"
    return (
        f"{result['shown']} of {result['rows']} rows, {images}, {size}; {NOTICE}. The page contains images "
        f"and texts of the dataset: the dataset's terms of use apply to it. Written: {result['out']}"
    )


def _open_dataset(run: Evaluation, data: str | None, root: Path | None) -> Dataset:
    """Open the dataset that the result records, or the one that `data` and `root` name instead."""
    recorded = run.record.get("data")
    options: dict[str, Any] = dict(recorded) if isinstance(recorded, dict) and data is None else {}
    options["data"] = data or options.get("data") or run.record["dataset"]
    if root is not None:
        options["root"] = root
    known = {name: value for name, value in options.items() if name in DataOptions.model_fields}
    try:
        dataset = open_configured(DataOptions.checked(**known))
    except InputError as error:
        raise InputError(f"{error} To omit the images: --no-images.") from error
    # If the dataset has changed since the evaluation, the page would show wrong images.
    by_id = {example.id: example for example in dataset.examples}
    content = attrgetter("question", "answer", "images", "options")
    changed = [e.id for e in run.examples if e.id in by_id and content(e) != content(by_id[e.id])]
    if changed or not any(example.id in by_id for example in run.examples):
        which = f"{len(changed)} of the rows, first '{changed[0]}'," if changed else "the rows"
        raise InputError(
            f"{which} of {run.out} are not those of {options['data']}. "
            "Give the --data and --root that were evaluated, or --no-images."
        )
    return dataset


def _render_page(
    runs: Sequence[Evaluation],
    rows: Sequence[Row],
    selected: Sequence[Row],
    sentence: str,
    pictures: Mapping[str, Thumbnail],
) -> str:
    """Render page.html.j2: tables of all `rows`, and the `selected` rows with their pictures."""
    style, script = _read_resource("page.css"), _read_resource("page.js")
    strata = ids_by_stratum(rows)
    by_id = {row.example.id: row for row in rows}
    record = runs[0].record
    return render_template(
        "evaluation/review/page.html.j2",
        names=[run.name for run in runs],
        models=[(run.name, _describe_model(run)) for run in runs],
        is_report=runs[0].is_report,
        normalisation=record["normalisation"],
        dataset=record["dataset"],
        splits=", ".join(record["splits"]),
        licence=record["licence"],
        notice=NOTICE[:1].upper() + NOTICE[1:],
        total=len(rows),
        sentence=sentence,
        everything=count_rows(rows, "all"),
        tables=[_table(field, values, by_id) for field, values in strata.items()],
        confidence=[
            (
                run.name,
                [*confidence_text(run.record), *conformal_text(run.record)],
                run.record["confidence"]["all"]["bins"],
            )
            for run in runs
            if run.record.get("confidence")
        ],
        filters=[(field, field.replace("_", " "), list(values)) for field, values in strata.items()],
        sorts=_sort_options(runs, selected),
        outcomes=_outcome_options(runs),
        pictures=[picture for picture in pictures.values() if picture.url],
        rows=_row_data(selected, strata, pictures),
        style=style,
        script=script,
        policy=_security_policy(style, script),
    )


def _describe_model(run: Evaluation) -> str:
    """Name the model or the baseline that the result records."""
    base, adapter = run.record.get("base"), run.record.get("adapter")
    if not base:
        return str(run.record.get("baseline", ""))
    return f"{base} with {adapter}" if adapter else f"{base} without an adapter"


def _read_resource(name: str) -> str:
    return files("normtune.evaluation.review").joinpath(name).read_text(encoding="utf-8")


def _security_policy(style: str, script: str) -> str:
    """Build the Content-Security-Policy: it allows only the page's style, script (by hash) and images."""
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii") for text in (style, script)]
    return (
        f"default-src 'none'; img-src data:; style-src 'sha256-{digests[0]}'; "
        f"script-src 'sha256-{digests[1]}'; base-uri 'none'; form-action 'none'"
    )


def _table(field: str, values: Mapping[str, Sequence[str]], by_id: Mapping[str, Row]) -> dict[str, Any]:
    """Build the table of one field: its largest strata, and the number of further strata."""
    lines = [count_rows([by_id[id] for id in ids], value) for value, ids in list(values.items())[:MAX_TABLE_VALUES]]
    return {"name": field.replace("_", " "), "lines": lines, "more": len(values) - len(lines)}


def _sort_options(runs: Sequence[Evaluation], rows: Sequence[Row]) -> list[tuple[str, str]]:
    """List the orders of rows as (key, label).

    A key consists of a direction (up or down), a quantity (score, value or gain) and the index of a run.
    page.js reads it.
    """
    options = [("", "as in the dataset")]
    for at, run in enumerate(runs):
        of = f" – {run.name}" if len(runs) > 1 else ""
        if any(row.predictions[at].score is not None for row in rows):
            options.append((f"up score {at}", f"least confident first{of}"))
            options.append((f"down score {at}", f"most confident first{of}"))
        if run.is_report:
            options.append((f"up value {at}", f"lowest ROUGE-L first{of}"))
            options.append((f"down value {at}", f"highest ROUGE-L first{of}"))
        if run.is_report and at:
            options.append((f"down gain {at}", f"largest gain over {runs[0].name} first{of}"))
            options.append((f"up gain {at}", f"largest loss against {runs[0].name} first{of}"))
    return options


def _outcome_options(runs: Sequence[Evaluation]) -> list[tuple[str, str]]:
    """List the outcomes that rows can be filtered by as (key, label). The first one shows all rows."""
    options = [("", "all")]
    if runs[0].is_report:
        for at, run in list(enumerate(runs))[1:]:
            options += [
                (f"gain {at}", f"{run.name} better than {runs[0].name}"),
                (f"loss {at}", f"{run.name} worse than {runs[0].name}"),
            ]
        return options
    if len(runs) == 1:
        return [*options, ("wrong 0", "wrong"), ("right 0", "right")]
    options += [
        ("some wrong", "at least one run wrong"),
        ("all wrong", "all runs wrong"),
        ("all right", "all runs right"),
    ]
    for at, run in enumerate(runs):
        options += [
            (f"right {at}", f"{run.name} right"),
            (f"wrong {at}", f"{run.name} wrong"),
            (f"only-right {at}", f"only {run.name} right"),
            (f"only-wrong {at}", f"only {run.name} wrong"),
        ]
    return options


def _row_data(rows: Sequence[Row], strata: Strata, pictures: Mapping[str, Thumbnail]) -> list[dict[str, Any]]:
    """Build the rows for the template. page.js reads `facts` to filter and sort."""
    values: dict[str, dict[str, list[str]]] = {row.example.id: {} for row in rows}  # id -> field -> values
    for field, ids_of_value in strata.items():
        for value, ids in ids_of_value.items():
            for id in ids:
                if id in values:
                    values[id].setdefault(field, []).append(value)
    return [
        {
            "example": row.example,
            "strata": [value for field_values in values[row.example.id].values() for value in field_values],
            "pictures": [(key, pictures.get(key)) for key in row.example.images] if pictures else [],
            "predictions": [_prediction_data(prediction, row) for prediction in row.predictions],
            "facts": {
                "strata": values[row.example.id],
                "value": [round(prediction.value, 4) for prediction in row.predictions],
                "score": [prediction.score for prediction in row.predictions],
            },
        }
        for row in rows
    ]


def _prediction_data(prediction: RunPrediction, row: Row) -> dict[str, Any]:
    """Build one prediction for the template; only reports have word differences (`pieces`)."""
    is_report = row.example.kind == "report"
    return {
        "text": prediction.text,
        "value": prediction.value,
        "right": prediction.value == 1,
        "recall": prediction.recall,
        "confidence": confidence(prediction.score),
        "pieces": word_difference(prediction.text, row.example.answer) if is_report else [],
    }
