"""Safetensors written tensor by tensor have the same bytes as those written by the library."""

from __future__ import annotations

import hashlib
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from normtune.models.checkpoints.writer import PlannedTensor, write_safetensors

TENSORS = {
    "b.wide": torch.randn(4, 6).T,
    "c.wide": torch.randn(()),
    "a.half": torch.randn(3, 5).bfloat16(),
    "none": torch.zeros(0, 3, dtype=torch.bfloat16),
}


def test_the_file_equals_the_librarys_and_its_digest_is_returned(tmp_path: Path) -> None:
    planned = [
        PlannedTensor(name, tensor.dtype, tuple(tensor.shape), "", lambda tensor=tensor: tensor)
        for name, tensor in TENSORS.items()
    ]  # type: ignore[misc]
    sha = write_safetensors(tmp_path / "new", planned)
    expected = save({name: tensor.contiguous() for name, tensor in TENSORS.items()}, metadata={"format": "pt"})
    assert (tmp_path / "new").read_bytes() == expected
    assert hashlib.sha256(expected).hexdigest() == sha
    assert [tensor.numel for tensor in planned] == [24, 1, 15, 0] and [tensor.bytes for tensor in planned] == [
        96,
        4,
        30,
        0,
    ]


def test_one_tensor_is_alive_at_a_time(tmp_path: Path) -> None:
    alive: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def make() -> Tensor:
        assert not alive
        tensor = torch.ones(5)
        alive.add(tensor.untyped_storage())
        return tensor

    write_safetensors(tmp_path / "new", [PlannedTensor(name, torch.float32, (5,), "", make) for name in "abc"])
    assert not alive


def test_a_tensor_that_differs_from_the_plan_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="wrong"):
        write_safetensors(tmp_path / "new", [PlannedTensor("wrong", torch.float32, (2,), "", lambda: torch.ones(3))])
