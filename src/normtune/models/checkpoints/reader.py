"""Checkpoints on disk: tensors by name, each read from its file only when it is needed.

`Checkpoint` reads safetensors. `OriginalCheckpoint` also reads `.bin` files, for the importers.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from normtune.errors import InputError
from normtune.runtime.files import read_json

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
# (file, index) of each format, in the order in which transformers looks for them
FORMATS = ((SINGLE_FILE, INDEX_FILE), ("pytorch_model.bin", "pytorch_model.bin.index.json"))

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}

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


class OriginalCheckpoint:
    """A checkpoint whose tensors are read one at a time; nothing but their names and shapes is held.

    A `.bin` of the format before torch 1.6 can't be read in parts: one such file at a time is held.

    Raises:
        InputError: there are no weights, a shard is missing, or a file is damaged or holds more than tensors.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.files, places = _files(directory)
        self.entries: dict[str, Entry] = {}
        self._held: tuple[Path, Mapping[str, Tensor]] | None = None
        for file in self.files:
            for name, entry in self._listed(file).items():
                if places.get(name, file.name) == file.name:
                    self.entries[name] = entry
        lost = sorted(places.keys() - self.entries.keys())
        if lost:
            raise InputError(
                f"{directory / places[lost[0]]} lacks {some(lost)}, which the index promises. Copy it anew."
            )

    def tensor(self, name: str) -> Tensor:
        """One tensor; its memory is the file's own pages where the format allows it."""
        file = self.entries[name].file
        if file.suffix != ".safetensors":
            return self._bin(file)[name]
        return read_tensor(file, name)

    def _listed(self, file: Path) -> dict[str, Entry]:
        if file.suffix != ".safetensors":
            tensors = self._bin(file, "meta")
            return {
                name: Entry(file, CODES[tensor.dtype], tuple(tensor.shape), 0, tensor.nbytes)
                for name, tensor in tensors.items()
            }
        entries = read_header(file)
        for name, entry in entries.items():
            if entry.code not in DTYPES:
                raise InputError(
                    f"{file}: {name} is of type {entry.code}, which can't be imported. "
                    "Give a checkpoint that is not quantised."
                )
        return entries

    def _bin(self, file: Path, place: str = "cpu") -> Mapping[str, Tensor]:
        if self._held is not None and self._held[0] == file:
            return self._held[1]
        self._held = None
        try:
            try:
                found = torch.load(file, map_location=place, weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap" not in str(error):
                    raise
                found = torch.load(file, map_location="cpu", weights_only=True)
                self._held = (file, found)
        except OSError as error:
            raise InputError(f"cannot read {file}: {error.strerror or error}. Copy it anew.") from error
        except Exception as error:  # a damaged pickle can raise anything
            raise InputError(
                f"{file} is not a checkpoint that opens safely: it is damaged, or holds more than tensors. "
                "Copy it anew."
            ) from error
        if not isinstance(found, Mapping) or not all(isinstance(one, Tensor) for one in found.values()):
            raise InputError(f"{file} holds other things than tensors by name. Give a model's own weights.")
        return found


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
            header = handle.read(length)
        if len(header) < length:
            raise ValueError("the header is cut short")
        found = json.loads(header)
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


def _files(directory: Path) -> tuple[list[Path], dict[str, str]]:
    """(the weight files in order, tensor -> file as the index has it; empty without an index)."""
    for single, index in FORMATS:
        if (directory / single).is_file():
            return [directory / single], {}
        if (directory / index).is_file():
            places = read_json(directory / index)
            places = places.get("weight_map") if isinstance(places, dict) else None
            if not isinstance(places, dict) or not places:
                raise InputError(f"{directory / index} holds no weight_map. Copy it anew.")
            files = [directory / name for name in sorted(set(places.values()))]
            for file in files:
                if not file.is_file():
                    raise InputError(f"{file} is missing, but {index} names it. Copy it beside the others.")
            return files, places
    raise InputError(
        f"{directory} holds no weights ({', '.join(one for one, _ in FORMATS)}, or shards with an index). "
        "Give the directory of a whole checkpoint."
    )


def some(names: list[str]) -> str:
    """A few names, and how many there are."""
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
