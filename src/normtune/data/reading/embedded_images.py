"""Opens images that are inside data files or Python objects, instead of files of their own."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from normtune.data.images.files import ImageFolder, open_image
from normtune.errors import InputError

if TYPE_CHECKING:  # pyarrow takes half a second
    import pyarrow as pa

# (file, row group, row within the group); of rows that are Python objects, the file is None.
RowLocation = tuple[Path | None, int, int]


class EmbeddedImages:
    """Opens images by key. A key is the SHA-1 of the image's encoded bytes, so that equal images are one.

    An image is read again when it is opened. A row group of a parquet file can only be read as a whole, so the
    encoded bytes of all its images are cached, and the least recently used ones are dropped. Arrow files are mapped
    into memory. Any other key is the path of an image file.

    Attributes:
        folder: opens the keys that are paths.
        rows: the rows, if they are Python objects.
    """

    def __init__(
        self, base: Path, memory_bytes: int = 512 * 2**20, rows: Sequence[Mapping[str, Any]] | None = None
    ) -> None:
        self.memory_bytes = memory_bytes
        self.folder = ImageFolder(base)
        self.rows = rows
        # key -> row, column, and index if the cell is a list
        self._locations: dict[str, tuple[RowLocation, str, int]] = {}
        self._keys_of_group: dict[tuple[Path | None, int], list[str]] = {}  # (file, row group) -> its images
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

    def add(self, data: bytes | Image.Image, location: RowLocation, column: str = "image", index: int = 0) -> str:
        """Register an image.

        Args:
            data: the image's encoded bytes, or the opened image.
            location: its row.
            column: its column.
            index: its index in the cell, if the cell is a list.

        Returns:
            The image's key.
        """
        pixels = data if isinstance(data, bytes) else f"{data.mode}{data.size}".encode() + data.tobytes()
        key = hashlib.sha1(pixels, usedforsecurity=False).hexdigest()
        if key not in self._locations:
            self._locations[key] = location, column, index
            self._keys_of_group.setdefault(location[:2], []).append(key)
        return key

    def __contains__(self, key: object) -> bool:
        return key in self._locations

    def __call__(self, key: str) -> Image.Image:
        if key not in self._locations:
            return self.folder(key)  # not registered: the key is a path
        (file, _, row), column, index = self._locations[key]
        name = f"{file.name if file else 'data'}, image of row {row}"
        if file is not None and file.suffix != ".arrow":
            with self._lock:
                data = self._read_bytes(key)
            return open_image(data, name=name)
        if file is not None:
            cell = arrow_table(file).column(column)[row].as_py()
        else:
            assert self.rows is not None
            cell = self.rows[row][column]
        image = embedded_image(cell[index] if isinstance(cell, list) else cell)
        if image is None:
            raise InputError(f"{name}: there is no image any more.")
        return open_image(image, name=name)

    def _read_bytes(self, key: str) -> bytes:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        (file, group, row), _, _ = self._locations[key]
        assert file is not None
        cells = [(image_key, *self._locations[image_key]) for image_key in self._keys_of_group[file, group]]
        try:
            with pq.ParquetFile(file) as parquet:
                columns = sorted({column for _, _, column, _ in cells})
                table = parquet.read_row_group(group, columns=columns)
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"cannot read {file}: changed or damaged since it was opened.") from error
        for image_key, location, column, index in cells:
            cell = table.column(column)[location[2]].as_py()
            data = embedded_image(cell[index] if isinstance(cell, list) else cell)
            if isinstance(data, bytes) and image_key not in self._cache:
                self._cache[image_key] = data
                self._cached_bytes += len(data)
        requested = self._cache.get(key)
        if requested is None:
            raise InputError(f"{file}: row {row} of row group {group} has no image any more.")
        self._cache.move_to_end(key)
        while self._cached_bytes > self.memory_bytes and len(self._cache) > 1:  # keeps the requested image
            self._cached_bytes -= len(self._cache.popitem(last=False)[1])
        return requested


@lru_cache(maxsize=64)
def arrow_table(file: Path) -> pa.Table:
    """The rows of an Arrow file, mapped into memory: a cell is read when it is used.

    Raises:
        InputError: the file is missing or damaged.
    """
    import pyarrow as pa

    try:
        source = pa.memory_map(str(file))
        try:
            return pa.ipc.open_stream(source).read_all()
        except pa.ArrowInvalid:
            return pa.ipc.open_file(source).read_all()
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{file} is not an Arrow file, or is damaged. Write the dataset again.") from error


def embedded_image(cell: object) -> bytes | Image.Image | None:
    """The image in a cell, which is {bytes, path} as on the hub, bytes or an opened image; None if there is none."""
    data = cell.get("bytes") if isinstance(cell, Mapping) else cell
    return data if isinstance(data, bytes | Image.Image) else None
