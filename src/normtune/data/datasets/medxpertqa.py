"""MedXpertQA MM (Zuo et al. 2025, arXiv 2501.18362): exam questions with images and five options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from normtune.data.reading.choices import without_options
from normtune.data.reading.row_reader import RowReader
from normtune.data.reading.tables import json_objects
from normtune.data.records import Dataset
from normtune.errors import InputError

LICENCE = "MIT"
# File -> split. The five rows of dev are examples for prompts.
_FILES = {"MM/dev.jsonl": "train", "MM/test.jsonl": "test", "medxpertqa_mm_input.jsonl": "test"}


def read(root: Path, *, text_only: bool = False) -> Dataset:
    """Read MM/dev.jsonl and MM/test.jsonl of the hub (TsinghuaC3I/MedXpertQA), with images/ from images.zip.

    Checked against all 2,000 rows of eval/data/medxpertqa/input/medxpertqa_mm_input.jsonl of
    github.com/TsinghuaC3I/MedXpertQA, which its script makes from the hub's rows: id, question, options, label, images,
    medical_task, body_system, question_type. From that script: the hub's rows have options as {"A": ...}, label as a
    letter, and images as names. Both forms are read.

    Each question ends with its options ("Answer Choices: (A) ..."); as they are options here, that list is removed.
    The hub's dev (5 rows) is the split train, as it holds examples for prompts. Text/ is not read: it has no images.
    Ids are `medxpertqa-<id>`.

    Raises:
        InputError: all files are missing, a line is not a JSON object, or no row can be used.
    """
    files = [(root / name, split) for name, split in _FILES.items() if (root / name).is_file()]
    if not files:
        raise InputError(f"{root} holds no {' or '.join(_FILES)}. Point --root at a copy of TsinghuaC3I/MedXpertQA.")
    reader = RowReader("medxpertqa", text_only)
    for file, split in files:
        for line, cells in json_objects(file):
            _read_row(reader, file.relative_to(root).as_posix(), line, cells, split)
    return reader.finish(root, ("images", ""), LICENCE)


def _read_row(reader: RowReader, file: str, line: int, cells: dict[str, Any], split: str) -> None:
    row = reader.start_row(file, str(line), f"medxpertqa-{cells.get('id') or line}")
    label = cells.get("label")
    label = label[0] if isinstance(label, list) and len(label) == 1 else label
    options, answer = row.read_choice([_field(cells.get("options"), "content")], label, "letter")
    names = _field(cells.get("images"), "image_path")
    names = names if isinstance(names, list) else [names]
    question = row.read_text("question", cells.get("question"), lines=True)
    row.finish(
        images=[row.image_key(row.read_text("images", name)) for name in names],
        question=without_options(question, options) if options else question,
        answer=answer,
        kind="open",
        split=split,
        meta={"language": "en"}
        | {name: row.read_text(name, cells.get(name)) for name in ("medical_task", "body_system", "question_type")},
        options=options,
    )


def _field(items: Any, name: str) -> Any:
    """One field of each object in a list; other lists and values as they are."""
    if not isinstance(items, list):
        return items
    return [item.get(name) if isinstance(item, dict) else item for item in items]
