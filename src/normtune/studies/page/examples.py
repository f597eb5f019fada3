"""Examples on a study's page: some images with their answers, if the data's licence permits it."""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from normtune.data.options import DataOptions
from normtune.data.registry import open_configured
from normtune.errors import InputError
from normtune.evaluation.results import read_evaluation
from normtune.runtime.files import read_json
from normtune.studies.page.results import Record, Results

if TYPE_CHECKING:
    from normtune.data.records import Example

Roots = Mapping[str, Path | None]

EXAMPLES = 6  # examples shown of each data set
IMAGE_PIXELS = 320  # length of the longer side of an image
# Licences that permit publication, compared as whole texts: "MIT (but ...)" is not MIT.
OPEN_LICENCES = ("Apache-2.0 (synthetic)", "CC0 1.0", "CC BY 4.0", "CC BY-SA 4.0")


@dataclass(frozen=True)
class AnsweredExample:
    """An example with its image as a data URI (None if there is none) and each recipe's answer."""

    example: Example
    image: str | None
    answers: dict[str, str]


def read_examples(study: Results, folder: Path, roots: Roots) -> list[tuple[str, str, list[AnsweredExample]]]:
    """The examples of each data set: its name, a sentence, and the examples.

    A data set that may not be shown is named with its licence and has no examples.

    Args:
        roots: the folder of each data set, by its name in the study's file.

    Raises:
        InputError: an evaluation's files are missing or damaged.
    """
    sections: list[tuple[str, str, list[AnsweredExample]]] = []
    for dataset, rows in _example_evaluations(study).items():
        terms = str(read_json(folder / rows[0]["folder"] / "metrics.json").get("licence") or "unknown")
        if terms in OPEN_LICENCES:
            text = f"Random rows with the answers of each recipe's first run. Licence: {terms}."
            sections.append((dataset, text, _examples_of(study, folder, dataset, rows, roots.get(dataset))))
        else:
            sections.append((dataset, f"Not shown: its licence is {terms}.", []))
    return sections


def _example_evaluations(study: Results) -> dict[str, list[Record]]:
    """By data set, one evaluation of each recipe trained on it (its first seed) and of the frozen base."""
    rows_of: dict[str, dict[str, Record]] = {}
    for row in study.tables["evaluations"]:
        cell = study.finished.get(row["key"])
        if cell is not None and row["role"] in ("in", "zero-shot") and float(cell.get("share") or 1) == 1:
            rows_of.setdefault(row["dataset"], {}).setdefault(cell["recipe"], row)
    return {dataset: list(rows.values()) for dataset, rows in rows_of.items()}


def _examples_of(
    study: Results, folder: Path, dataset: str, rows: list[Record], root: Path | None
) -> list[AnsweredExample]:
    """Some examples of a data set with the answers of every recipe."""
    runs = {study.finished[row["key"]]["recipe"]: read_evaluation(folder / row["folder"]) for row in rows}
    texts = {recipe: run.texts for recipe, run in runs.items()}
    examples = next(iter(runs.values())).examples
    sample = random.Random(0).sample(sorted(examples, key=lambda example: example.id), min(EXAMPLES, len(examples)))
    images = _image_uris(study, dataset, sample, root)
    return [
        AnsweredExample(
            example, images.get(example.id), {recipe: answers.get(example.id, "") for recipe, answers in texts.items()}
        )
        for example in sample
    ]


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
