"""Safetensors files written tensor by tensor and shard by shard; an interrupted run resumes.

Only one tensor is in memory at a time. A shard is hashed while it is written, renamed when it is complete, and
then entered in the progress record. On resume a shard counts as done if the record holds its hash and the file
still has that hash.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from normtune.errors import InputError
from normtune.models.checkpoints.reader import DTYPES, INDEX_FILE
from normtune.runtime.files import atomic_write, read_json, write_json

RECORD_FILE = "import_progress.json"
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_CHUNK = 1 << 24  # bytes hashed and written at a time

Tick = Callable[[int, int], None]


@dataclass(frozen=True)
class Planned:
    """A tensor to be written, and how to come by it; `origin` tells it apart from another of its shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    origin: str
    make: Callable[[], Tensor]

    @property
    def values(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * self.values


def write_safetensors(path: Path, tensors: Sequence[Planned]) -> str:
    """Write one safetensors file, making each tensor as its turn comes; returns the file's SHA-256.

    The format: the length of the header (8 bytes, little-endian), the header (JSON, filled up with blanks to
    a multiple of 8), the tensors' bytes one after another. Wider types are to come first, so that every
    tensor stands at a multiple of its size.

    Raises:
        OSError: as for any file.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for one in tensors:
        header[one.name] = {
            "dtype": _CODES[one.dtype],
            "shape": list(one.shape),
            "data_offsets": [end, end + one.bytes],
        }
        end += one.bytes
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    sha = hashlib.sha256()
    with open(path, "wb") as handle:
        for part in (len(head).to_bytes(8, "little"), head):
            sha.update(part)
            handle.write(part)
        for one in tensors:
            tensor = one.make()
            assert tensor.dtype == one.dtype and tuple(tensor.shape) == one.shape, one.name
            data: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
            for start in range(0, len(data), _CHUNK):
                sha.update(data[start : start + _CHUNK])
                handle.write(data[start : start + _CHUNK])
            del tensor, data
    return sha.hexdigest()


@dataclass(frozen=True)
class Shard:
    """A file to be written."""

    file: str
    tensors: tuple[Planned, ...]

    @property
    def bytes(self) -> int:
        return sum(one.bytes for one in self.tensors)


def cut(groups: Iterable[Sequence[Planned]], limit: int) -> list[Shard]:
    """OriginalCheckpoint of at most `limit` bytes (or of one larger tensor); none takes tensors of two groups."""
    pieces: list[list[Planned]] = []
    for group in groups:
        room = -1
        for one in group:
            if one.bytes > room:
                pieces.append([])
                room = limit
            pieces[-1].append(one)
            room -= one.bytes
    # of one shard the wider types come first, so that every tensor stands at a multiple of its size
    ordered = [sorted(piece, key=lambda one: -one.dtype.itemsize) for piece in pieces]
    count = len(ordered)
    return [
        Shard(f"model-{i:05d}-of-{count:05d}.safetensors", tuple(piece)) for i, piece in enumerate(ordered, 1)
    ]


class Record:
    """Which shards of one plan are done: file -> SHA-256, kept beside them.

    Raises:
        InputError: the directory holds shards of another plan.
    """

    def __init__(self, directory: Path, plan: str) -> None:
        self.directory, self.plan = directory, plan
        self.path = directory / RECORD_FILE
        self.done: dict[str, str] = {}
        if self.path.is_file():
            found = read_json(self.path)
            if not isinstance(found, dict) or found.get("plan") != plan:
                raise InputError(
                    f"{directory} holds part of an import of another checkpoint, or with other options. "
                    "Remove it to begin anew."
                )
            self.done = {file: sha for file, sha in found["shards"].items() if self._whole(file, sha)}

    def add(self, file: str, sha: str) -> None:
        self.done[file] = sha
        write_json(self.path, {"plan": self.plan, "shards": self.done})

    def _whole(self, file: str, sha: str) -> bool:
        path = self.directory / file
        return path.is_file() and digest(path) == sha


def plan_id(shards: Sequence[Shard], sources: Iterable[Path]) -> str:
    """A hash of what would be written and of the files it is read from (name, size, time of change)."""
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sources]
    tensors = [
        (shard.file, one.name, str(one.dtype), one.shape, one.origin)
        for shard in shards
        for one in shard.tensors
    ]
    return hashlib.sha256(json.dumps([stats, tensors]).encode()).hexdigest()


def write_shards(record: Record, shards: Sequence[Shard], tick: Tick | None = None) -> dict[str, str]:
    """Write the shards that are not done yet, and the index; file -> SHA-256.

    Raises:
        InputError: a file cannot be written; the shards before it are kept.
    """
    total = sum(len(shard.tensors) for shard in shards)
    count = 0
    for shard in shards:
        if shard.file not in record.done:
            record.add(shard.file, write_shard(record.directory / shard.file, shard.tensors))
        count += len(shard.tensors)
        if tick is not None:
            tick(count, total)
    places = {one.name: shard.file for shard in shards for one in shard.tensors}
    size = sum(shard.bytes for shard in shards)
    index: dict[str, Any] = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
    write_json(record.directory / INDEX_FILE, index)
    return {shard.file: record.done[shard.file] for shard in shards}


def write_shard(path: Path, tensors: Sequence[Planned]) -> str:
    """Write one safetensors file, whole or not at all; returns its SHA-256."""
    with atomic_write(path) as temporary:
        return write_safetensors(temporary, tensors)


def digest(path: Path) -> str:
    """The SHA-256 of a file."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
