"""A cache of tensors on disk. Several runs may share it, and an interrupted run leaves no partial entry.

Each entry is one safetensors file, written atomically, with a digest of its values in the metadata. A damaged
entry is treated as missing, so that the caller computes and writes it again.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from normtune.errors import InputError
from normtune.runtime.files import atomic_write
from normtune.runtime.tensors import write_tensors

_DIGEST = "sha256"  # key of the digest in a file's metadata
_log = logging.getLogger(__name__)


class TensorCache:
    """A folder of entries; the caller chooses their names, for example a hash of the inputs.

    If the disk is full or read-only, the cache logs a warning and writes no more entries; the run continues.

    Args:
        folder: the folder, which is created if it is missing.

    Raises:
        InputError: the folder cannot be created.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.writable = True  # whether entries are still written
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"cannot create the cache {folder}: {error.strerror}. Choose another --cache, or remove it."
            ) from error

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def read(self, name: str) -> dict[str, Tensor] | None:
        """Read the tensors of an entry, on the CPU; None if it is missing or damaged."""
        try:
            with safe_open(self._path(name), "pt") as file:
                expected = (file.metadata() or {}).get(_DIGEST)
                # clone: the memory of a tensor from `get_tensor` is that of the mapped file
                tensors = {key: file.get_tensor(key).clone() for key in sorted(file.keys())}
        except (OSError, SafetensorError):
            return None
        return tensors if digest(tensors) == expected else None

    def write(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write an entry; an entry of the same name is replaced."""
        if not self.writable:
            return
        # clone: safetensors refuses tensors that share memory
        copies = {key: tensors[key].detach().cpu().contiguous().clone() for key in sorted(tensors)}
        try:
            with atomic_write(self._path(name)) as temporary:
                write_tensors(temporary, copies, {_DIGEST: digest(copies)})
        except InputError as error:
            self.writable = False
            _log.warning("cache %s: no more entries are written: %s", self.folder, error.__cause__ or error)


def digest(tensors: Mapping[str, Tensor], *words: str) -> str:
    """The SHA-256 of `words` and of the names, dtypes, shapes and values of tensors, as 64 hex digits.

    Any change of a name or of a bit changes it. Lengths are hashed too, so that ("ab", "c") and ("a", "bc")
    have different digests.
    """
    sha256 = hashlib.sha256()
    for word in words:
        sha256.update(f"{len(word)} {word}\n".encode())
    for name, tensor in _unwrap(tensors.items()):
        sha256.update(f"{len(name)} {name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha256.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha256.hexdigest()


def _unwrap(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Replace tensors of a wrapper class (torchao's quantised tensors) by the tensors inside them."""
    for name, tensor in tensors:
        wrapper: Any = tensor
        if hasattr(wrapper, "__tensor_flatten__"):
            inner_names, _ = wrapper.__tensor_flatten__()
            yield from _unwrap((f"{name}.{inner}", getattr(wrapper, inner)) for inner in inner_names)
        else:
            yield name, tensor
