"""Your own data: a JSONL file of {"image", "question", "answer"[, "id", "kind", "split", ...]}."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from normtune.data.images.files import ImageFolder
from normtune.data.reading.cells import SPLITS, is_yes_no, split_name, text_of
from normtune.data.reading.row_reader import RowReader, missing_images
from normtune.data.reading.tables import Fault, json_lines
from normtune.data.records import Dataset, Example, Kind, Problem
from normtune.errors import InputError, did_you_mean

_FIELDS = ("image", "question", "answer", "id", "kind", "split")
_KINDS: tuple[Kind, ...] = ("open", "closed", "report")
_SHOWN = 5  # bad rows named in one error


def read(
    root: Path,
    *,
    strict: bool = True,
    image_root: Path | None = None,
    licence: str = "unknown",
    text_only: bool = False,
) -> Dataset:
    """Read one JSONL file, or all *.jsonl files of a folder.

    Each line is an object. `image` is a path, or a list of paths for a report of several views, relative to
    the file (or to `image_root`). `kind` is open, closed or report; without it, yes/no answers are closed and
    all others open. `split` defaults to the file's name where that is a split's, else train. A report may go
    without a question. All further fields of text or numbers become `meta`.

    Args:
        strict: raise an error that names the bad rows; otherwise they are left out and listed as problems.
        text_only: a missing image is listed, and its row kept.

    Raises:
        InputError: there is no such file, no usable row, or (strict) a bad row.
    """
    files = sorted(root.glob("*.jsonl")) if root.is_dir() else [root]
    if not files:
        raise InputError(f"{root} holds no *.jsonl file. Point --root at one.")
    reading = RowReader("jsonl", text_only)
    faults: list[Problem] = []
    folder = image_root or files[0].parent
    for file in files:
        for line, cells in json_lines(file):
            fault = cells if isinstance(cells, Fault) else _read_row(reading, file, line, cells)
            if fault is not None:
                faults.append(Problem(file.name, str(line), fault.what, fault.mend))
                reading.left_out.append(Example(f"{file.stem}-{line}", (), "", "", "open", _split_of(file)))
    if text_only:
        reading.check_images(folder)
    else:
        faults += _missing(reading, folder)
    if strict and faults:
        raise InputError(_told(faults))
    reading.problems += faults
    reading.check_repeats()
    return reading.dataset(ImageFolder(folder), licence)


def _read_row(reading: RowReader, file: Path, line: int, cells: Any) -> Fault | None:
    """Add the row, or say what is wrong with it."""
    try:
        if not isinstance(cells, dict):
            raise Fault("not a JSON object", 'Write {"image": ..., "question": ..., "answer": ...}.')
        kind = _kind(cells)
        images = _images(cells)
        question = "" if kind == "report" and not cells.get("question") else _filled(cells, "question")
        answer = _filled(cells, "answer")
        split = split_name(_filled(cells, "split")) if cells.get("split") else _split_of(file)
        id = _filled(cells, "id") if cells.get("id") not in (None, "") else f"{file.stem}-{line}"
        if id in reading.places:
            raise Fault("its id stands on an earlier row too", "Give each row an id of its own.")
    except Fault as fault:
        return fault
    reading.row(file.name, str(line), id).finish(
        images, question, answer, kind or ("closed" if is_yes_no(answer) else "open"), split, _meta(cells)
    )
    return None


def _filled(cells: dict[str, Any], field: str) -> str:
    """The text of a field that must have one."""
    if field not in cells:
        hint = did_you_mean(field, [key for key in cells if key not in _FIELDS])
        raise Fault(
            f"field '{field}' is missing{hint and hint.replace('did you mean', 'is it')}", f"Add '{field}'."
        )
    try:
        text, _ = text_of(cells[field])
    except InputError as error:
        raise Fault(f"{field} {error}", "Write it as text.") from error
    if not text:
        raise Fault(f"{field} is empty", "Fill it in, or remove the row.")
    return text


def _kind(cells: dict[str, Any]) -> Kind | None:
    if cells.get("kind") in (None, ""):
        return None
    word = _filled(cells, "kind").lower()
    for kind in _KINDS:
        if kind == word:
            return kind
    raise Fault(f"kind is unknown{did_you_mean(word, _KINDS)}", f"Known kinds: {', '.join(_KINDS)}.")


def _images(cells: dict[str, Any]) -> list[str]:
    """Image paths, normalised so that one file has one key."""
    value = cells.get("image")
    names = value if isinstance(value, list) and value else [value]
    if "image" not in cells:
        _filled(cells, "image")
    return [os.path.normpath(_filled({"image": name}, "image")) for name in names]


def _meta(cells: dict[str, Any]) -> dict[str, str]:
    extra = {key: value for key, value in cells.items() if key not in _FIELDS}
    return {key: str(value) for key, value in extra.items() if isinstance(value, str | int | float)}


def _split_of(file: Path) -> str:
    name = split_name(file.stem)
    return name if name in SPLITS else "train"


def _missing(reading: RowReader, folder: Path) -> list[Problem]:
    """Take out the rows whose image file is not there; one problem a row."""
    missing = missing_images(folder, (name for example in reading.examples for name in example.images))
    kept, faults = [], []
    for example in reading.examples:
        gone = [name for name in example.images if name in missing]
        if not gone:
            kept.append(example)
            continue
        reading.left_out.append(example)
        what = f"image '{gone[0]}' is missing"
        faults.append(Problem(*reading.places[example.id], what, f"Paths are taken from {folder}."))
    reading.examples = kept
    return faults


def _told(faults: list[Problem]) -> str:
    shown = " ".join(f"{fault.file}, line {fault.row}: {fault.message}" for fault in faults[:_SHOWN])
    more = f" And {len(faults) - _SHOWN} more bad rows." if len(faults) > _SHOWN else ""
    return shown + more
