"""A model's safetensors on disk, by tensor name: one tensor, or some values of one, read when asked for."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from normtune.errors import InputError
from normtune.files import read_json
from normtune.shards import DTYPES

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

_FLOATS = ("F64", "F32", "F16", "BF16")
_RUN = 1 << 16  # bytes: values that stand this close together are read in one go


@dataclass(frozen=True)
class Entry:
    """A tensor of a safetensors file."""

    file: Path
    code: str  # safetensors' word for its dtype
    shape: tuple[int, ...]
    start: int  # of its bytes in the file
    bytes: int

    @property
    def floating(self) -> bool:
        """Whether its values are plain numbers; those of a quantised tensor are not."""
        return self.code in _FLOATS

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.code]


class Checkpoint:
    """The safetensors of a base; nothing but their headers is held.

    Raises:
        InputError: there are none, or a file is damaged or cut short.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        if (directory / SINGLE_FILE).is_file():
            names = [SINGLE_FILE]
        elif (directory / INDEX_FILE).is_file():
            names = sorted(set(read_json(directory / INDEX_FILE)["weight_map"].values()))
        else:
            raise InputError(
                f"{directory} holds no {SINGLE_FILE}: only safetensors can be merged. Convert it first."
            )
        self.files = [directory / name for name in names]
        self.entries: dict[str, Entry] = {}
        for path in self.files:  # a later shard's tensor of the same name counts, as in transformers
            self.entries |= read_header(path)

    def tensor(self, name: str) -> Tensor:
        """One tensor; its memory is the file's own pages."""
        return read_tensor(self.entries[name].file, name)

    def values(self, name: str, places: range) -> Tensor:
        """The values of a tensor that stand at `places` of its rows laid end to end; no others are read."""
        entry = self.entries[name]
        size = entry.dtype.itemsize
        data = bytearray()
        step = 1
        try:
            with open(entry.file, "rb", buffering=0) as handle:
                if len(places) and (places[-1] - places[0] + 1) * size <= _RUN:
                    handle.seek(entry.start + places[0] * size)
                    data += handle.read((places[-1] - places[0] + 1) * size)
                    step = places.step
                else:
                    for place in places:
                        handle.seek(entry.start + place * size)
                        data += handle.read(size)
        except OSError as error:
            raise InputError(f"cannot read {entry.file}: {error.strerror or error}. Copy it anew.") from error
        if not data:
            return torch.empty(0, dtype=entry.dtype)
        return torch.frombuffer(data, dtype=entry.dtype)[::step]

    @property
    def dtype(self) -> torch.dtype:
        """The floating dtype of most of the bytes."""
        sizes: Counter[str] = Counter()
        for entry in self.entries.values():
            if entry.floating:
                sizes[entry.code] += entry.bytes
        return DTYPES[sizes.most_common(1)[0][0]] if sizes else torch.float32


def read_tensor(file: Path, name: str) -> Tensor:
    """One tensor of a safetensors file; its memory is the file's own pages.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        with safe_open(file, "pt") as handle:
            return handle.get_tensor(name)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read {file}: {reason}. Copy it anew.") from error


def read_header(path: Path) -> dict[str, Entry]:
    """What a safetensors file holds: 8 bytes, the length of the JSON behind them; then the tensors.

    Raises:
        InputError: it is no such file, or shorter than it says.
    """
    try:
        with open(path, "rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            found = json.loads(handle.read(length))
        entries = {}
        for name, entry in found.items():
            if name != "__metadata__":
                start, end = (8 + length + int(offset) for offset in entry["data_offsets"])
                entries[name] = Entry(path, entry["dtype"], tuple(entry["shape"]), start, end - start)
        size = path.stat().st_size
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, MemoryError) as error:
        raise InputError(f"cannot read {path}: no safetensors file ({type(error).__name__}).") from error
    if any(entry.start + entry.bytes > size for entry in entries.values()):
        raise InputError(f"{path} is cut short: it ends before the tensors that it names. Copy it anew.")
    return entries
