"""Some images with their answers, where they are asked for and the data's licence lets one pass them on."""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from normtune.data.options import DataOptions
from normtune.data.registry import open_configured
from normtune.errors import InputError
from normtune.evaluation.results import read_run
from normtune.runtime.files import read_json
from normtune.studies.page.html import Child, Html, tag
from normtune.studies.page.results import Record, Results

if TYPE_CHECKING:
    from normtune.data.records import Example

Roots = Mapping[str, Path | None]

SHOWN = 6  # examples of a data set
SIDE = 320  # pixels of the longer side of an image
OPEN = (
    "Apache-2.0 (synthetic)",
    "CC0 1.0",
    "CC BY 4.0",
    "CC BY-SA 4.0",
)  # whole texts: "MIT (but ..." is not


def examples_section(study: Results, folder: Path, roots: Roots) -> tuple[str, str, list[Child]]:
    """The section of examples; a data set that may not be shown is named with its licence.

    `roots` says where data sets lie, by their names in the study's file.

    Raises:
        InputError: an evaluation's files are missing or damaged.
    """
    content: list[Child] = []
    for dataset, rows in _evaluations(study).items():
        terms = str(read_json(folder / rows[0]["folder"] / "metrics.json").get("licence") or "unknown")
        content.append(tag("h3", dataset))
        if terms not in OPEN:
            content.append(tag("p", f"Not shown: its licence is {terms}."))
            continue
        content.append(
            tag("p", f"Rows drawn at random, as the first run of each recipe answers them. Licence: {terms}.")
        )
        content.append(
            tag("ul", *_items(study, folder, dataset, rows, roots.get(dataset)), class_="examples")
        )
    return "examples", "Examples", content


def _evaluations(study: Results) -> dict[str, list[Record]]:
    """By data set, one evaluation a recipe: of its first seed, trained on it, and the frozen base's."""
    found: dict[str, dict[str, Record]] = {}
    for row in study.tables["evaluations"]:
        cell = study.done.get(row["key"])
        if cell is not None and row["role"] in ("in", "zero-shot") and float(cell.get("share") or 1) == 1:
            found.setdefault(row["dataset"], {}).setdefault(cell["recipe"], row)
    return {dataset: list(rows.values()) for dataset, rows in found.items()}


def _items(
    study: Results, folder: Path, dataset: str, rows: list[Record], root: Path | None
) -> Iterator[Html]:
    runs = {study.done[row["key"]]["recipe"]: read_run(folder / row["folder"])[:2] for row in rows}
    examples = next(iter(runs.values()))[0]
    drawn = random.Random(0).sample(sorted(examples, key=lambda one: one.id), min(SHOWN, len(examples)))
    pictures = _pictures(study, dataset, drawn, root)
    for example in drawn:
        answers = [
            tag("tr", tag("th", recipe, scope="row"), tag("td", texts.get(example.id, "")))
            for recipe, (_, texts) in runs.items()
        ]
        uri = pictures.get(example.id)
        yield tag(
            "li",
            tag("img", src=uri, alt="the image that was asked about") if uri else None,
            tag("p", example.question),
            tag("p", "Reference: ", tag("strong", example.answer)),
            tag("table", tag("tbody", *answers)),
        )


def _pictures(study: Results, dataset: str, examples: list[Example], root: Path | None) -> dict[str, str]:
    """The first image of each example as a data URI; none where the data are not here."""
    spec = dict((study.spec.get("datasets") or {}).get(dataset) or {}) | {"root": root}
    try:
        options = DataOptions.checked(**{k: v for k, v in spec.items() if k in DataOptions.model_fields})
        opened = open_configured(options)
        return {example.id: _uri(opened.open_image(example.images[0])) for example in examples}
    except InputError:
        return {}


def _uri(image: object) -> str:
    from PIL import Image

    assert isinstance(image, Image.Image)
    small = image.copy()
    small.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    small.save(buffer, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
