"""Parquet files in the layout of the Hugging Face hub: columns image, question, answer; images inside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from normtune.data.reading.cells import is_yes_no, split_name, split_of_file
from normtune.data.reading.parquet_files import ParquetImages, RowLocation, find_parquet_files, image_bytes, iter_rows
from normtune.data.reading.row_reader import Row, RowReader
from normtune.data.records import Dataset, Kind
from normtune.data.splits import is_group_column
from normtune.errors import InputError

_NEEDED = ("image", "question", "answer")
_IDS = ("id", "qid")  # columns that may hold the id, the first that is filled counts
_KINDS = ("kind", "answer_type")  # columns that may hold the kind, likewise
# Column -> meta key.
_META = {"language": "language", "q_lang": "language", "modality": "modality", "organ": "organ"} | {
    "location": "organ",
    "image_organ": "organ",
    "content_type": "content_type",
    "question_type": "question_type",
}


def read(root: Path, *, name: str = "parquet", licence: str = "unknown", text_only: bool = False) -> Dataset:
    """Read a parquet file, all parquet files of a folder and its subfolders, or those of a hub dataset.

    Columns: image ({bytes, path} as on the hub, bytes, or a path relative to the file), question, answer.
    Optional: id or qid; kind or answer_type (open or closed; by default yes and no are closed); split (by
    default from the file's name, as in train-00000-of-00001.parquet, else from its folder's, else train); language
    or q_lang, modality, organ, and the columns that name patients, cases or studies.

    The key of an image inside a file is the SHA-1 of its bytes, so that equal images are one image. Images
    are read from the file again when they are opened; see `ParquetImages`.

    Args:
        root: a file, a folder, or a hub name owner/name.
        name: the dataset's name, for ids and messages.
        licence: licence of the data.
        text_only: keep rows with missing image files.

    Raises:
        InputError: there is no parquet file, a file is damaged or lacks a column, the path of an image is
            outside the folder, or no row can be used.
    """
    base, files = find_parquet_files(root)
    images = ParquetImages(base)
    reader = RowReader(name, text_only)
    for file in files:
        _read_file(reader, images, file, file_name=file.relative_to(base).as_posix())
    reader.check_images(base, embedded=images)
    reader.check_repeats()
    return reader.build_dataset(images, licence)


def _read_file(reader: RowReader, images: ParquetImages, file: Path, file_name: str) -> None:
    try:
        with pq.ParquetFile(file) as parquet:
            names = parquet.schema_arrow.names
            missing = [column for column in _NEEDED if column not in names]
            if missing:
                raise InputError(
                    f"{file} has no column {', '.join(missing)}; its columns are {', '.join(names)}. Rename them."
                )
            known = (*_NEEDED, *_IDS, *_KINDS, *_META, "split")
            columns = [column for column in names if column in known or is_group_column(column)]
            number = 0
            for group in range(parquet.num_row_groups):
                table = parquet.read_row_group(group, columns=columns)
                for row_in_group, cells in enumerate(iter_rows(table)):
                    location = (file, group, row_in_group)
                    _read_row(reader, images, cells, location, number, file_name)
                    number += 1
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{file} is not a parquet file, or is damaged. Fetch it again.") from error


def _read_row(
    reader: RowReader, images: ParquetImages, cells: dict[str, Any], location: RowLocation, number: int, file_name: str
) -> None:
    split = split_name(str(cells.get("split") or split_of_file(location[0])))
    stated_id = next((str(cells[column]) for column in _IDS if cells.get(column) not in (None, "")), None)
    id = stated_id or f"{split}-{len(reader.locations)}"
    row = reader.start_row(file_name, str(number), f"{reader.name}-{id}")
    answer = row.read_text("answer", cells["answer"], lines=True)
    stated_kind = next((cells[column] for column in _KINDS if cells.get(column)), None)
    kind: Kind = "closed" if is_yes_no(answer) else "open"
    if stated_kind is not None:
        kind = row.read_kind(row.read_text("answer_type", stated_kind), answer)
    row.finish(
        images=(_image_key(row, images, cells["image"], location),),
        question=row.read_text("question", cells["question"], lines=True),
        answer=answer,
        kind=kind,
        split=split,
        meta={key: str(cells[column]) for column, key in _META.items() if isinstance(cells.get(column), str)}
        | {
            column: str(value)
            for column, value in cells.items()
            if is_group_column(column) and isinstance(value, str | int)
        },
    )


def _image_key(row: Row, images: ParquetImages, cell: object, location: RowLocation) -> str:
    """The SHA-1 of the image's bytes, or else its path, or else ""."""
    data = image_bytes(cell)
    if data:
        return images.add(data, location)
    path = cell.get("path") if isinstance(cell, dict) else cell
    return row.image_key(path) if isinstance(path, str) else ""
