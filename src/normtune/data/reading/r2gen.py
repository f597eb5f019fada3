"""Reads R2Gen's annotation.json (Chen et al. 2020, arXiv 2010.16056), which papers use to compare reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from normtune.data.reading.radiology import Sections, section_label
from normtune.data.reading.row_reader import RowReader
from normtune.errors import InputError
from normtune.runtime.files import read_json

R2GEN_FILE = "annotation.json"


def load_entries(root: Path) -> dict[str, list[dict[str, Any]]]:
    """Load annotation.json: split, as the file names it (train, val, test) -> its entries.

    Raises:
        InputError: the file has another layout.
    """
    file = root / R2GEN_FILE
    content = read_json(file)
    lists = content if isinstance(content, dict) else {}
    if not lists or not all(isinstance(rows, list) for rows in lists.values()):
        raise InputError(f"{file} has no lists train, val and test. Use R2Gen's annotation.json.")
    for split, rows in lists.items():
        for number, cells in enumerate(rows, start=1):
            keys = cells if isinstance(cells, dict) else {}
            missing = [key for key in ("id", "report", "image_path") if key not in keys]
            if missing:
                where = f"{R2GEN_FILE}, row {split} {number}"
                raise InputError(f"{where}: no {', '.join(missing)}. Use R2Gen's annotation.json.")
    return lists


def read_entries(reader: RowReader, root: Path, sections: Sections, **meta: str) -> None:
    """Add a row for each entry of annotation.json.

    An entry has one or two images (`image_path`), with paths relative to the image folder.

    Args:
        root: folder of annotation.json.
        sections: must be "findings", as the file has no other section.
        **meta: further `meta` fields of each example.

    Raises:
        InputError: `sections` is not "findings", or a row is invalid (see `load_entries`,
            `RowReader.start_unique_row`, `Row.read_split` and `Row.image_key`).
    """
    if sections != "findings":
        raise InputError(
            f"{root / R2GEN_FILE} has only the findings. Use --sections findings, or the original reports."
        )
    for split, rows in load_entries(root).items():
        for number, cells in enumerate(rows, start=1):
            row_name = f"{split} {number}"
            row = reader.start_unique_row(R2GEN_FILE, row_name, f"{reader.name}-{_id(cells, row_name)}")
            names = cells["image_path"]
            names = names if isinstance(names, list) else [names]
            row.finish(
                images=[row.image_key(row.read_text("image_path", name)) for name in names],
                question="",
                answer=row.read_prose("report", cells["report"]),
                kind="report",
                split=row.read_split(split),
                meta={"language": "en", "patient": _text(cells.get("subject_id")), **meta},
                answer_name=section_label(sections),
            )


def _id(cells: dict[str, Any], row_name: str) -> str:
    id = _text(cells["id"]).strip()
    if not id:
        raise InputError(f"{R2GEN_FILE}, row {row_name}: its id is not text. Use R2Gen's annotation.json.")
    return id


def _text(value: Any) -> str:
    """A string or an integer as text, everything else as ""."""
    return str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""
