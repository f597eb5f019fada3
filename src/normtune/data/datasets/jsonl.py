"""The user's own data: JSONL rows {"image", "question", "answer"[, "id", "kind", "split", ...]}."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from normtune.data.images.files import ImageFolder
from normtune.data.reading.cells import SPLITS, clean_text, is_yes_no, split_name
from normtune.data.reading.row_reader import RowReader, check_image_path, known_kind, missing_images
from normtune.data.reading.tables import RowError, json_lines
from normtune.data.records import Dataset, Example, Problem
from normtune.errors import InputError, did_you_mean

# Fields with a meaning; all others become `meta`.
_FIELDS = ("image", "question", "answer", "id", "kind", "split")


def read(
    root: Path,
    *,
    strict: bool = True,
    image_root: Path | None = None,
    licence: str = "unknown",
    text_only: bool = False,
) -> Dataset:
    """Read one JSONL file, or all *.jsonl files of a folder.

    Each line is a JSON object. `image` is a path, which may be outside the folder, or a list of paths for a
    report on several views. `kind` is open, closed or report; by default yes and no are closed and all other
    answers open. `split` is by default the file's name if that is the name of a split, else train. A report
    needs no question. All other fields of text or numbers become `meta`.

    Args:
        root: a file or a folder.
        strict: raise an error that names the bad rows; otherwise skip them and list them as problems.
        image_root: folder that image paths are relative to; by default the file's folder.
        licence: licence of the data.
        text_only: keep rows with missing image files, and list the files.

    Raises:
        InputError: there is no such file, no usable row, or (strict) a bad row.
    """
    files = sorted(root.glob("*.jsonl")) if root.is_dir() else [root]
    if not files:
        raise InputError(f"{root} holds no *.jsonl file. Point --root at one.")
    reader = RowReader("jsonl", text_only)
    errors: list[Problem] = []
    folder = image_root or files[0].parent
    for file in files:
        for line, cells in json_lines(file):
            error = cells if isinstance(cells, RowError) else _read_row(reader, file, line, cells)
            if error is not None:
                errors.append(Problem(file.name, str(line), error.what, error.fix))
                reader.skip(Example(f"{file.stem}-{line}", (), "", "", "open", _split_of(file)), error.what)
    if text_only:
        reader.check_images(folder)
    else:
        errors += _skip_missing_images(reader, folder)
    reader.report_bad_rows(errors, "line", strict)
    reader.check_repeats()
    return reader.build_dataset(ImageFolder(folder), licence)


def _read_row(reader: RowReader, file: Path, line: int, cells: Any) -> RowError | None:
    """Add the row to the examples, or return the error that makes it unusable."""
    try:
        if not isinstance(cells, dict):
            raise RowError("not a JSON object", 'Write {"image": ..., "question": ..., "answer": ...}.')
        stated = cells.get("kind") not in (None, "")
        kind = known_kind(_required_text(cells, "kind").lower()) if stated else None
        images = _images(cells)
        question = "" if kind == "report" and not cells.get("question") else _required_text(cells, "question")
        answer = _required_text(cells, "answer")
        split = split_name(_required_text(cells, "split")) if cells.get("split") else _split_of(file)
        id = _required_text(cells, "id") if cells.get("id") not in (None, "") else f"{file.stem}-{line}"
        if id in reader.locations:
            raise RowError("its id is used by an earlier row", "Give each row its own id.")
    except RowError as error:
        return error
    reader.start_row(file.name, str(line), id).finish(
        images, question, answer, kind or ("closed" if is_yes_no(answer) else "open"), split, _meta(cells)
    )
    return None


def _required_text(cells: dict[str, Any], field: str) -> str:
    """The text of a field that must be present and not empty."""
    if field not in cells:
        hint = did_you_mean(field, [key for key in cells if key not in _FIELDS])
        raise RowError(f"field '{field}' is missing{hint and hint.replace('did you mean', 'is it')}", f"Add '{field}'.")
    try:
        text, _ = clean_text(cells[field], lines=field in ("question", "answer"))
    except InputError as error:
        raise RowError(f"{field} {error}", "Write it as text.") from error
    if not text:
        raise RowError(f"{field} is empty", "Fill it in, or remove the row.")
    return text


def _images(cells: dict[str, Any]) -> list[str]:
    """The row's image keys: paths, normalised so that one file has one key."""
    value = cells.get("image")
    names = value if isinstance(value, list) and value else [value]
    if "image" not in cells:
        _required_text(cells, "image")
    paths = [_required_text({"image": name}, "image") for name in names]
    for number, path in enumerate(paths, start=1):
        check_image_path(f"image {number}", path)
    return [os.path.normpath(path) for path in paths]


def _meta(cells: dict[str, Any]) -> dict[str, str]:
    extra = {key: value for key, value in cells.items() if key not in _FIELDS}
    return {key: str(value) for key, value in extra.items() if isinstance(value, str | int | float)}


def _split_of(file: Path) -> str:
    name = split_name(file.stem)
    return name if name in SPLITS else "train"


def _skip_missing_images(reader: RowReader, folder: Path) -> list[Problem]:
    """Skip the rows with missing image files; return one problem for each of them."""
    missing = missing_images(folder, (name for example in reader.examples for name in example.images))
    usable, errors = [], []
    for example in reader.examples:
        missing_here = [name for name in example.images if name in missing]
        if not missing_here:
            usable.append(example)
            continue
        reader.skip(example, "image is missing")
        what = f"image '{missing_here[0]}' is missing"
        errors.append(Problem(*reader.locations[example.id], what, f"Paths are relative to {folder}."))
    reader.examples = usable
    return errors
