"""MMMU (Yue et al. 2023, arXiv 2311.16502): the questions of its five subjects of health and medicine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from normtune.data.reading.embedded_images import EmbeddedImages, embedded_image
from normtune.data.reading.row_reader import RowReader
from normtune.data.reading.sources import SourceRow, find_parquet_files, parquet_rows
from normtune.data.records import Dataset
from normtune.errors import InputError

LICENCE = "Apache-2.0 (its card); the images are from textbooks and exams"
SUBJECTS = (
    *("Basic_Medical_Science", "Clinical_Medicine", "Diagnostics_and_Laboratory_Medicine", "Pharmacy"),
    "Public_Health",
)
_SPLITS = {"dev": "train", "validation": "validate", "test": "test"}
_ID = re.compile(r"(dev|validation|test)_(\w+)_\d+")
_MARK = re.compile(r"<image (\d)>")
_HIDDEN = "the answer is not published"
_OTHER = "not a subject of health and medicine"


def read(root: Path, *, text_only: bool = False) -> Dataset:
    """Read the parquet files of the hub (MMMU/MMMU), SUBJECT/validation-*.parquet and so on, of the medical subjects.

    From the hub's card and from loaders of others, not from the files themselves: id (validation_Pharmacy_1), question
    with marks such as <image 1>, options (a list in Python's notation), explanation, image_1 to image_7 (inside the
    file), img_type, answer (a letter; "?" in test), topic_difficulty, question_type (multiple-choice or open),
    subfield. Files in the layout of lmms-lab/MMMU, with all subjects in one file, are read too.

    A question is about all of its images in order; a mark becomes [image 1]. Open questions are of kind open. dev, with
    five examples for prompts for each subject, is the split train. Rows without a published answer (test) and other
    subjects are left out and counted. Ids are `mmmu-<id>`.

    Raises:
        InputError: there is no parquet file of these subjects, a file is damaged, or no row can be used.
    """
    base, files = find_parquet_files(root)
    reader = RowReader("mmmu", text_only)
    by_subject = [file for file in files if file.parent.name in SUBJECTS]
    if by_subject and len(by_subject) < len(files):
        reader.notes.append(f"{len(files) - len(by_subject)} files of other subjects are not read")
    images = EmbeddedImages(base)
    for file in by_subject or files:
        name = file.relative_to(base).as_posix()
        for source in parquet_rows(file):
            if not isinstance(source.cells, dict) or not {"id", "question", "options", "answer"} <= source.cells.keys():
                raise InputError(f"{name} has not the columns id, question, options and answer of MMMU. Check --root.")
            _read_row(reader, name, source, images)
    for reason in (_HIDDEN, _OTHER):
        if reader.dropped[reason]:
            reader.notes.append(f"{reader.dropped[reason]} rows left out: {reason}")
    reader.check_repeats()
    return reader.build_dataset(images, LICENCE)


def _read_row(reader: RowReader, file: str, source: SourceRow, images: EmbeddedImages) -> None:
    cells = source.cells
    id = _ID.fullmatch(str(cells["id"]))
    split, subject = (_SPLITS[id[1]], id[2]) if id else ("test", "")
    row = reader.start_row(file, str(source.number), f"mmmu-{cells['id']}")
    reason = _OTHER if subject not in SUBJECTS else _HIDDEN if cells["answer"] in ("?", "") else ""
    if reason:
        reader.skip_unread(row.id, split, reason)
        return
    question = row.read_text("question", cells["question"], lines=True)
    cell = cells["options"]
    options, answer = row.read_choice(
        [_without_marks(cell) if isinstance(cell, str) else cell], cells["answer"], "letter"
    )
    row.finish(
        images=_image_keys(cells, source, images),
        question=_without_marks(question),
        answer=answer if options else row.read_text("answer", cells["answer"]),
        kind="open",
        split=split,
        meta={
            "language": "en",
            "subject": subject,
            "subfield": row.read_text("subfield", cells.get("subfield")),
            "difficulty": row.read_text("topic_difficulty", cells.get("topic_difficulty")),
        },
        options=options,
    )


def _image_keys(cells: dict[str, Any], source: SourceRow, images: EmbeddedImages) -> list[str]:
    assert source.location is not None  # rows of parquet files have one
    keys = []
    for column in (f"image_{number}" for number in range(1, 8)):
        data = embedded_image(cells.get(column))
        keys += [images.add(data, source.location, column)] if data is not None else []
    return keys


def _without_marks(text: str) -> str:
    """The text with [image 1] in place of <image 1>, which models could take for an image."""
    return _MARK.sub(r"[image \1]", text)
