"""MedPix-VQA: open questions made from the captions of MedPix 2.0, on the hub."""

from __future__ import annotations

from pathlib import Path

from normtune.data.datasets import table
from normtune.data.records import Dataset

LICENCE = "none found; adishourya/MEDPIX-ClinQA, which has the same columns, names Apache-2.0"


def read(root: Path, *, text_only: bool = False) -> Dataset:
    """Read the hub's parquet files, mmoukouba/MedPix-VQA; adishourya/MEDPIX-ClinQA has the same layout.

    From the card of adishourya/MEDPIX-ClinQA and from loaders of others, not from the files themselves: image_id (the
    image itself, inside the file), mode (the kind of the question), case_id, question, answer; 17,420 rows of train and
    3,080 of validation. Its questions have no options: yes and no are closed, all others open. A case has several
    images and questions: `case_id` names the rows that belong together.

    Raises:
        InputError: there is no parquet file, it has other columns, or no row can be used.
    """
    columns = "image=image_id,question=question,answer=answer"
    return table.read(root, format="parquet", name="medpix-vqa", columns=columns, licence=LICENCE, text_only=text_only)
