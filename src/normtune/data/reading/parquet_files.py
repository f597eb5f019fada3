"""Parquet files as tables, and the images inside them."""

from __future__ import annotations

import hashlib
import re
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from normtune.data.images.files import ImageFolder, open_image
from normtune.errors import InputError

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
RowLocation = tuple[Path, int, int]  # file, row group, row in it
CellLocation = tuple[int, str, int]  # row in its group, column, index where the cell is a list


class ParquetImages:
    """Opens images by key; encoded bytes of recently read row groups are kept, up to `memory_bytes`."""

    def __init__(self, base: Path, memory_bytes: int = 512 * 2**20) -> None:
        self.memory_bytes = memory_bytes
        self._folder = ImageFolder(base)
        self._places: dict[str, RowLocation] = {}
        self._members: dict[
            tuple[Path, int], list[tuple[CellLocation, str]]
        ] = {}  # row group -> (cell, key) it is read for
        self._kept: OrderedDict[str, bytes] = OrderedDict()
        self._held = 0

    def __getstate__(self) -> dict[str, Any]:
        """Worker processes start with nothing kept."""
        return self.__dict__ | {"_kept": OrderedDict(), "_held": 0}

    def add(self, data: bytes, place: RowLocation, column: str = "image", index: int = 0) -> str:
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


def table_rows(table: pa.Table) -> Iterator[dict[str, Any]]:
    """Rows as dicts, one at a time: a row group's images are not all made Python objects at once."""
    columns = {name: table.column(name) for name in table.column_names}
    return ({name: column[row].as_py() for name, column in columns.items()} for row in range(table.num_rows))


def image_bytes(cell: object) -> bytes | None:
    """The bytes of an image cell: {bytes, path} as on the hub, or bytes."""
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    return data if isinstance(data, bytes) else None
