"""The page of right and wrong answers: one HTML file for a person to look through, without a server."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from normtune.adapters.info import NOTICE
from normtune.data.options import DataOptions
from normtune.data.records import Dataset, Example
from normtune.data.registry import open_configured
from normtune.errors import InputError
from normtune.evaluation.compare import EvaluationRun, read_runs
from normtune.evaluation.review.rows import Row, Said, Strata, chosen, count, read_rows, strata
from normtune.evaluation.review.thumbnails import Progress, Thumbnail, thumbnails
from normtune.evaluation.review.word_diff import word_difference
from normtune.runtime.files import write_text

LIMIT = 400
PIXELS = 256
SHOWN_VALUES = 12  # of a field, in its table


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
    """Write the page of one run, or of several runs of the same questions.

    Args:
        directories: result folders of evaluations; differences are told from the first.
        out: the HTML file.
        data: the dataset's name, where it is another than the results say.
        root: where its files lie, likewise.
        images: whether to show them; without, the dataset is not opened.
        limit: rows shown at most, see `normtune.evaluation.review.rows.chosen`.
        pixels: longest side of an image.
        progress: called with (images done, images in all).

    Returns:
        out, rows, shown, images, unreadable (images that were not), bytes.

    Raises:
        InputError: as `normtune.evaluation.compare.read_runs`, or the dataset cannot be opened or holds other rows.
    """
    if limit < 1 or not 16 <= pixels <= 1024:
        raise InputError("--limit takes 1 or more rows, --pixels 16 to 1024.")
    runs = read_runs(directories)
    dataset = _opened(runs[0], data, root) if images else None
    metas = {} if dataset is None else {example.id: example.meta for example in dataset.examples}
    rows = read_rows(runs, metas)
    shown, sentence = chosen(rows, limit)
    pictures: dict[str, Thumbnail] = {}
    if dataset is not None:
        keys = [key for row in shown for key in row.example.images]
        pictures = thumbnails(keys, dataset.open_image, pixels=pixels, progress=progress)
    page = _page(runs, rows, shown, sentence, pictures)
    write_text(out, page)
    return {
        "out": str(out),
        "rows": len(rows),
        "shown": len(shown),
        "images": sum(bool(picture.url) for picture in pictures.values()),
        "unreadable": sum(not picture.url for picture in pictures.values()),
        "bytes": len(page.encode("utf-8", "backslashreplace")),
    }


def review_text(found: Mapping[str, Any]) -> str:
    """What `review` returns, as a sentence."""
    images = f"{found['images']} images"
    if found["unreadable"]:
        images += f" ({found['unreadable']} more could not be read)"
    size = f"{found['bytes'] / 1e6:.1f} MB"
    return (
        f"{found['shown']} of {found['rows']} rows, {images}, {size}; {NOTICE}. "
        f"The page holds the data's images and texts: keep it as they must be kept. Written: {found['out']}"
    )


def _opened(run: EvaluationRun, data: str | None, root: Path | None) -> Dataset:
    """The dataset that the result names, or that the options name in its place."""
    recorded = run.about.get("data")
    options: dict[str, Any] = dict(recorded) if isinstance(recorded, dict) and data is None else {}
    options["data"] = data or options.get("data") or run.about["dataset"]
    if root is not None:
        options["root"] = root
    known = {name: value for name, value in options.items() if name in DataOptions.model_fields}
    try:
        dataset = open_configured(DataOptions.checked(**known))
    except InputError as error:
        raise InputError(f"{error} To leave the images out: --no-images.") from error
    held = {example.id: example for example in dataset.examples}
    other = [e.id for e in run.examples if e.id in held and not _same(e, held[e.id])]
    if other or not any(example.id in held for example in run.examples):
        odd = f"{len(other)} of the rows, first '{other[0]}'," if other else "the rows"
        raise InputError(
            f"{odd} of {run.directory} are not those of {options['data']}. "
            "Give the --data and --root that were evaluated, or --no-images."
        )
    return dataset


def _same(one: Example, other: Example) -> bool:
    return (one.question, one.answer, one.images) == (other.question, other.answer, other.images)


def _page(
    runs: Sequence[EvaluationRun],
    rows: Sequence[Row],
    shown: Sequence[Row],
    sentence: str,
    pictures: Mapping[str, Thumbnail],
) -> str:
    import jinja2  # for this page alone

    style, script = _resource("page.css"), _resource("page.js")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(_resource("page.html"))
    parts = strata(rows)
    by_id = {row.example.id: row for row in rows}
    about = runs[0].about
    return template.render(
        names=[run.name for run in runs],
        models=[(run.name, _model(run)) for run in runs],
        is_report=runs[0].is_report,
        normalisation=about["normalisation"],
        dataset=about["dataset"],
        splits=", ".join(about["splits"]),
        licence=about["licence"],
        notice=NOTICE[:1].upper() + NOTICE[1:],
        total=len(rows),
        sentence=sentence,
        everything=count(rows, "all"),
        tables=[_table(field, values, by_id) for field, values in parts.items()],
        filters=[(field, field.replace("_", " "), list(values)) for field, values in parts.items()],
        sorts=_sorts(runs, shown),
        outcomes=_outcomes(runs),
        pictures=[picture for picture in pictures.values() if picture.url],
        rows=_shown(shown, parts, pictures),
        style=style,
        script=script,
        policy=_policy(style, script),
    )


def _model(run: EvaluationRun) -> str:
    """What answered, as the result records it."""
    base, adapter = run.about.get("base"), run.about.get("adapter")
    if not base:
        return str(run.about.get("baseline", ""))
    return f"{base} with {adapter}" if adapter else f"{base} as it is"


def _resource(name: str) -> str:
    return files("normtune.evaluation.review").joinpath(name).read_text(encoding="utf-8")


def _policy(style: str, script: str) -> str:
    """What the page may load: its own style and script, known by their hashes, and images that it holds."""
    digests = [
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii") for text in (style, script)
    ]
    return (
        f"default-src 'none'; img-src data:; style-src 'sha256-{digests[0]}'; "
        f"script-src 'sha256-{digests[1]}'; base-uri 'none'; form-action 'none'"
    )


def _table(field: str, values: Mapping[str, Sequence[str]], by_id: Mapping[str, Row]) -> dict[str, Any]:
    """The strata of one field with the most rows, and how many more there are."""
    lines = [count([by_id[id] for id in ids], value) for value, ids in list(values.items())[:SHOWN_VALUES]]
    return {"name": field.replace("_", " "), "lines": lines, "more": len(values) - len(lines)}


def _sorts(runs: Sequence[EvaluationRun], rows: Sequence[Row]) -> list[tuple[str, str]]:
    """(key, label) of the orders: key is direction, what (score, value or gain) and which run."""
    found = [("", "as in the dataset")]
    for at, run in enumerate(runs):
        of = f" – {run.name}" if len(runs) > 1 else ""
        if any(row.said[at].score is not None for row in rows):
            found.append((f"up score {at}", f"least confident first{of}"))
            found.append((f"down score {at}", f"most confident first{of}"))
        if run.is_report:
            found.append((f"up value {at}", f"lowest ROUGE-L first{of}"))
            found.append((f"down value {at}", f"highest ROUGE-L first{of}"))
        if run.is_report and at:
            found.append((f"down gain {at}", f"largest gain over {runs[0].name} first{of}"))
            found.append((f"up gain {at}", f"largest loss against {runs[0].name} first{of}"))
    return found


def _outcomes(runs: Sequence[EvaluationRun]) -> list[tuple[str, str]]:
    """(key, label) of what the rows can be narrowed to; the first shows all."""
    found = [("", "all")]
    if runs[0].is_report:
        for at, run in list(enumerate(runs))[1:]:
            found += [
                (f"gain {at}", f"{run.name} better than {runs[0].name}"),
                (f"loss {at}", f"{run.name} worse than {runs[0].name}"),
            ]
        return found
    if len(runs) == 1:
        return [*found, ("wrong 0", "wrong"), ("right 0", "right")]
    found += [
        ("some wrong", "some run wrong"),
        ("all wrong", "all runs wrong"),
        ("all right", "all runs right"),
    ]
    for at, run in enumerate(runs):
        found += [
            (f"right {at}", f"{run.name} right"),
            (f"wrong {at}", f"{run.name} wrong"),
            (f"only-right {at}", f"only {run.name} right"),
            (f"only-wrong {at}", f"only {run.name} wrong"),
        ]
    return found


def _shown(rows: Sequence[Row], parts: Strata, pictures: Mapping[str, Thumbnail]) -> list[dict[str, Any]]:
    """Each row as the template takes it; `facts` is what the filters read."""
    values: dict[str, dict[str, list[str]]] = {row.example.id: {} for row in rows}
    for field, found in parts.items():
        for value, ids in found.items():
            for id in ids:
                if id in values:
                    values[id].setdefault(field, []).append(value)
    return [
        {
            "example": row.example,
            "strata": [value for held in values[row.example.id].values() for value in held],
            "pictures": [(key, pictures.get(key)) for key in row.example.images] if pictures else [],
            "said": [_said(said, row) for said in row.said],
            "facts": {
                "strata": values[row.example.id],
                "value": [round(said.value, 4) for said in row.said],
                "score": [said.score for said in row.said],
            },
        }
        for row in rows
    ]


def _said(said: Said, row: Row) -> dict[str, Any]:
    report = row.example.kind == "report"
    return {
        "text": said.text,
        "value": said.value,
        "right": said.value == 1,
        "recall": said.recall,
        "confidence": None if said.score is None else math.exp(min(0.0, said.score)),
        "pieces": word_difference(said.text, row.example.answer) if report else [],
    }
