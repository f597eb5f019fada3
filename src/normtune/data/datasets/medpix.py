"""MedPix 2.0 (Siragusa et al. 2024, arXiv 2407.02994) as JSONL: CT and MR images with their descriptions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from normtune.data.images.files import ImageFolder
from normtune.data.reading.row_reader import RowReader
from normtune.data.reading.tables import json_objects
from normtune.data.records import Dataset, Problem
from normtune.errors import InputError

LICENCE = "none found: never redistribute"
_FILES = {"train": "train.jsonl", "validate": "dev.jsonl", "test": "test.jsonl"}
_NEEDED = ("id", "image", "report")
_META = {"modality": "type", "organ": "location", "plane": "plane", "protocol": "modality", "case": "case"}


def read(root: Path, *, text_only: bool = False) -> Dataset:
    """Read train.jsonl, dev.jsonl, test.jsonl and images/: one image and its report a line.

    Fields: id, image, report; case, type (CT or MR), plane, modality (the protocol), location. `meta` holds
    modality (the file's type), organ (its location), plane, protocol (its modality) and case. Ids are
    `medpix-<id>`. The splits are by case; a case that stands in two is listed.

    Raises:
        InputError: a file is missing, a line is no JSON object or lacks a field, an id comes twice.
    """
    present = {split: file for split, file in _FILES.items() if (root / file).is_file()}
    if not present:
        raise InputError(
            f"{root} holds none of {', '.join(_FILES.values())}: not MedPix's folder. "
            "Point --root at the folder that holds these and images/."
        )
    reading = RowReader("medpix", text_only)
    cases: dict[str, str] = {}
    for split, file in _FILES.items():
        if split not in present:
            mend = f"There is no split '{split}' without it."
            reading.problems.append(Problem(file, "", "file is missing", mend))
            continue
        for line, cells in json_objects(root / file):
            lacking = [field for field in _NEEDED if field not in cells]
            if lacking:
                raise InputError(f"{file}, row {line}: no {', '.join(lacking)}. Add what is missing.")
            _read_row(reading, file, line, cells, split)
            case = str(cells.get("case") or "")
            if case and cases.setdefault(case, split) != split:
                mend = "Kept: use --image-disjoint, or move the case."
                what = "its case stands in another split too"
                reading.problems.append(Problem(file, str(line), what, mend))
    reading.check_images(root)
    reading.check_repeats()
    return reading.dataset(ImageFolder(root), LICENCE)


def _read_row(reading: RowReader, file: str, line: int, cells: dict[str, Any], split: str) -> None:
    id = cells["id"] if isinstance(cells["id"], str) else ""
    row = reading.unique_row(file, str(line), id and f"medpix-{id}")
    row.finish(
        images=(row.image(row.text("image", cells["image"])),),
        question="",
        answer=row.prose("report", cells["report"]),
        kind="report",
        split=split,
        meta={"language": "en", **{key: row.text(field, cells.get(field)) for key, field in _META.items()}},
        answer_called="report",
    )
