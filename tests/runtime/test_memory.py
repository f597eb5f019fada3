"""Peak memory is that of the device that was used."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from normtune.runtime import memory

MIB = 2**20


def test_the_peak_of_a_cpu_run_is_resident_memory_even_beside_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: 0)
    for device in (torch.device("cpu"), None):
        memory.reset_peak(device)
        block = torch.ones(32 * MIB)
        assert memory.peak_memory_bytes(device) >= block.numel() * 4


def test_the_peak_of_a_gpu_is_that_of_its_index(monkeypatch: pytest.MonkeyPatch) -> None:
    reset: list[Any] = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 100 * (1 + device.index))
    second = torch.device("cuda", 1)
    memory.reset_peak(second)
    assert reset == [second] and memory.peak_memory_bytes(second) == 200
