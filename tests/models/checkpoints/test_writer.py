"""Safetensors written tensor by tensor: the bytes are those that the library would write."""

from __future__ import annotations

import hashlib
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from normtune.models.checkpoints.writer import Planned, write_safetensors

HELD = {
    "b.wide": torch.randn(4, 6).T,
    "c.wide": torch.randn(()),
    "a.half": torch.randn(3, 5).bfloat16(),
    "none": torch.zeros(0, 3, dtype=torch.bfloat16),
}


def test_the_file_is_the_library_s_to_the_byte_and_its_digest_is_told(tmp_path: Path) -> None:
    planned = [
        Planned(name, one.dtype, tuple(one.shape), "", lambda one=one: one) for name, one in HELD.items()
    ]  # type: ignore[misc]
    sha = write_safetensors(tmp_path / "new", planned)
    wanted = save({name: one.contiguous() for name, one in HELD.items()}, metadata={"format": "pt"})
    assert (tmp_path / "new").read_bytes() == wanted
    assert hashlib.sha256(wanted).hexdigest() == sha
    assert [one.values for one in planned] == [24, 1, 15, 0] and [one.bytes for one in planned] == [
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

    write_safetensors(tmp_path / "new", [Planned(name, torch.float32, (5,), "", make) for name in "abc"])
    assert not alive


def test_a_tensor_other_than_planned_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="wrong"):
        write_safetensors(
            tmp_path / "new", [Planned("wrong", torch.float32, (2,), "", lambda: torch.ones(3))]
        )
