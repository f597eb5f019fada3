"""A checkpoint's tensors by name: safetensors or `.bin`, one file or many, each read when asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from normtune.checkpoint import read_tensor
from normtune.errors import InputError
from normtune.files import read_json
from normtune.shards import DTYPES

# (file, index) of each format, in the order in which transformers looks for them
FORMATS = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies, and what it is."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]


class Shards:
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
            found = self._bin(file, "meta")
            return {name: Entry(file, one.dtype, tuple(one.shape)) for name, one in found.items()}
        entries = {}
        try:
            with safe_open(file, "pt") as handle:
                for name in handle.keys():  # noqa: SIM118  (it is no mapping)
                    part = handle.get_slice(name)
                    dtype = DTYPES.get(part.get_dtype())
                    if dtype is None:
                        raise InputError(
                            f"{file}: {name} is of type {part.get_dtype()}, which can't be imported. "
                            "Give a checkpoint that is not quantised."
                        )
                    entries[name] = Entry(file, dtype, tuple(part.get_shape()))
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"cannot read {file}: {reason}. Copy it anew.") from error
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


def local_directory(name: str) -> Path:
    """The directory of a checkpoint; files of a hub name are fetched into the hub's cache.

    Raises:
        InputError: there is no such directory, or nothing of that name can be had.
    """
    path = Path(name)
    if path.is_dir():
        return path
    if path.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise InputError(f"{name} is no directory. Give a checkpoint's directory or a hub name owner/name.")
    from huggingface_hub import list_repo_files, snapshot_download

    try:
        try:
            weights = (
                "*.safetensors" if any(f.endswith(".safetensors") for f in list_repo_files(name)) else "*.bin"
            )
        except (OSError, ValueError):  # no network: what the cache holds
            weights = "*.safetensors"
        return Path(snapshot_download(name, allow_patterns=["*.json", "tokenizer.model", weights]))
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise InputError(
            f"cannot get {name}: {reason}. Give a directory that holds it, or check the name."
        ) from error


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
