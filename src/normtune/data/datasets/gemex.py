"""GEMeX (Liu et al. 2024, arXiv 2411.16778): grounded questions of four types on images of MIMIC-CXR-JPG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from normtune.data.reading.cells import split_of_file
from normtune.data.reading.row_reader import RowReader
from normtune.data.reading.tables import json_objects
from normtune.data.records import Dataset, Kind
from normtune.errors import InputError

LICENCE = "PhysioNet Credentialed Health Data License 1.5.0 (images); none found for the questions"
# Beginning of a file's name -> kind of its questions.
_KINDS: dict[str, Kind] = {
    "open_ended": "open",
    "closed_ended": "closed",
    "single_choice": "closed",
    "multi_choice": "closed",
}
_IMAGES = ("files", "images", "")


def read(root: Path, *, text_only: bool = False) -> Dataset:
    """Read the JSON-lines files of the hub (BoKelvin/GEMeX-VQA), with the images of MIMIC-CXR-JPG in files/.

    From the hub's list of files and from a loader of others, not from the files themselves:
    open_ended_question.jsonl, closed_ended_question.jsonl, single_choice_question.jsonl and
    multi_choice_question.jsonl, each line with q_id, image_path (p10/p10000032/s50414267/ID.jpg), question, answer (a
    text, or a list of letters), choices ("A: ..."), type, reason, visual_regions, visual_locations and ori_report.

    single_choice rows are of kind choice: their choices are options. In multi_choice, several choices can be right:
    they follow the question, one a line, the letters of the answer are joined by commas, and the rows stay closed. The
    split is that of the folder, as in test/, else train. `ori_report` is not read. Ids are
    `gemex-<type of question>-<q_id>`.

    Raises:
        InputError: all files are missing, a line is not a JSON object, or no row can be used.
    """
    files = [(file, name) for name in _KINDS for file in sorted(root.rglob(f"{name}_question*.jsonl"))]
    if not files:
        raise InputError(f"{root} holds no {', '.join(f'{name}_question.jsonl' for name in _KINDS)}. Check --root.")
    reader = RowReader("gemex", text_only)
    for file, name in files:
        for line, cells in json_objects(file):
            _read_row(reader, file.relative_to(root), name, line, cells)
    return reader.finish(root, _IMAGES, LICENCE)


def _read_row(reader: RowReader, file: Path, name: str, line: int, cells: dict[str, Any]) -> None:
    q_id = cells.get("q_id")
    row = reader.start_row(file.as_posix(), str(line), f"gemex-{name}-{line if q_id is None else q_id}")
    answers = cells.get("answer")
    texts = [row.read_text("answer", text) for text in (answers if isinstance(answers, list) else [answers])]
    choices = cells.get("choices")
    choices = choices if isinstance(choices, list) else []
    options: tuple[str, ...] = ()
    answer = ", ".join(text for text in texts if text)
    if name == "single_choice" and choices:
        options, answer = row.read_choice([choices], answer, "letter")
        choices = []
    lines = [cells.get("question"), *choices]
    image = row.image_key(row.read_text("image_path", cells.get("image_path")))
    parts = image.split("/")
    is_study = len(parts) >= 3
    row.finish(
        images=(image,),
        question="\n".join(text for text in (row.read_text("question", text) for text in lines) if text),
        answer=answer,
        kind=_KINDS[name],
        split=split_of_file(Path(file.parent.name) / "rows"),
        meta={
            "language": "en",
            "modality": "X-Ray",
            "patient_id": parts[-3] if is_study else "",
            "study_id": parts[-2] if is_study else "",
            "question_type": row.read_text("type", cells.get("type")),
        },
        options=options,
    )
