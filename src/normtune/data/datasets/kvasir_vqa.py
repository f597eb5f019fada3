"""Kvasir-VQA (arXiv 2409.01437) and Kvasir-VQA-x1 (arXiv 2506.09958): questions on endoscopy images."""

from __future__ import annotations

from pathlib import Path

from normtune.data.datasets import table
from normtune.data.reading.sources import find_parquet_files
from normtune.data.records import Dataset
from normtune.errors import InputError

LICENCE = "CC BY-NC 4.0"


def read(root: Path, *, text_only: bool = False) -> Dataset:
    """Read the hub's parquet files, SimulaMet-HOST/Kvasir-VQA or SimulaMet/Kvasir-VQA-x1.

    Checked against the README of github.com/simula/Kvasir-VQA-x1: img_id, complexity, question, answer, original,
    question_class. From descriptions: Kvasir-VQA has image (inside the file), source, question, answer and img_id. The
    images of x1 are those of Kvasir-VQA, in files `IMG_ID.jpg` anywhere below `root`. No parquet file itself was read.

    Neither dataset labels open and closed questions: yes and no are closed. `meta` holds source, img_id, complexity and
    question_class if they are texts or numbers.

    Raises:
        InputError: there is no parquet file, it has other columns, or no row can be used.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    base, files = find_parquet_files(root)
    try:
        columns = pq.read_schema(files[0]).names
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{files[0]} is not a parquet file, or is damaged. Fetch it again.") from error
    if "question" not in columns or not {"image", "img_id"} & set(columns):
        raise InputError(f"{files[0]} has the columns {', '.join(columns)}: not those of Kvasir-VQA. Check --root.")
    image = "image=image" if "image" in columns else "image=img_id"
    source = root if root.is_file() else base
    return table.read(source, format="parquet", name="kvasir-vqa", columns=image, licence=LICENCE, text_only=text_only)
