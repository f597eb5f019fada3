"""MedPix 2.0 (Siragusa et al. 2024, arXiv 2407.02994) as JSONL: CT and MR images with their descriptions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from normtune.data.reading.row_reader import RowReader
from normtune.data.reading.tables import json_objects
from normtune.data.records import Dataset, Problem
from normtune.errors import InputError

LICENCE = "none found: never redistribute"
_FILES = {"train": "train.jsonl", "validate": "dev.jsonl", "test": "test.jsonl"}
_NEEDED = ("id", "image", "report")
# meta key -> field of the file
_META = {"modality": "type", "organ": "location", "plane": "plane", "protocol": "modality", "case": "case"}


def read(root: Path, *, text_only: bool = False) -> Dataset:
    """Read train.jsonl, dev.jsonl, test.jsonl and images/; each line is one image with its report.

    Fields of a line: id, image, report; case, type (CT or MR), plane, modality (the protocol), location.
    `meta` holds modality (the file's type), organ (its location), plane, protocol (its modality) and case.
    Ids are `medpix-<id>`. The splits are by case; a case in two splits is listed.

    Raises:
        InputError: all files are missing, a line is not a JSON object or lacks a field, or an id is repeated.
    """
    present = {split: file for split, file in _FILES.items() if (root / file).is_file()}
    if not present:
        raise InputError(
            f"{root} holds none of {', '.join(_FILES.values())}: not MedPix's folder. "
            "Point --root at the folder with these files and images/."
        )
    reader = RowReader("medpix", text_only)
    cases: dict[str, str] = {}
    for split, file in _FILES.items():
        if split not in present:
            reader.note_missing_split(file, split)
            continue
        for line, cells in json_objects(root / file):
            missing = [field for field in _NEEDED if field not in cells]
            if missing:
                raise InputError(f"{file}, row {line}: no {', '.join(missing)}. Add the missing fields.")
            _read_row(reader, file, line, cells, split)
            case = str(cells.get("case") or "")
            if case and cases.setdefault(case, split) != split:
                fix = "Kept. Use --image-disjoint, or move the case to one split."
                what = "its case is in another split too"
                reader.problems.append(Problem(file, str(line), what, fix))
    return reader.finish(root, ("",), LICENCE)


def _read_row(reader: RowReader, file: str, line: int, cells: dict[str, Any], split: str) -> None:
    id = cells["id"] if isinstance(cells["id"], str) else ""
    row = reader.start_unique_row(file, str(line), id and f"medpix-{id}")
    row.finish(
        images=(row.image_key(row.read_text("image", cells["image"])),),
        question="",
        answer=row.read_prose("report", cells["report"]),
        kind="report",
        split=split,
        meta={"language": "en", **{key: row.read_text(field, cells.get(field)) for key, field in _META.items()}},
        answer_name="report",
    )
