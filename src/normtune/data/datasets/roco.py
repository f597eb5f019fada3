"""ROCO (Pelka et al. 2018, doi:10.1007/978-3-030-01364-6_20), ROCOv2 and captions in the same layouts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from normtune.data.reading.row_reader import RowReader
from normtune.data.reading.tables import csv_rows, file_bytes, find_table
from normtune.data.records import Dataset, Problem
from normtune.errors import InputError

LICENCE = "each image under its article's licence (licences.txt); ROCOv2 as a whole CC BY-NC-SA 4.0"
# Split -> the names of its folder or file.
_SPLITS = {"train": ("train",), "validate": ("validation", "valid", "val"), "test": ("test",)}
_CREATIVE_COMMONS = "CC"  # how Creative Commons licences begin


@dataclass(frozen=True)
class _Caption:
    """One row of any layout."""

    file: str
    row: str
    id: str
    images: tuple[str, ...]  # possible paths of the image, relative to root
    text: str


def read(root: Path, *, text_only: bool = False) -> Dataset:
    """Read captions as reports on one image each, from one of three layouts.

    - ROCO's repository: `data/<split>/radiology/captions.txt` (id, tab, caption) and `images/` in the same
      folder. An image file is named by its id, or as in licences.txt.
    - Kaggle's copy: `<split>/radiology<train|val|test>data.csv` (id, name, caption) and
      `<split>/radiology/images/`.
    - ROCOv2: `<split>_captions.csv` (ID, Caption) and `<split>/<ID>.jpg`.

    Only ROCO's `radiology` folder is read. `meta` holds the image's licence if licences.txt names it. Ids are
    `roco-<id>`.

    Raises:
        InputError: none of the layouts is present, a file is damaged or lacks a column, or an id is repeated.
    """
    reader = RowReader("roco", text_only)
    has_layout = False
    for split, names in _SPLITS.items():
        files = next((files for name in names if (files := _find_split(root, name)) is not None), None)
        if files is None:
            continue
        has_layout = True
        captions, licences = files
        _read_split(reader, root, split, captions, licences)
    if not has_layout:
        raise InputError(
            f"{root} holds neither data/train/radiology/captions.txt (ROCO), nor "
            "train/radiologytraindata.csv (Kaggle's copy), nor train_captions.csv (ROCOv2). "
            "Point --root at the folder with one of them."
        )
    return reader.finish(root, ("",), LICENCE)


_SplitFiles = tuple[Iterator[_Caption], dict[str, str]]  # captions; id -> licence


def _find_split(root: Path, name: str) -> _SplitFiles | None:
    """The captions and licences of the split named `name`, from the layout that is present; None if none is."""
    short = {"validation": "val", "valid": "val"}.get(name, name)
    for base in (root / "data", root):
        folder = base / name / "radiology"
        if (folder / "captions.txt").is_file():
            image_names, licences = _licences(folder)
            return _text_captions(root, folder, image_names), licences
    for base in (root / "all_data", root):
        table = find_table(base / name, f"radiology{short}data.csv", "radiology*data.csv")
        if table is not None:
            return _csv_captions(root, table, base / name / "radiology" / "images", "name"), {}
    table = find_table(root, f"{name}_captions.csv")
    if table is not None:
        return _csv_captions(root, table, root / name, None), {}
    return None


def _read_split(
    reader: RowReader, root: Path, split: str, captions: Iterator[_Caption], licences: dict[str, str]
) -> None:
    restricted = 0
    file = ""
    for caption in captions:
        file = caption.file
        row = reader.start_unique_row(file, caption.row, caption.id and f"roco-{caption.id}")
        names = [row.image_key(name) for name in caption.images]
        licence = licences.get(caption.id, "")
        restricted += bool(licence) and not licence.startswith(_CREATIVE_COMMONS)
        row.finish(
            images=([name for name in names if (root / name).is_file()] or names)[:1],
            question="",
            answer=row.read_prose("caption", caption.text),
            kind="report",
            split=split,
            meta={"language": "en", "licence": licence},
            answer_name="caption",
        )
    if restricted:
        what = f"{restricted} images are from articles without a Creative Commons licence"
        fix = "Kept. Look at meta['licence'] before you pass any on."
        reader.problems.append(Problem(file, "", what, fix))


def _text_captions(root: Path, folder: Path, image_names: dict[str, str]) -> Iterator[_Caption]:
    """Yield the captions of captions.txt (id, tab, caption). A line without an id continues a caption."""
    file_name = (folder / "captions.txt").relative_to(root).as_posix()
    images = (folder / "images").relative_to(root).as_posix()
    rows: list[tuple[int, str, str]] = []
    text = file_bytes(folder / "captions.txt").decode("utf-8-sig", errors="replace")
    for number, line in enumerate(text.split("\n"), start=1):
        id, tab, caption = line.partition("\t")
        if tab and id.strip():
            rows.append((number, id.strip(), caption))
        elif line.strip() and not rows:
            raise InputError(f"{file_name}, row {number}: no id and tab before the caption. Fetch it again.")
        elif line.strip():
            rows[-1] = (rows[-1][0], rows[-1][1], f"{rows[-1][2]} {line}")
    for number, id, caption in rows:
        names = (f"{id}.jpg", *([image_names[id]] if id in image_names else []))
        yield _Caption(file_name, str(number), id, tuple(f"{images}/{name}" for name in names), caption)


def _csv_captions(root: Path, table: Path, images: Path, name_column: str | None) -> Iterator[_Caption]:
    """Yield the captions of a CSV file: Kaggle's, with a column of image names, or ROCOv2's, without one."""
    file_name, image_folder = table.relative_to(root).as_posix(), images.relative_to(root).as_posix()
    needed = ("id", "name", "caption") if name_column else ("ID", "Caption")
    for number, cells in csv_rows(table, needed):
        id = cells[needed[0]].strip()
        name = cells[name_column].strip() if name_column else f"{id}.jpg"
        yield _Caption(file_name, str(number), id, (f"{image_folder}/{name}",) if name else ("",), cells[needed[-1]])


def _licences(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """(id -> image's name in its article's package, id -> licence) from licences.txt, if the file exists."""
    if not (folder / "licences.txt").is_file():
        return {}, {}
    rows = [cells for _, cells in csv_rows(folder / "licences.txt", ("ROCO_ID", "PMC_ID", "CC"))]
    return {row["ROCO_ID"]: row["PMC_ID"] for row in rows}, {row["ROCO_ID"]: row["CC"] for row in rows}
