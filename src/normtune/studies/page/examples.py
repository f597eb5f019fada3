"""Examples on a study's page: some images with their answers, if the data's licence permits it."""

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

EXAMPLES = 6  # examples shown of each data set
IMAGE_PIXELS = 320  # length of the longer side of an image
# Licences that permit publication, compared as whole texts: "MIT (but ...)" is not MIT.
OPEN_LICENCES = ("Apache-2.0 (synthetic)", "CC0 1.0", "CC BY 4.0", "CC BY-SA 4.0")


def examples_section(study: Results, folder: Path, roots: Roots) -> tuple[str, str, list[Child]]:
    """The section of examples; a data set that may not be shown is named with its licence.

    Args:
        roots: the folder of each data set, by its name in the study's file.

    Raises:
        InputError: an evaluation's files are missing or damaged.
    """
    content: list[Child] = []
    for dataset, rows in _example_evaluations(study).items():
        terms = str(read_json(folder / rows[0]["folder"] / "metrics.json").get("licence") or "unknown")
        content.append(tag("h3", dataset))
        if terms not in OPEN_LICENCES:
            content.append(tag("p", f"Not shown: its licence is {terms}."))
            continue
        content.append(tag("p", f"Random rows with the answers of each recipe's first run. Licence: {terms}."))
        content.append(tag("ul", *_example_items(study, folder, dataset, rows, roots.get(dataset)), class_="examples"))
    return "examples", "Examples", content


def _example_evaluations(study: Results) -> dict[str, list[Record]]:
    """By data set, one evaluation of each recipe trained on it (its first seed) and of the frozen base."""
    rows_of: dict[str, dict[str, Record]] = {}
    for row in study.tables["evaluations"]:
        cell = study.finished.get(row["key"])
        if cell is not None and row["role"] in ("in", "zero-shot") and float(cell.get("share") or 1) == 1:
            rows_of.setdefault(row["dataset"], {}).setdefault(cell["recipe"], row)
    return {dataset: list(rows.values()) for dataset, rows in rows_of.items()}


def _example_items(study: Results, folder: Path, dataset: str, rows: list[Record], root: Path | None) -> Iterator[Html]:
    """A list item for each example: its image, question, reference and the answer of every recipe."""
    runs = {study.finished[row["key"]]["recipe"]: read_run(folder / row["folder"])[:2] for row in rows}
    examples = next(iter(runs.values()))[0]
    sample = random.Random(0).sample(sorted(examples, key=lambda example: example.id), min(EXAMPLES, len(examples)))
    images = _image_uris(study, dataset, sample, root)
    for example in sample:
        answers = [
            tag("tr", tag("th", recipe, scope="row"), tag("td", texts.get(example.id, "")))
            for recipe, (_, texts) in runs.items()
        ]
        uri = images.get(example.id)
        yield tag(
            "li",
            tag("img", src=uri, alt="the image that the question is about") if uri else None,
            tag("p", example.question),
            tag("p", "Reference: ", tag("strong", example.answer)),
            tag("table", tag("tbody", *answers)),
        )


def _image_uris(study: Results, dataset: str, examples: list[Example], root: Path | None) -> dict[str, str]:
    """The first image of each example as a data URI; an empty dict if the data set cannot be opened here."""
    spec = dict((study.spec.get("datasets") or {}).get(dataset) or {}) | {"root": root}
    try:
        options = DataOptions.checked(**{k: v for k, v in spec.items() if k in DataOptions.model_fields})
        data = open_configured(options)
        return {example.id: _to_data_uri(data.open_image(example.images[0])) for example in examples}
    except InputError:
        return {}


def _to_data_uri(image: object) -> str:
    """A PIL image as a PNG data URI of at most `IMAGE_PIXELS` a side."""
    from PIL import Image

    assert isinstance(image, Image.Image)
    thumbnail = image.copy()
    thumbnail.thumbnail((IMAGE_PIXELS, IMAGE_PIXELS))
    buffer = io.BytesIO()
    thumbnail.save(buffer, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
