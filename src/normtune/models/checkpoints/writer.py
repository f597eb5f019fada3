"""Safetensors files written tensor by tensor and shard by shard; an interrupted run resumes.

Only one tensor is in memory at a time. A shard is hashed while it is written, renamed when it is complete,
and then entered in the progress file. On resume a shard counts as complete if the progress file holds its
hash and the file still has that hash.
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
from normtune.models.checkpoints.reader import DTYPE_CODES, INDEX_FILE
from normtune.runtime.files import atomic_write, file_sha256, read_json, write_json

PROGRESS_FILE = "import_progress.json"  # next to the shards while they are being written
_CHUNK_BYTES = 1 << 24  # hashed and written at a time

ProgressCallback = Callable[[int, int], None]  # (tensors written, tensors in all)


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor that will be written."""

    name: str
    # what `make` must return
    dtype: torch.dtype
    shape: tuple[int, ...]
    origin: str  # where its values come from, for `hash_plan`; never written to the file
    make: Callable[[], Tensor]  # computes or reads the tensor, when it is written

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * self.numel


@dataclass(frozen=True)
class Shard:
    """A safetensors file that will be written, and its tensors in their order in the file."""

    file: str
    tensors: tuple[PlannedTensor, ...]

    @property
    def bytes(self) -> int:
        return sum(tensor.bytes for tensor in self.tensors)


class ImportProgress:
    """The complete shards of one plan, recorded in `PROGRESS_FILE` next to them.

    Attributes:
        plan_hash: the hash of the plan, see `hash_plan`.
        done: file name of each complete shard -> SHA-256.

    Raises:
        InputError: the directory holds shards of another plan.
    """

    def __init__(self, directory: Path, plan_hash: str) -> None:
        self.directory, self.plan_hash = directory, plan_hash
        self.path = directory / PROGRESS_FILE
        self.done: dict[str, str] = {}
        if self.path.is_file():
            content = read_json(self.path)
            if not isinstance(content, dict) or content.get("plan") != plan_hash:
                raise InputError(
                    f"{directory} holds part of an import of another checkpoint, or with other options. "
                    "Remove it to start again."
                )
            # a shard that was damaged or removed since is written again
            shards = [(directory / file, sha) for file, sha in content["shards"].items()]
            self.done = {path.name: sha for path, sha in shards if path.is_file() and file_sha256(path) == sha}

    def add(self, file: str, sha256: str) -> None:
        self.done[file] = sha256
        write_json(self.path, {"plan": self.plan_hash, "shards": self.done})


def plan_shards(groups: Iterable[Sequence[PlannedTensor]], max_bytes: int) -> list[Shard]:
    """Distribute tensors over shards, in order.

    Args:
        groups: tensors that are read from the same source file; no shard holds tensors of two groups.
        max_bytes: size of a shard, unless a single tensor is larger.
    """
    shards: list[list[PlannedTensor]] = []
    for group in groups:
        free_bytes = -1  # the first tensor of a group starts a shard
        for tensor in group:
            if tensor.bytes > free_bytes:
                shards.append([])
                free_bytes = max_bytes
            shards[-1].append(tensor)
            free_bytes -= tensor.bytes
    # wider dtypes first: then the offset of every tensor is a multiple of its item size
    ordered = [sorted(shard, key=lambda tensor: -tensor.dtype.itemsize) for shard in shards]
    count = len(ordered)
    return [Shard(f"model-{i:05d}-of-{count:05d}.safetensors", tuple(shard)) for i, shard in enumerate(ordered, 1)]


def hash_plan(shards: Sequence[Shard], sources: Iterable[Path]) -> str:
    """A SHA-256 of the planned tensors and of the files that they are read from (name, size, mtime)."""
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sources]
    tensors = [
        (shard.file, tensor.name, str(tensor.dtype), tensor.shape, tensor.origin)
        for shard in shards
        for tensor in shard.tensors
    ]
    return hashlib.sha256(json.dumps([stats, tensors]).encode()).hexdigest()


def write_shards(
    progress: ImportProgress, shards: Sequence[Shard], on_progress: ProgressCallback | None = None
) -> dict[str, str]:
    """Write the shards that are not complete yet, then the index.

    Returns:
        File name of each shard -> SHA-256.

    Raises:
        InputError: a file cannot be written; the shards before it remain.
    """
    total = sum(len(shard.tensors) for shard in shards)
    count = 0
    for shard in shards:
        if shard.file not in progress.done:
            with atomic_write(progress.directory / shard.file) as temporary:
                sha256 = write_safetensors(temporary, shard.tensors)
            progress.add(shard.file, sha256)
        count += len(shard.tensors)
        if on_progress is not None:
            on_progress(count, total)
    file_names = {tensor.name: shard.file for shard in shards for tensor in shard.tensors}
    size = sum(shard.bytes for shard in shards)
    index: dict[str, Any] = {"metadata": {"total_size": size}, "weight_map": dict(sorted(file_names.items()))}
    write_json(progress.directory / INDEX_FILE, index)
    return {shard.file: progress.done[shard.file] for shard in shards}


def write_safetensors(path: Path, tensors: Sequence[PlannedTensor]) -> str:
    """Write one safetensors file, and make each tensor only when it is written; returns the file's SHA-256.

    The format: the length of the header (8 bytes, little-endian), the header (JSON, padded with blanks to a
    multiple of 8), the tensors' bytes one after another. Give tensors of wider dtypes first: then the offset
    of every tensor is a multiple of its item size.

    Raises:
        OSError: the file cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for planned in tensors:
        header[planned.name] = {
            "dtype": DTYPE_CODES[planned.dtype],
            "shape": list(planned.shape),
            "data_offsets": [end, end + planned.bytes],
        }
        end += planned.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    sha256 = hashlib.sha256()
    with open(path, "wb") as handle:
        for block in (len(text).to_bytes(8, "little"), text):
            sha256.update(block)
            handle.write(block)
        for planned in tensors:
            tensor = planned.make()
            assert tensor.dtype == planned.dtype and tuple(tensor.shape) == planned.shape, planned.name
            data: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
            for start in range(0, len(data), _CHUNK_BYTES):
                sha256.update(data[start : start + _CHUNK_BYTES])
                handle.write(data[start : start + _CHUNK_BYTES])
            del tensor, data  # so that only one tensor is alive when the next one is made
    return sha256.hexdigest()
