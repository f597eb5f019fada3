"""Safetensors files written tensor by tensor: what is in memory is one tensor."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_CHUNK = 1 << 24  # bytes hashed and written at a time


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
