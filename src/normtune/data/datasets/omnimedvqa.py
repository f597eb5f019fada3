"""OmniMedVQA (Hu et al. 2024, arXiv 2402.09181): multiple-choice questions made from 73 classification datasets."""

from __future__ import annotations

from pathlib import Path

from normtune.data.reading.row_reader import RowReader
from normtune.data.reading.tables import json_rows
from normtune.data.records import Dataset
from normtune.errors import InputError

LICENCE = "that of each of its 73 source datasets"
_LETTERS = "ABCDEFGH"


def read(root: Path, *, text_only: bool = False) -> Dataset:
    """Read QA_information/Open-access/*.json and Restricted-access/*.json of the release, with Images/.

    From the hub's card (foreverbeliever/OmniMedVQA) and from loaders of others, not from the files themselves: each
    file is a list of dataset, question_id, question_type, question, gt_answer (the text of an option), image_path
    (Images/ACRIMA/Im002_ACRIMA.png), option_A, option_B, ... (two to four) and modality_type (`modality` in one row).

    The images of restricted datasets are not part of the release: their rows are skipped and listed as missing images.
    OmniMedVQA has no splits; as it is an evaluation set, all rows are of test. Ids are `omnimedvqa-<question_id>`.

    Raises:
        InputError: there is no such file, a file holds no list, or no row can be used.
    """
    files = sorted((root / "QA_information").rglob("*.json"))
    if not files:
        raise InputError(f"{root} holds no QA_information/Open-access/*.json. Point --root at the unpacked release.")
    reader = RowReader("omnimedvqa", text_only)
    for file in files:
        name = file.relative_to(root).as_posix()
        for number, cells in json_rows(file, name, "OmniMedVQA"):
            question_id = cells.get("question_id")
            row = reader.start_row(name, str(number), f"omnimedvqa-{question_id or f'{file.stem}-{number}'}")
            cells_of_options = [cells.get(f"option_{letter}") for letter in _LETTERS]
            options, answer = row.read_choice(cells_of_options, cells.get("gt_answer"), "text")
            row.finish(
                images=(row.image_key(row.read_text("image_path", cells.get("image_path"))),),
                question=row.read_text("question", cells.get("question")),
                answer=answer,
                kind="open",
                split="test",
                meta={
                    "language": "en",
                    "modality": row.read_text("modality_type", cells.get("modality_type") or cells.get("modality")),
                    "question_type": row.read_text("question_type", cells.get("question_type")),
                    "source": row.read_text("dataset", cells.get("dataset")),
                },
                options=options,
            )
    return reader.finish(root, ("",), LICENCE)
