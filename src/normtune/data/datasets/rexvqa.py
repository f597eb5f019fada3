"""ReXVQA (Pal et al. 2025, arXiv 2506.04353): multiple-choice questions on chest films of ReXGradient-160K."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from normtune.data.reading.row_reader import RowReader
from normtune.data.records import Dataset
from normtune.errors import InputError
from normtune.runtime.files import read_json

LICENCE = "ReXGradient-160K Non-Commercial Data Access and Use Agreement"
_FILES = {"train": "train_vqa_data.json", "validate": "valid_vqa_data.json", "test": "test_vqa_data.json"}
_FOLDERS = ("metadata", "QA_json", "")
_IMAGES = ("deid_png", "images/deid_png", "images", "")


def read(root: Path, *, text_only: bool = False) -> Dataset:
    """Read metadata/train_vqa_data.json, valid_vqa_data.json and test_vqa_data.json of the hub (rajpurkarlab/ReXVQA).

    The images are those of rajpurkarlab/ReXGradient-160K, in deid_png/. From loaders of others, not from the files
    themselves: each file is an object of question id -> row, with question, options ("A. Normal", ...),
    correct_answer (a letter), correct_answer_explanation, task_name, category, subcategory, ImagePath (a list such as
    ../deid_png/PATIENT/.../X.png), study_id and PatientID.

    The fields of the report (Findings, Impression, Indication, ...) and of the person are not read. Ids are
    `rexvqa-<question id>`.

    Raises:
        InputError: all files are missing, a file holds no object of rows, or no row can be used.
    """
    files = {
        split: next((path for folder in _FOLDERS if (path := root / folder / name).is_file()), None)
        for split, name in _FILES.items()
    }
    if not any(files.values()):
        raise InputError(f"{root} holds no metadata/{', '.join(_FILES.values())}. Check --root.")
    reader = RowReader("rexvqa", text_only)
    for split, file in files.items():
        if file is None:
            reader.note_missing_split(f"metadata/{_FILES[split]}", split)
            continue
        name, rows = file.relative_to(root).as_posix(), read_json(file)
        if not isinstance(rows, dict):
            raise InputError(f"{name} holds no object of question id and row. Use ReXVQA's original file.")
        for id, cells in rows.items():
            _read_row(reader, name, id, cells if isinstance(cells, dict) else {}, split)
    return reader.finish(root, _IMAGES, LICENCE)


def _read_row(reader: RowReader, file: str, id: str, cells: dict[str, Any], split: str) -> None:
    row = reader.start_row(file, id, f"rexvqa-{id}")
    options, answer = row.read_choice([cells.get("options")], cells.get("correct_answer"), "letter")
    paths = cells.get("ImagePath")
    names = [row.read_text("ImagePath", path) for path in (paths if isinstance(paths, list) else [paths])]
    fields = {"study_id": "study_id", "patient_id": "PatientID", "question_type": "task_name"}
    fields |= {"category": "category", "subcategory": "subcategory"}
    row.finish(
        images=[row.image_key(name.rpartition("deid_png/")[2]) for name in names],
        question=row.read_text("question", cells.get("question")),
        answer=answer,
        kind="open",
        split=split,
        meta={"language": "en", "modality": "X-Ray"}
        | {field: row.read_text(name, cells.get(name)) for field, name in fields.items()},
        options=options,
    )
