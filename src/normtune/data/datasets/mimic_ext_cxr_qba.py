"""MIMIC-Ext-CXR-QBA (Müller et al. 2025, doi:10.13026/8qmz-da41): 42 million questions on images of MIMIC-CXR."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from normtune.data.reading.cells import is_yes_no
from normtune.data.reading.row_reader import RowReader
from normtune.data.reading.tables import csv_rows, find_table
from normtune.data.records import Dataset
from normtune.data.split_names import split_name
from normtune.errors import InputError

LICENCE = "PhysioNet Credentialed Health Data License 1.5.0"
_IMAGES = ("files", "")
_ENDINGS = (".jpg", ".dcm")
_METADATA = "question_image_metadata.parquet"


def read(root: Path, *, text_only: bool = False) -> Dataset:
    """Read qa.zip (or the unpacked qa/), with the images of MIMIC-CXR-JPG in files/.

    From loaders of others and the project page, not from the files themselves: `qa/p10/p10000032/s50414267.qa.json`
    holds `questions`, each with question_id, question and answers, a list of objects with text;
    `question_image_metadata.parquet`, in any subfolder, names patient_id, study_id, question_id and image_id.
    Without that file, each question is about all images of its study in files/, at most two.

    The texts of the answers are joined by blanks. The splits are those of MIMIC-CXR (mimic-cxr-2.0.0-split.csv);
    without that file all rows are of train. Ids are `<study>-<question_id>`. Each question is a record in
    memory, about 1 kB: unpack a part of the studies if the whole does not fit.

    Raises:
        InputError: there is neither qa.zip nor qa/, a file is damaged, or no row can be used.
    """
    reader = RowReader("mimic-ext-cxr-qba", text_only)
    images_of, splits = _images_of_questions(reader, root), _splits(reader, root)
    for name, patient, study, document in _documents(root):
        folder = f"{patient[:3]}/{patient}/{study}"
        of_study: tuple[str, ...] | None = None
        for number, cells in enumerate(document, start=1):
            cells = cells if isinstance(cells, dict) else {}
            question_id = str(cells.get("question_id") or number)
            row = reader.start_row(name, question_id, f"{study}-{question_id}")
            images = images_of.get((study, question_id))
            if images is None:
                of_study = _images_of_study(root, folder) if of_study is None else of_study
                images = of_study
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
                meta={"language": "en", "modality": "X-Ray", "patient_id": patient, "study_id": study},
            )
    opener = reader.find_images(root, _IMAGES)
    reader.check_repeats()
    return reader.build_dataset(opener, LICENCE)


def _documents(root: Path) -> Iterator[tuple[str, str, str, list[Any]]]:
    """Yield (file name, patient, study, questions) of each study."""
    if (root / "qa.zip").is_file():
        try:
            with zipfile.ZipFile(root / "qa.zip") as archive:
                for name in sorted(name for name in archive.namelist() if name.endswith(".qa.json")):
                    yield _document(name, archive.read(name))
        except (zipfile.BadZipFile, OSError, EOFError) as error:
            raise InputError(f"{root / 'qa.zip'} is damaged. Fetch it again.") from error
        return
    files = sorted((root / "qa").rglob("*.qa.json"))
    if not files:
        raise InputError(f"{root} holds neither qa.zip nor qa/p10/p10000032/s50414267.qa.json and the like.")
    for file in files:
        yield _document(file.relative_to(root).as_posix(), file.read_bytes())


def _document(name: str, data: bytes) -> tuple[str, str, str, list[Any]]:
    parts = name.split("/")
    try:
        questions = json.loads(data)["questions"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{name}: no list 'questions'. Fetch the file again.") from error
    if not isinstance(questions, list) or len(parts) < 2:
        raise InputError(f"{name}: no list 'questions'. Fetch the file again.")
    return name, parts[-2], parts[-1].removesuffix(".qa.json"), questions


def _images_of_questions(reader: RowReader, root: Path) -> dict[tuple[str, str], tuple[str, ...]]:
    """(study, question_id) -> image files, by the release's metadata."""
    file = next(iter(sorted(root.rglob(_METADATA))), None)
    if file is None:
        reader.notes.append(f"without {_METADATA}, a question is about the images of its study, at most two")
        return {}
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(file, columns=["study_id", "question_id", "image_id"]).to_pydict()
    except (pa.ArrowException, OSError, KeyError) as error:
        raise InputError(f"{file} has no columns study_id, question_id and image_id. Fetch it again.") from error
    images: dict[tuple[str, str], tuple[str, ...]] = {}
    for study, question, image in sorted(zip(*rows.values(), strict=True)):
        images[study, question] = (*images.get((study, question), ()), f"{image}.jpg")
    return images


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
