"""Parquet as the Hugging Face hub keeps datasets: image, question and answer columns, images inside."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from normtune.data.reading.cells import is_yes_no, split_name, split_of_file
from normtune.data.reading.parquet_files import (
    ParquetImages,
    RowLocation,
    image_bytes,
    parquet_files,
    table_rows,
)
from normtune.data.reading.row_reader import RowReader
from normtune.data.records import Dataset, Kind
from normtune.errors import InputError

_NEEDED = ("image", "question", "answer")
_IDS = ("id", "qid")
_KINDS = ("kind", "answer_type")
_META = {"language": "language", "q_lang": "language", "modality": "modality", "organ": "organ"} | {
    "location": "organ",
    "image_organ": "organ",
    "content_type": "content_type",
    "question_type": "question_type",
}


def read(root: Path, *, name: str = "parquet", licence: str = "unknown", text_only: bool = False) -> Dataset:
    """Read a parquet file, all parquet files below a folder, or those of a hub dataset called `owner/name`.

    Columns: image ({bytes, path} as on the hub, bytes, or a path relative to the file), question, answer;
    optional id or qid, kind or answer_type (open/closed; without it yes/no answers are closed), split.
    Without a split column the file's name decides (train-00000-of-00001.parquet), then its folder's, then
    train.

    The key of an image inside the file is the SHA-1 of its bytes, so that equal images are one image. Images
    are read again from the file when they are opened; see `ParquetImages`.

    Raises:
        InputError: nothing is there, a file is damaged or lacks a column, or no row can be used.
    """
    base, files = parquet_files(root)
    images = ParquetImages(base)
    reading = RowReader(name, text_only)
    for file in files:
        _read_file(reading, images, file, shown_as=file.relative_to(base).as_posix())
    reading.check_images(base, inside=images)
    reading.check_repeats()
    return reading.dataset(images, licence)


def _read_file(reading: RowReader, images: ParquetImages, file: Path, shown_as: str) -> None:
    try:
        with pq.ParquetFile(file) as parquet:
            names = parquet.schema_arrow.names
            lacking = [column for column in _NEEDED if column not in names]
            if lacking:
                raise InputError(
                    f"{file} has no column {', '.join(lacking)}; its columns are {', '.join(names)}. "
                    "Rename them."
                )
            wanted = [column for column in (*_NEEDED, *_IDS, *_KINDS, *_META, "split") if column in names]
            row = 0
            for group in range(parquet.num_row_groups):
                table = parquet.read_row_group(group, columns=wanted)
                for within, cells in enumerate(table_rows(table)):
                    place = (file, group, within)
                    _read_row(reading, images, cells, place, row, shown_as)
                    row += 1
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{file} is no parquet file, or is damaged. Fetch it again.") from error


def _read_row(
    reading: RowReader,
    images: ParquetImages,
    cells: dict[str, Any],
    place: RowLocation,
    number: int,
    shown_as: str,
) -> None:
    split = split_name(str(cells.get("split") or split_of_file(place[0])))
    stated_id = next((str(cells[column]) for column in _IDS if cells.get(column) not in (None, "")), None)
    id = stated_id or f"{split}-{len(reading.places)}"
    row = reading.row(shown_as, str(number), f"{reading.name}-{id}")
    answer = row.text("answer", cells["answer"])
    stated = next((cells[column] for column in _KINDS if cells.get(column)), None)
    kind: Kind = "closed" if is_yes_no(answer) else "open"
    if stated is not None:
        kind = row.kind(row.text("answer_type", stated), answer)
    row.finish(
        images=(_image_key(images, cells["image"], place),),
        question=row.text("question", cells["question"]),
        answer=answer,
        kind=kind,
        split=split,
        meta={key: str(cells[column]) for column, key in _META.items() if isinstance(cells.get(column), str)},
    )


def _image_key(images: ParquetImages, cell: object, place: RowLocation) -> str:
    """SHA-1 of the image's bytes, or its path; empty where there is neither."""
    data = image_bytes(cell)
    if data:
        return images.add(data, place)
    path = cell.get("path") if isinstance(cell, dict) else cell
    return os.path.normpath(path) if isinstance(path, str) and path else ""
