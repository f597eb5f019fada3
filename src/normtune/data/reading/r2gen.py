"""R2Gen's annotation.json (Chen et al. 2020, arXiv 2010.16056), as report generation is compared on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from normtune.data.reading.radiology import Sections, called
from normtune.data.reading.row_reader import RowReader
from normtune.errors import InputError
from normtune.runtime.files import read_json

FILE = "annotation.json"


def entries(root: Path) -> dict[str, list[dict[str, Any]]]:
    """Split as the file names it (train, val, test) -> its entries.

    Raises:
        InputError: the file is not of this layout.
    """
    file = root / FILE
    found = read_json(file)
    lists = found if isinstance(found, dict) else {}
    if not lists or not all(isinstance(rows, list) for rows in lists.values()):
        raise InputError(f"{file} holds no lists train, val and test. Use R2Gen's annotation.json.")
    for split, rows in lists.items():
        for number, cells in enumerate(rows, start=1):
            lacking = [key for key in ("id", "report", "image_path") if key not in _object(cells)]
            if lacking:
                where = f"{FILE}, row {split} {number}"
                raise InputError(f"{where}: no {', '.join(lacking)}. Use R2Gen's annotation.json.")
    return lists


def read_entries(reading: RowReader, root: Path, sections: Sections, **meta: str) -> None:
    """Add a row for each entry; its one or two `image_path` are relative to the image folder.

    Raises:
        InputError: another section than the findings is asked for, or see `entries`, `Reading.unique_row`,
            `Row.split` and `Row.image`.
    """
    if sections != "findings":
        raise InputError(
            f"{root / FILE} holds the findings alone. Use --sections findings, or the original reports."
        )
    for split, rows in entries(root).items():
        for number, cells in enumerate(rows, start=1):
            place = f"{split} {number}"
            row = reading.unique_row(FILE, place, f"{reading.name}-{_id(cells, place)}")
            names = cells["image_path"]
            names = names if isinstance(names, list) else [names]
            row.finish(
                images=[row.image(row.text("image_path", name)) for name in names],
                question="",
                answer=row.prose("report", cells["report"]),
                kind="report",
                split=row.split(split),
                meta={"language": "en", "patient": _text(cells.get("subject_id")), **meta},
                answer_called=called(sections),
            )


def _id(cells: dict[str, Any], place: str) -> str:
    id = _text(cells["id"]).strip()
    if not id:
        raise InputError(f"{FILE}, row {place}: its id is no text. Use R2Gen's annotation.json.")
    return id


def _text(value: Any) -> str:
    return str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""


def _object(cells: Any) -> dict[str, Any]:
    return cells if isinstance(cells, dict) else {}
