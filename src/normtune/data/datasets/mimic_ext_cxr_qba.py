"""MIMIC-Ext-CXR-QBA (Müller et al. 2025, doi:10.13026/8qmz-da41): 42 million questions on images of MIMIC-CXR."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from normtune.data.reading.cells import is_yes_no
from normtune.data.reading.row_reader import RowReader
from normtune.data.reading.tables import RowError, csv_rows, find_table, parse_json_lines
from normtune.data.records import Dataset
from normtune.data.split_names import split_name
from normtune.errors import InputError

LICENCE = "PhysioNet Credentialed Health Data License 1.5.0"
_IMAGES = ("files", "")
_ENDINGS = (".jpg", ".dcm")
_QUESTIONS = (".qa.json", ".qa.jsonl")
_METADATA = "question_image_metadata"
_KEYS = ("study_id", "question_id", "image_id")


def read(root: Path, *, text_only: bool = False) -> Dataset:
    """Read qa.zip (or the unpacked qa/), with the images of MIMIC-CXR-JPG in files/.

    Checked against the description of version 1.0.0 on PhysioNet ("Files and Structure") and against loaders of others,
    not against the files themselves: `p10/p10000032/s50414267.qa.json` holds patient_id, study_id and `questions`, with
    one object for each question: question_id, question, question_type and answers, a list of objects with text;
    `question_image_metadata` (.parquet or .csv.gz), in any subfolder, names patient_id, study_id, question_id and
    image_id. Without that table, each question is about all images of its study in files/, at most two.

    Questions that were taken out of these files are read too: *.qa.jsonl with one object in a line, a *.qa.json file
    with one object or a list of them. The fields patient_id and study_id of the object then name the study.

    The texts of the answers are joined by blanks; their `sub_answers` are not read. The splits are those of MIMIC-CXR
    (mimic-cxr-2.0.0-split.csv); without that file all rows are of train. Ids are `<study>-<question_id>`. Each question
    is a record in memory, about 1 kB: unpack a part of the studies if the whole does not fit.

    Raises:
        InputError: there is neither qa.zip nor qa/, a file is damaged, or no row can be used.
    """
    reader = RowReader("mimic-ext-cxr-qba", text_only)
    images_of, splits = _images_of_questions(reader, root), _splits(reader, root)
    study_images: dict[str, tuple[str, ...]] = {}
    for name, document in _documents(root):
        for number, cells in enumerate(_questions(name, document), start=1):
            patient, study = str(cells.get("patient_id") or ""), str(cells.get("study_id") or "")
            folder = f"{patient[:3]}/{patient}/{study}"
            question_id = str(cells.get("question_id") or number)
            row = reader.start_row(name, question_id, f"{study}-{question_id}")
            images = images_of.get((study, question_id))
            if images is None:
                if folder not in study_images:
                    study_images[folder] = _images_of_study(root, folder)
                images = study_images[folder]
            answers = cells.get("answers")
            answers = answers if isinstance(answers, list) else []
            parts = [part.get("text") for part in answers if isinstance(part, dict)]
            answer = " ".join(filter(None, (row.read_text("answer", part) for part in parts)))
            row.finish(
                images=[row.image_key(f"{folder}/{image}") for image in images] or [""],
                question=row.read_text("question", cells.get("question")),
                answer=answer,
                kind="closed" if is_yes_no(answer) else "open",
                split=splits.get(study, "train"),
                meta={
                    "language": "en",
                    "modality": "X-Ray",
                    "patient_id": patient,
                    "study_id": study,
                    "question_type": row.read_text("question_type", cells.get("question_type")),
                },
            )
    return reader.finish(root, _IMAGES, LICENCE)


def _documents(root: Path) -> Iterator[tuple[str, Any]]:
    """Yield (file name, JSON value) of each file of questions; JSON lines are a list."""
    if (root / "qa.zip").is_file():
        try:
            with zipfile.ZipFile(root / "qa.zip") as archive:
                for name in sorted(name for name in archive.namelist() if name.endswith(_QUESTIONS)):
                    yield name, _value(name, archive.read(name))
        except (zipfile.BadZipFile, OSError, EOFError) as error:
            raise InputError(f"{root / 'qa.zip'} is damaged. Fetch it again.") from error
        return
    files = sorted(path for path in (root / "qa").rglob("*.qa.json*") if path.name.endswith(_QUESTIONS))
    if not files:
        raise InputError(f"{root} holds neither qa.zip nor qa/p10/p10000032/s50414267.qa.json and the like.")
    for file in files:
        name = file.relative_to(root).as_posix()
        yield name, _value(name, file.read_bytes())


def _value(name: str, data: bytes) -> Any:
    if name.endswith(".jsonl"):
        lines = list(parse_json_lines(data, 1))
        for line, cells in lines:
            if isinstance(cells, RowError):
                raise InputError(f"{name}, row {line}: {cells.what}. {cells.fix}")
        return [cells for _, cells in lines]
    try:
        return json.loads(data)
    except ValueError as error:
        raise InputError(f"{name}: not valid JSON. Fetch the file again.") from error


def _questions(name: str, document: Any) -> list[dict[str, Any]]:
    """The questions of a file, each with the patient_id and study_id of the question, else of the file or its path."""
    if isinstance(document, dict) and "questions" not in document and "question" in document:
        document = [document]  # a file with one question
    questions = document.get("questions") if isinstance(document, dict) else document
    if not isinstance(questions, list):
        raise InputError(f"{name}: no list 'questions'. Fetch the file again.")
    *_, patient, file = ("", *name.split("/"))
    keys = {"patient_id": patient, "study_id": file.partition(".")[0]}
    if isinstance(document, dict):
        keys |= {key: document[key] for key in keys if document.get(key)}
    return [keys | (cells if isinstance(cells, dict) else {}) for cells in questions]


def _images_of_questions(reader: RowReader, root: Path) -> dict[tuple[str, str], tuple[str, ...]]:
    """(study, question_id) -> image files, by the release's metadata."""
    files = sorted(
        (file for ending in (".parquet", ".csv", ".csv.gz") for file in root.rglob(_METADATA + ending)),
        key=lambda file: len(file.parts),
    )
    if not files:
        reader.notes.append(f"without {_METADATA}.parquet, a question is about the images of its study, at most two")
        return {}
    if len(files) > 1:
        reader.notes.append(f"images of the questions: {files[0].relative_to(root)}, the first of {len(files)} tables")
    rows = _table_rows(files[0])
    images: dict[tuple[str, str], tuple[str, ...]] = {}
    for study, question, image in sorted(rows):
        images[study, question] = (*images.get((study, question), ()), f"{image}.jpg")
    return images


