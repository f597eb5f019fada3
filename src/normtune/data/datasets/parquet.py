"""Parquet as the Hugging Face hub keeps datasets: image, question and answer columns, images inside."""

from __future__ import annotations

import hashlib
import os
import re
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from normtune.data.images import ImageFolder, open_image
from normtune.data.reading import Reading
from normtune.data.records import Dataset, Kind
from normtune.data.rows import is_yes_no, split_name, split_of_file
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
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_Place = tuple[Path, int, int]  # file, row group, row in it
_Cell = tuple[int, str, int]  # row in its group, column, index where the cell is a list


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
    reading = Reading(name, text_only)
    for file in files:
        _read_file(reading, images, file, shown_as=file.relative_to(base).as_posix())
    reading.check_images(base, inside=images)
    reading.check_repeats()
    return reading.dataset(images, licence)


class ParquetImages:
    """Opens images by key; encoded bytes of recently read row groups are kept, up to `memory_bytes`."""

    def __init__(self, base: Path, memory_bytes: int = 512 * 2**20) -> None:
        self.memory_bytes = memory_bytes
        self._folder = ImageFolder(base)
        self._places: dict[str, _Place] = {}
        self._members: dict[
            tuple[Path, int], list[tuple[_Cell, str]]
        ] = {}  # row group -> (cell, key) it is read for
        self._kept: OrderedDict[str, bytes] = OrderedDict()
        self._held = 0

    def __getstate__(self) -> dict[str, Any]:
        """Worker processes start with nothing kept."""
        return self.__dict__ | {"_kept": OrderedDict(), "_held": 0}

    def add(self, data: bytes, place: _Place, column: str = "image", index: int = 0) -> str:
        """Note where an image stands; `index` counts in a cell that is a list. Returns its key."""
        key = hashlib.sha1(data, usedforsecurity=False).hexdigest()
        if key not in self._places:
            self._places[key] = place
            self._members.setdefault(place[:2], []).append(((place[2], column, index), key))
        return key

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def __call__(self, key: str) -> Image.Image:
        if key not in self._places:
            return self._folder(key)  # a path, where the file holds paths
        file, _, row = self._places[key]
        return open_image(self._bytes(key), name=f"{file.name}, image of row {row}")

    def _bytes(self, key: str) -> bytes:
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        file, group, row = self._places[key]
        members = self._members[file, group]
        try:
            with pq.ParquetFile(file) as parquet:
                names = sorted({column for (_, column, _), _ in members})
                table = parquet.read_row_group(group, columns=names)
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"cannot read {file}: changed or damaged since it was opened.") from error
        for (member_row, column, index), member in members:
            cell = table.column(column)[member_row].as_py()
            data = image_bytes(cell[index] if isinstance(cell, list) else cell)
            if data is not None and member not in self._kept:
                self._kept[member] = data
                self._held += len(data)
        found = self._kept.get(key)
        if found is None:
            raise InputError(f"{file}: row {row} of row group {group} holds no image any more.")
        self._kept.move_to_end(key)
        while self._held > self.memory_bytes and len(self._kept) > 1:
            self._held -= len(self._kept.popitem(last=False)[1])
        return found


def parquet_files(root: Path) -> tuple[Path, list[Path]]:
    """(folder that paths are relative to, parquet files in it); `root` may be a hub name.

    Raises:
        InputError: there is none.
    """
    if root.is_file():
        return root.parent, [root]
    if not root.exists():
        root = _from_hub(root)
    files = sorted(path for path in root.rglob("*.parquet") if path.is_file())
    if not files:
        raise InputError(f"{root} holds no *.parquet file. Point --root at the folder that does.")
    return root, files


def _from_hub(root: Path) -> Path:
    hub_name = root.as_posix()
    if not _HUB_NAME.fullmatch(hub_name):
        raise InputError(
            f"{root} is missing. Give --root a parquet file, a folder, or a hub name owner/name."
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_name, repo_type="dataset", allow_patterns=["*.parquet"]))
    except Exception as error:  # the hub's client has a dozen kinds, from no network to no such name
        raise InputError(
            f"{hub_name} is no local folder, and cannot be had from the hub ({type(error).__name__}). "
            "Check the name, or give --root a folder with its parquet files."
        ) from error


def _read_file(reading: Reading, images: ParquetImages, file: Path, shown_as: str) -> None:
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


def table_rows(table: pa.Table) -> Iterator[dict[str, Any]]:
    """Rows as dicts, one at a time: a row group's images are not all made Python objects at once."""
    columns = {name: table.column(name) for name in table.column_names}
    return ({name: column[row].as_py() for name, column in columns.items()} for row in range(table.num_rows))


def _read_row(
    reading: Reading, images: ParquetImages, cells: dict[str, Any], place: _Place, number: int, shown_as: str
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


def _image_key(images: ParquetImages, cell: object, place: _Place) -> str:
    """SHA-1 of the image's bytes, or its path; empty where there is neither."""
    data = image_bytes(cell)
    if data:
        return images.add(data, place)
    path = cell.get("path") if isinstance(cell, dict) else cell
    return os.path.normpath(path) if isinstance(path, str) and path else ""


def image_bytes(cell: object) -> bytes | None:
    """The bytes of an image cell: {bytes, path} as on the hub, or bytes."""
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    return data if isinstance(data, bytes) else None
