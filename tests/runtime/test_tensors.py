"""Tensor files have the mode of any new file, and errors of the disk are OSErrors."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from normtune.runtime.tensor_cache import TensorCache
from normtune.runtime.tensors import write_tensors

GAIN = {"gain": torch.arange(3.0)}


@pytest.fixture
def umask() -> Iterator[Callable[[int], int]]:
    """Sets the umask for one test."""
    before = os.umask(0)
    os.umask(before)
    yield os.umask
    os.umask(before)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


@pytest.mark.parametrize(("mask", "expected"), [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664)])
def test_files_have_the_mode_of_the_umask(
    mask: int, expected: int, tmp_path: Path, umask: Callable[[int], int]
) -> None:
    umask(mask)
    (tmp_path / "replaced").touch(0o600)
    for name in ("new", "replaced"):
        write_tensors(tmp_path / name, GAIN)
        assert mode(tmp_path / name) == expected
        assert torch.equal(load_file(tmp_path / name)["gain"], GAIN["gain"])
    TensorCache(tmp_path).write("entry", GAIN)
    assert mode(tmp_path / "entry.safetensors") == expected


def test_metadata_is_added_to_the_format(tmp_path: Path) -> None:
    write_tensors(tmp_path / "file", GAIN, {"source": "a test"})
    with safe_open(tmp_path / "file", "pt") as file:
        assert file.metadata() == {"format": "pt", "source": "a test"}


def test_a_missing_folder_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        write_tensors(tmp_path / "none" / "file", GAIN)