def _table_rows(file: Path) -> Iterable[tuple[str, str, str]]:
    """(study, question, image) of each row of the metadata."""
    if file.suffix != ".parquet":
        return ((cells["study_id"], cells["question_id"], cells["image_id"]) for _, cells in csv_rows(file, _KEYS))
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        columns = pq.read_table(file, columns=list(_KEYS)).to_pydict()
    except (pa.ArrowException, OSError, KeyError) as error:
        raise InputError(f"{file} has no columns study_id, question_id and image_id. Fetch it again.") from error
    return zip(*columns.values(), strict=True)


def _images_of_study(root: Path, folder: str) -> tuple[str, ...]:
    for name in _IMAGES:
        if (root / name / folder).is_dir():
            files = sorted(path.name for path in (root / name / folder).iterdir() if path.suffix in _ENDINGS)
            return tuple(files[:2])
    return ()


def _splits(reader: RowReader, root: Path) -> dict[str, str]:
    """Study -> split."""
    file = find_table(root, "mimic-cxr-2.0.0-split.csv")
    if file is None:
        reader.notes.append("without mimic-cxr-2.0.0-split.csv, all rows are of train")
        return {}
    return {f"s{cells['study_id']}": split_name(cells["split"]) for _, cells in csv_rows(file, ("study_id", "split"))}
