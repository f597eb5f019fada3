"""Finds parquet files, reads their rows, and opens the images inside them."""

from __future__ import annotations

import hashlib
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from normtune.data.images.files import ImageFolder, open_image
from normtune.errors import InputError

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")  # owner/name
RowLocation = tuple[Path, int, int]  # file, row group, row within the group
CellLocation = tuple[int, str, int]  # row within the group, column, index if the cell is a list


class ParquetImages:
    """Opens images by key. A key is the SHA-1 of the image's encoded bytes, so that equal images are one.

    An image is read from the file when it is opened. A row group can only be read as a whole, so the encoded
    bytes of all its images are cached, and the least recently used ones are dropped.

    Args:
        base: folder that image paths are relative to, for files that hold paths.
        memory_bytes: size of the cache.
    """

    def __init__(self, base: Path, memory_bytes: int = 512 * 2**20) -> None:
        self.memory_bytes = memory_bytes
        self._folder = ImageFolder(base)
        self._locations: dict[str, RowLocation] = {}
        # (file, row group) -> (cell, key) of each image in it
        self._images_of_group: dict[tuple[Path, int], list[tuple[CellLocation, str]]] = {}
        self._cache: OrderedDict[str, bytes] = OrderedDict()  # least recently used first
        self._cached_bytes = 0
        self._lock = threading.Lock()  # pictures are read by several threads

    def __getstate__(self) -> dict[str, Any]:
        """Worker processes start with an empty cache."""
        return {name: value for name, value in self.__dict__.items() if name != "_lock"} | {
            "_cache": OrderedDict(),
            "_cached_bytes": 0,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def add(self, data: bytes, location: RowLocation, column: str = "image", index: int = 0) -> str:
        """Register an image.

        Args:
            data: the image's encoded bytes.
            location: its row.
            column: its column.
            index: its index in the cell, if the cell is a list.

        Returns:
            The image's key.
        """
        key = hashlib.sha1(data, usedforsecurity=False).hexdigest()
        if key not in self._locations:
            self._locations[key] = location
            self._images_of_group.setdefault(location[:2], []).append(((location[2], column, index), key))
        return key

    def __contains__(self, key: object) -> bool:
        return key in self._locations

    def __call__(self, key: str) -> Image.Image:
        if key not in self._locations:
            return self._folder(key)  # not registered: the file holds paths, and the key is one
        file, _, row = self._locations[key]
        with self._lock:
            data = self._read_bytes(key)
        return open_image(data, name=f"{file.name}, image of row {row}")

    def _read_bytes(self, key: str) -> bytes:
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        file, group, row = self._locations[key]
        images = self._images_of_group[file, group]
        try:
            with pq.ParquetFile(file) as parquet:
                columns = sorted({column for (_, column, _), _ in images})
                table = parquet.read_row_group(group, columns=columns)
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"cannot read {file}: changed or damaged since it was opened.") from error
        for (image_row, column, index), image_key in images:
            cell = table.column(column)[image_row].as_py()
            data = image_bytes(cell[index] if isinstance(cell, list) else cell)
            if data is not None and image_key not in self._cache:
                self._cache[image_key] = data
                self._cached_bytes += len(data)
        requested = self._cache.get(key)
        if requested is None:
            raise InputError(f"{file}: row {row} of row group {group} has no image any more.")
        self._cache.move_to_end(key)
        while self._cached_bytes > self.memory_bytes and len(self._cache) > 1:  # keeps the requested image
            self._cached_bytes -= len(self._cache.popitem(last=False)[1])
        return requested


def find_parquet_files(root: Path) -> tuple[Path, list[Path]]:
    """Find the parquet files of a dataset; a dataset on the hub is downloaded.

    Args:
        root: a parquet file, a folder, or a hub name owner/name.

    Returns:
        The folder that image paths are relative to, and the parquet files in it and its subfolders.

    Raises:
        InputError: there is no parquet file, or the download fails.
    """
    if root.is_file():
        return root.parent, [root]
    if not root.exists():
        root = _from_hub(root)
    files = sorted(path for path in root.rglob("*.parquet") if path.is_file())
    if not files:
        raise InputError(f"{root} has no *.parquet file. Point --root at the folder that has them.")
    return root, files


def _from_hub(root: Path) -> Path:
    hub_name = root.as_posix()
    if not _HUB_NAME.fullmatch(hub_name):
        raise InputError(f"{root} does not exist. Give --root a parquet file, a folder, or a hub name owner/name.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_name, repo_type="dataset", allow_patterns=["*.parquet"]))
    except Exception as error:  # the hub's client raises a dozen types, from no network to an unknown name
        raise InputError(
            f"{hub_name} is not a local folder, and its download from the hub failed "
            f"({type(error).__name__}). Check the name, or give --root a folder with its parquet files."
        ) from error


def iter_rows(table: pa.Table) -> Iterator[dict[str, Any]]:
    """Yield rows as dicts, converted one by one: not all images of a row group are Python objects at once."""
    columns = {name: table.column(name) for name in table.column_names}
    return ({name: column[row].as_py() for name, column in columns.items()} for row in range(table.num_rows))


def image_bytes(cell: object) -> bytes | None:
    """The encoded image in a cell, which is {bytes, path} as on the hub, or bytes; None if there is none."""
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    return data if isinstance(data, bytes) else None
