"""ROCO (Pelka et al. 2018, doi:10.1007/978-3-030-01364-6_20), ROCOv2 and captions in their layouts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from normtune.data.images.files import ImageFolder
from normtune.data.reading.row_reader import RowReader
from normtune.data.reading.tables import csv_rows, file_bytes, find_table
from normtune.data.records import Dataset, Problem
from normtune.errors import InputError

LICENCE = "each image under its article's licence (licences.txt); ROCOv2 as a whole CC BY-NC-SA 4.0"
_SPLITS = {"train": ("train",), "validate": ("validation", "valid", "val"), "test": ("test",)}
_FREE = "CC"  # licences that begin with it are Creative Commons'


@dataclass(frozen=True)
class _Caption:
    file: str
    row: str
    id: str
    images: tuple[str, ...]  # paths below root, one of which should be there
    text: str


def read(root: Path, *, text_only: bool = False) -> Dataset:
    """Read captions as reports of one image each, from any of three layouts.

    - ROCO's repository: `data/<split>/radiology/captions.txt` (id, tab, caption) with `images/` beside it;
      images are named by id, or as licences.txt names them.
    - Kaggle's copy: `<split>/radiology<train|val|test>data.csv` (id, name, caption) and
      `<split>/radiology/images/`.
    - ROCOv2: `<split>_captions.csv` (ID, Caption) and `<split>/<ID>.jpg`.

    Only ROCO's `radiology` part is read. `meta` holds the licence of the image where licences.txt names it.
    Ids are `roco-<id>`.

    Raises:
        InputError: none of the layouts is there, a file is damaged or lacks a column, an id comes twice.
    """
    reading = RowReader("roco", text_only)
    found = False
    for split, names in _SPLITS.items():
        part = next((part for name in names if (part := _part(root, name)) is not None), None)
        if part is None:
            continue
        found = True
        captions, licences = part
        _read_split(reading, root, split, captions, licences)
    if not found:
        raise InputError(
            f"{root} holds neither data/train/radiology/captions.txt (ROCO), nor "
            "train/radiologytraindata.csv (Kaggle's copy), nor train_captions.csv (ROCOv2). "
            "Point --root at the folder that does."
        )
    reading.check_images(root)
    reading.check_repeats()
    return reading.dataset(ImageFolder(root), LICENCE)


_Part = tuple[Iterator[_Caption], dict[str, str]]  # captions, licence by id


def _part(root: Path, name: str) -> _Part | None:
    """The captions and licences of the split called `name`, in whichever layout is there."""
    short = {"validation": "val", "valid": "val"}.get(name, name)
    for base in (root / "data", root):
        folder = base / name / "radiology"
        if (folder / "captions.txt").is_file():
            named, licences = _licences(folder)
            return _text_captions(root, folder, named), licences
    for base in (root / "all_data", root):
        table = find_table(base / name, f"radiology{short}data.csv", "radiology*data.csv")
        if table is not None:
            return _csv_captions(root, table, base / name / "radiology" / "images", "name"), {}
    table = find_table(root, f"{name}_captions.csv")
    if table is not None:
        return _csv_captions(root, table, root / name, None), {}
    return None


def _read_split(
    reading: RowReader, root: Path, split: str, captions: Iterator[_Caption], licences: dict[str, str]
) -> None:
    unfree = 0
    file = ""
    for caption in captions:
        file = caption.file
        row = reading.unique_row(file, caption.row, caption.id and f"roco-{caption.id}")
        names = [row.image(name) for name in caption.images]
        licence = licences.get(caption.id, "")
        unfree += bool(licence) and not licence.startswith(_FREE)
        row.finish(
            images=([name for name in names if (root / name).is_file()] or names)[:1],
            question="",
            answer=row.prose("caption", caption.text),
            kind="report",
            split=split,
            meta={"language": "en", "licence": licence},
            answer_called="caption",
        )
    if unfree:
        what = f"{unfree} images are of articles without a Creative Commons licence"
        mend = "Kept: look at meta['licence'] before you pass any on."
        reading.problems.append(Problem(file, "", what, mend))


def _text_captions(root: Path, folder: Path, named: dict[str, str]) -> Iterator[_Caption]:
    """Lines of id, tab, caption; a line without an id goes on with the caption before it."""
    shown = (folder / "captions.txt").relative_to(root).as_posix()
    images = (folder / "images").relative_to(root).as_posix()
    rows: list[tuple[int, str, str]] = []
    text = file_bytes(folder / "captions.txt").decode("utf-8", errors="replace")
    for number, line in enumerate(text.split("\n"), start=1):
        id, tab, caption = line.partition("\t")
        if tab and id.strip():
            rows.append((number, id.strip(), caption))
        elif line.strip() and not rows:
            raise InputError(f"{shown}, row {number}: no id and tab before the caption. Fetch it again.")
        elif line.strip():
            rows[-1] = (rows[-1][0], rows[-1][1], f"{rows[-1][2]} {line}")
    for number, id, caption in rows:
        names = (f"{id}.jpg", *([named[id]] if id in named else []))
        yield _Caption(shown, str(number), id, tuple(f"{images}/{name}" for name in names), caption)


def _csv_captions(root: Path, table: Path, images: Path, name_column: str | None) -> Iterator[_Caption]:
    shown, below = table.relative_to(root).as_posix(), images.relative_to(root).as_posix()
    needed = ("id", "name", "caption") if name_column else ("ID", "Caption")
    for number, cells in csv_rows(table, needed):
        id = cells[needed[0]].strip()
        name = cells[name_column].strip() if name_column else f"{id}.jpg"
        yield _Caption(shown, str(number), id, (f"{below}/{name}",) if name else ("",), cells[needed[-1]])


def _licences(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """(image's name in its article's package, licence) by id, from licences.txt where it is there."""
    if not (folder / "licences.txt").is_file():
        return {}, {}
    rows = [cells for _, cells in csv_rows(folder / "licences.txt", ("ROCO_ID", "PMC_ID", "CC"))]
    return {row["ROCO_ID"]: row["PMC_ID"] for row in rows}, {row["ROCO_ID"]: row["CC"] for row in rows}
