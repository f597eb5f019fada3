"""Checkpoints on disk: tensors by name, each read from its file only when it is needed.

`Checkpoint` reads safetensors. `OriginalCheckpoint` also reads `.bin` files, for the importers.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from normtune.errors import InputError
from normtune.runtime.files import read_json

INDEX_FILE = "model.safetensors.index.json"  # of a checkpoint in several shards: tensor -> file
SINGLE_FILE = "model.safetensors"
# (single file, index of shards) of each format, in the order in which transformers looks for them
FORMATS = ((SINGLE_FILE, INDEX_FILE), ("pytorch_model.bin", "pytorch_model.bin.index.json"))

DTYPES = {  # dtype code in a safetensors header -> torch's dtype
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
DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}

_FLOAT_CODES = ("F64", "F32", "F16", "BF16")  # without float8, which only quantised checkpoints hold
_MAX_SPAN = 1 << 16  # bytes: `read_values` reads positions within such a span in one call


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor is stored, and its dtype and shape."""

    file: Path
    code: str  # its dtype code in safetensors, a key of `DTYPES`
    shape: tuple[int, ...]
    start: int  # offset of its first byte in the file; 0 in a `.bin`, which is not read by offset
    bytes: int

    @property
    def is_floating(self) -> bool:
        """Whether its values are plain floats; the values of a quantised tensor are not."""
        return self.code in _FLOAT_CODES

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.code]


