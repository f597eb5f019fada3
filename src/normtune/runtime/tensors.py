"""Tensors: written to files, and a workaround for torch.compile."""

from __future__ import annotations

import stat
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors to a new safetensors file, with the mode that the umask gives to any new file.

    `save_file` alone creates its files with mode 600: other accounts, such as that of a server, could not
    read them.

    Args:
        metadata: further entries of the file's metadata.

    Raises:
        OSError: the file cannot be written. (For a full disk safetensors raises an error of its own, which is
            converted.)
    """
    path.unlink(missing_ok=True)
    path.touch()  # shows the mode of a new file; asking for the umask itself would change it for all threads
    mode = stat.S_IMODE(path.stat().st_mode)
    try:
        save_file(dict(tensors), path, metadata={"format": "pt", **(metadata or {})})
    except SafetensorError as error:
        raise OSError(str(error)) from error
    if stat.S_IMODE(path.stat().st_mode) != mode:
        path.chmod(mode)


def clone_while_compiling(result: Tensor) -> Tensor:
    """Clone the result of an autograd Function while torch.compile traces it (the copy is fused away).

    If the result is that of an in-place operation, or of a cast to the dtype that it already has, torch 2.11
    traces the Function without its gradient, silently.
    """
    return result.clone() if torch.compiler.is_compiling() else result
