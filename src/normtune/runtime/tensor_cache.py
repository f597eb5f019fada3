"""Tensors on disk by name, which several runs may share and any may interrupt: what is there is whole.

One safetensors file an entry, written to a temporary name and renamed. It holds a digest of its values: an
entry that was damaged is read as absent, so that it is computed and written anew.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from normtune.errors import InputError
from normtune.runtime.files import atomic_write

_DIGEST = "sha256"
_log = logging.getLogger(__name__)


class TensorCache:
    """A folder of entries. Whoever reads and writes them agrees on what a name stands for.

    A disk that is full or read-only ends no run: the store says so once and takes no more entries.

    Raises:
        InputError: the folder cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.takes = True  # whether entries are still written
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"cannot make the cache {folder}: {error.strerror}. Choose another --cache, or leave it out."
            ) from error

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def read(self, name: str) -> dict[str, Tensor] | None:
        """The tensors of an entry, on the CPU; None where there is no whole one."""
        try:
            with safe_open(self._path(name), "pt") as file:
                told = (file.metadata() or {}).get(_DIGEST)
                found = {key: file.get_tensor(key).clone() for key in sorted(file.keys())}
        except (OSError, SafetensorError):
            return None
        return found if digest(found) == told else None

    def write(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Put an entry in the place of any of that name."""
        if not self.takes:
            return
        own = {key: tensors[key].detach().cpu().contiguous().clone() for key in sorted(tensors)}
        try:
            with atomic_write(self._path(name)) as temporary:
                save_file(own, temporary, metadata={"format": "pt", _DIGEST: digest(own)})
        except (InputError, SafetensorError) as error:
            self.takes = False
            _log.warning("cache %s takes no more, the run goes on: %s", self.folder, error.__cause__ or error)


def digest(tensors: Mapping[str, Tensor], *words: str) -> str:
    """64 hex digits of `words` and of all names, dtypes, shapes and values, to the bit."""
    found = hashlib.sha256()
    for word in words:
        found.update(f"{len(word)} {word}\n".encode())
    for name, tensor in _plain(tensors.items()):
        found.update(f"{len(name)} {name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _plain(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a class that wraps others (torchao's quantised ones) as those others."""
    for name, tensor in tensors:
        whole: Any = tensor
        if hasattr(whole, "__tensor_flatten__"):
            inner, _ = whole.__tensor_flatten__()
            yield from _plain((f"{name}.{one}", getattr(whole, one)) for one in inner)
        else:
            yield name, tensor
