"""MIMIC-CXR-VQA (Bae et al. 2023, arXiv 2310.18652): questions from 48 templates on images of MIMIC-CXR-JPG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from normtune.data.reading.row_reader import RowReader
from normtune.data.reading.tables import json_rows
from normtune.data.records import Dataset
from normtune.errors import InputError

LICENCE = "PhysioNet Credentialed Health Data License 1.5.0"
_FILES = {"train": "train.json", "validate": "valid.json", "test": "test.json"}
_FOLDERS = ("", "dataset", "mimiccxrvqa/dataset", "MIMIC-CXR-VQA/dataset")  # searched for these files
_IMAGES = ("files", "")
_KINDS = {"verify": "closed", "choose": "closed", "query": "open"}


def read(root: Path, *, text_only: bool = False) -> Dataset:
    """Read train.json, valid.json and test.json, with the images of MIMIC-CXR-JPG in files/.

    Checked against the script that writes the files (github.com/baeseongsu/mimic-cxr-vqa,
    dataset_builder/generate_answer.py) and its README: a list of objects with split, idx, image_id, image_path
    (p10/p10000032/s50414267/ID.jpg), subject_id, study_id, question, content_type, semantic_type (verify, choose,
    query) and answer, a list of texts in lower case. No file of the release itself was read.

    Several answers are joined by commas. A question without an answer (an empty list) is skipped and listed. Verify and
    choose are closed, query is open. Ids are `mimic-cxr-vqa-<split>-<idx>`.

    Raises:
        InputError: all files are missing or have no answers, a file holds no list, or no row can be used.
    """
    folder = next((root / name for name in _FOLDERS if any((root / name / f).is_file() for f in _FILES.values())), None)
    if folder is None:
        unfinished = any((root / name / "_train.json").is_file() for name in _FOLDERS)
        advice = "Run build_dataset.sh of the release first: it adds the answers." if unfinished else "Check --root."
        raise InputError(f"{root} holds none of {', '.join(_FILES.values())} of MIMIC-CXR-VQA. {advice}")
    reader = RowReader("mimic-cxr-vqa", text_only)
    for split, file in _FILES.items():
        if not (folder / file).is_file():
            reader.note_missing_split(file, split)
            continue
        for number, cells in json_rows(folder / file, file, "MIMIC-CXR-VQA"):
            _read_row(reader, file, number, cells, split)
    return reader.finish(root, _IMAGES, LICENCE)


def _read_row(reader: RowReader, file: str, number: int, cells: dict[str, Any], split: str) -> None:
    idx = cells.get("idx")
    row = reader.start_row(file, str(number), f"mimic-cxr-vqa-{split}-{idx if isinstance(idx, int | str) else number}")
    answers = cells.get("answer")
    texts = [row.read_text("answer", answer) for answer in (answers if isinstance(answers, list) else [answers])]
    answer = ", ".join(text for text in texts if text)
    kind = _KINDS.get(str(cells.get("semantic_type")))
    row.finish(
        images=(row.image_key(row.read_text("image_path", cells.get("image_path"))),),
        question=row.read_text("question", cells.get("question")),
        answer=answer,
        kind=row.read_kind(kind or "", answer),
        split=split,
        meta={
            "language": "en",
            "modality": "X-Ray",
            "patient_id": str(cells.get("subject_id") or ""),
            "study_id": str(cells.get("study_id") or ""),
            "content_type": row.read_text("content_type", cells.get("content_type")),
            "semantic_type": row.read_text("semantic_type", cells.get("semantic_type")),
        },
    )