class Checkpoint:
    """A safetensors checkpoint of one file or several shards; only the headers are kept in memory.

    Attributes:
        files: its weight files, sorted by name.
        entries: tensor name -> `TensorEntry`.

    Raises:
        InputError: the directory has no safetensors, or a file is missing, damaged or truncated.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.files, _ = _find_weight_files(directory, FORMATS[:1])
        if not self.files:
            raise InputError(f"{directory} holds no {SINGLE_FILE}: only safetensors can be merged. Convert it first.")
        self.entries: dict[str, TensorEntry] = {}
        for path in self.files:  # if two shards hold a tensor, the later shard is used, as in transformers
            self.entries |= read_header(path)

    def get_tensor(self, name: str) -> Tensor:
        """Read one tensor; it is memory-mapped from the file."""
        return read_tensor(self.entries[name].file, name)

    def read_values(self, name: str, positions: range) -> Tensor:
        """Read only some values of a tensor.

        Args:
            positions: indices into the flattened tensor.

        Returns:
            The values in the tensor's dtype: [len(positions)].

        Raises:
            InputError: the file cannot be read.
        """
        entry = self.entries[name]
        size = entry.dtype.itemsize
        data = bytearray()
        step = 1
        try:
            with open(entry.file, "rb", buffering=0) as handle:
                # positions that are close together: read the whole span at once and take every step-th value
                if len(positions) and (positions[-1] - positions[0] + 1) * size <= _MAX_SPAN:
                    handle.seek(entry.start + positions[0] * size)
                    data += handle.read((positions[-1] - positions[0] + 1) * size)
                    step = positions.step
                else:
                    for position in positions:
                        handle.seek(entry.start + position * size)
                        data += handle.read(size)
        except OSError as error:
            raise InputError(f"cannot read {entry.file}: {error.strerror or error}. Copy it again.") from error
        if not data:  # torch.frombuffer refuses an empty buffer
            return torch.empty(0, dtype=entry.dtype)
        return torch.frombuffer(data, dtype=entry.dtype)[::step]

    @property
    def dtype(self) -> torch.dtype:
        """The floating dtype that most of the bytes have; float32 if no tensor is floating."""
        sizes: Counter[str] = Counter()
        for entry in self.entries.values():
            if entry.is_floating:
                sizes[entry.code] += entry.bytes
        return DTYPES[sizes.most_common(1)[0][0]] if sizes else torch.float32


class OriginalCheckpoint:
    """A safetensors or `.bin` checkpoint that an importer converts; tensors are read one at a time.

    Only names and shapes are kept in memory. A `.bin` in the format before torch 1.6 cannot be read in parts:
    one such file at a time is kept whole.

    Attributes:
        files: its weight files, sorted by name.
        entries: tensor name -> `TensorEntry`, file by file.

    Raises:
        InputError: there are no weights, a shard is missing, or a file is damaged or holds more than tensors.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.files, file_names = _find_weight_files(directory)
        if not self.files:
            raise InputError(
                f"{directory} holds no weights ({', '.join(single for single, _ in FORMATS)}, or shards with "
                "an index). Give the directory of a complete checkpoint."
            )
        self.entries: dict[str, TensorEntry] = {}
        self._legacy_file: tuple[Path, Mapping[str, Tensor]] | None = None
        for file in self.files:
            for name, entry in self._read_entries(file).items():
                if file_names.get(name, file.name) == file.name:  # in the file that the index names
                    self.entries[name] = entry
        missing = sorted(file_names.keys() - self.entries.keys())
        if missing:
            raise InputError(
                f"{directory / file_names[missing[0]]} lacks {first_names(missing)}, which the index lists. "
                "Copy it again."
            )

    def get_tensor(self, name: str) -> Tensor:
        """Read one tensor; it is memory-mapped from the file where the format allows it."""
        file = self.entries[name].file
        if file.suffix != ".safetensors":
            return self._load_bin(file)[name]
        return read_tensor(file, name)

    def _read_entries(self, file: Path) -> dict[str, TensorEntry]:
        if file.suffix != ".safetensors":
            tensors = self._load_bin(file, "meta")
            return {
                name: TensorEntry(file, DTYPE_CODES[tensor.dtype], tuple(tensor.shape), 0, tensor.nbytes)
                for name, tensor in tensors.items()
            }
        entries = read_header(file)
        for name, entry in entries.items():
            if entry.code not in DTYPES:
                raise InputError(
                    f"{file}: {name} is of type {entry.code}, which cannot be imported. "
                    "Give a checkpoint that is not quantised."
                )
        return entries

    def _load_bin(self, file: Path, device: str = "cpu") -> Mapping[str, Tensor]:
        """The tensors of a `.bin` file: memory-mapped, or in memory if its format is older than torch 1.6."""
        if self._legacy_file is not None and self._legacy_file[0] == file:
            return self._legacy_file[1]
        self._legacy_file = None  # free the previous file before the next one is loaded
        try:
            try:
                content = torch.load(file, map_location=device, weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap" not in str(error):
                    raise
                content = torch.load(file, map_location="cpu", weights_only=True)
                self._legacy_file = (file, content)
        except OSError as error:
            raise InputError(f"cannot read {file}: {error.strerror or error}. Copy it again.") from error
        except Exception as error:  # a damaged pickle can raise anything
            raise InputError(
                f"{file} is not a checkpoint that opens safely: it is damaged, or holds more than tensors. "
                "Copy it again."
            ) from error
        if not isinstance(content, Mapping) or not all(isinstance(item, Tensor) for item in content.values()):
            raise InputError(f"{file} holds other things than tensors by name. Give the weights of a model.")
        return content


def read_tensor(file: Path, name: str) -> Tensor:
    """Read one tensor of a safetensors file, memory-mapped; an `InputError` if the file cannot be read."""
    try:
        with safe_open(file, "pt") as handle:
            return handle.get_tensor(name)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read {file}: {reason}. Copy it again.") from error


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Read the header of a safetensors file: tensor name -> `TensorEntry`.

    The format: the length of the header (8 bytes, little-endian), the header (JSON), the tensors' bytes. The
    header's offsets count from the end of the header.

    Raises:
        InputError: the file is not a safetensors file, or is shorter than its header claims.
    """
    try:
        with open(path, "rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            text = handle.read(length)
        if len(text) < length:
            raise ValueError("the header is truncated")
        header = json.loads(text)
        entries = {}
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = (8 + length + int(offset) for offset in entry["data_offsets"])
                entries[name] = TensorEntry(path, entry["dtype"], tuple(entry["shape"]), start, end - start)
        size = path.stat().st_size
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, MemoryError) as error:
        raise InputError(f"cannot read {path}: no safetensors file ({type(error).__name__}).") from error
    if any(entry.start + entry.bytes > size for entry in entries.values()):
        raise InputError(f"{path} is truncated: it ends before the tensors that it lists. Copy it again.")
    return entries


def _find_weight_files(
    directory: Path, formats: Sequence[tuple[str, str]] = FORMATS
) -> tuple[list[Path], dict[str, str]]:
    """Find the weight files of the first of `formats` that is present.

    Returns:
        The files, sorted by name (none if no format is present), and the index: tensor name -> file name
        (empty if there is a single file).
    """
    for single, index in formats:
        if (directory / single).is_file():
            return [directory / single], {}
        if (directory / index).is_file():
            content = read_json(directory / index)
            file_names = content.get("weight_map") if isinstance(content, dict) else None
            if not isinstance(file_names, dict) or not file_names:
                raise InputError(f"{directory / index} holds no weight_map. Copy it again.")
            files = [directory / name for name in sorted(set(file_names.values()))]
            for file in files:
                if not file.is_file():
                    raise InputError(f"{file} is missing, but {index} names it. Copy it to the other files.")
            return files, file_names
    return [], {}


def find_or_download(name: str) -> Path:
    """The directory of a checkpoint; a hub name is downloaded into the hub's cache.

    Args:
        name: a directory, or a hub name "owner/name".

    Raises:
        InputError: there is no such directory, or the download fails.
    """
    path = Path(name)
    if path.is_dir():
        return path
    if path.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise InputError(f"{name} is no directory. Give a checkpoint's directory or a hub name owner/name.")
    from huggingface_hub import list_repo_files, snapshot_download

    try:
        try:  # of the two formats only one is downloaded
            weights = "*.safetensors" if any(f.endswith(".safetensors") for f in list_repo_files(name)) else "*.bin"
        except (OSError, ValueError):  # no network: use what is in the cache
            weights = "*.safetensors"
        return Path(snapshot_download(name, allow_patterns=["*.json", "tokenizer.model", weights]))
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise InputError(f"cannot get {name}: {reason}. Give a directory that holds it, or check the name.") from error


def first_names(names: Sequence[str]) -> str:
    """The first three names as text, and how many more there are: "a, b, c and 4 more"."""
    text = ", ".join(names[:3])
    return text if len(names) <= 3 else f"{text} and {len(names) - 3} more"
