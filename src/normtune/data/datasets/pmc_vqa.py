"""PMC-VQA (Zhang et al. 2023, arXiv 2305.10415): multiple-choice questions on figures of PubMed Central."""

from __future__ import annotations

from pathlib import Path

from normtune.data.reading.cells import split_of_file
from normtune.data.reading.row_reader import RowReader
from normtune.data.reading.tables import csv_rows
from normtune.data.records import Dataset
from normtune.errors import InputError

LICENCE = "CC BY-SA (its card); the articles are CC0 or CC BY"
_VERSIONS = (("train_2.csv", "test_2.csv"), ("train.csv", "test_clean.csv"), ("train.csv", "test.csv"))
_COLUMNS = ("Figure_path", "Question", "Choice A", "Choice B", "Choice C", "Choice D", "Answer")
_IMAGES = ("images", "figures", "images/figures", "images_2/figures", "")


def read(root: Path, *, text_only: bool = False) -> Dataset:
    """Read the CSV files of the hub (RadGenome/PMC-VQA, formerly xmcmic/PMC-VQA), with the images of its archives.

    From the hub's card and from loaders of others, not from the files themselves. Version 1 (train.csv, test.csv,
    test_clean.csv): Figure_path, Question, Answer (the text), Choice A to Choice D ("A:Focal uptake"), Answer_label.
    Version 2, figures of one panel (train_2.csv, test_2.csv): an index, Figure_path, Caption, Question, Choice A to D,
    Answer (the letter), split.

    Of a folder with both versions, version 2 is read; of version 1, test_clean.csv (2,000 verified questions) in place
    of test.csv. `root` may be one of the files. Captions are not read. Ids are `pmc-vqa-<file>-<row>`.

    Raises:
        InputError: there is no such file, a column is missing, or no row can be used.
    """
    files = [root] if root.is_file() else _files(root)
    reader = RowReader("pmc-vqa", text_only)
    others = sorted({path.name for path in files[0].parent.glob("t*.csv")} - {file.name for file in files})
    reader.notes.append(f"files: {', '.join(file.name for file in files)}")
    if others:
        reader.notes.append(f"not read: {', '.join(others)}. Give one of them as --root to read it")
    for file in files:
        for number, cells in csv_rows(file, _COLUMNS):
            row = reader.start_row(file.name, str(number), f"pmc-vqa-{file.stem}-{number}")
            letter = cells.get("Answer_label", cells["Answer"])
            options, answer = row.read_choice([cells[f"Choice {of}"] for of in "ABCD"], letter.strip(), "letter")
            row.finish(
                images=(row.image_key(cells["Figure_path"].strip()),),
                question=row.read_text("Question", cells["Question"].strip()),
                answer=answer,
                kind="open",
                split=split_of_file(Path(file.name)),
                meta={"language": "en"},
                options=options,
            )
    return reader.finish(files[0].parent, _IMAGES, LICENCE)


def _files(root: Path) -> list[Path]:
    """The files of the newest version that is complete, or else of all that are there."""
    for names in (*_VERSIONS, *((name,) for version in _VERSIONS for name in reversed(version))):
        files = [root / name for name in names]
        if all(file.is_file() for file in files):
            return files
    raise InputError(f"{root} holds no train_2.csv, test_2.csv, train.csv, test_clean.csv or test.csv. Check --root.")
