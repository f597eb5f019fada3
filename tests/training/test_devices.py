"""A run uses the device of its base, also when it resumes on another one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

from normtune.training.arguments import use_device
from normtune.training.fsdp import full_state, load_state


def test_the_trainer_uses_the_gpu_of_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """HF would take the first GPU, and accelerate the current one."""
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    use_device(arguments, torch.device("cpu"))
    assert arguments.device == torch.device("cpu") and not current
    second = torch.device("cuda", 1)
    use_device(arguments, second)
    assert arguments.device == second and current == [second]


def test_the_kernel_of_a_resumed_optimizer_is_that_of_the_run() -> None:
    """A checkpoint of a GPU has `fused`; its states are the same as without."""
    stored_of = torch.nn.Parameter(torch.ones(3))
    fused = torch.optim.AdamW([stored_of], lr=0.1, fused=True)
    stored_of.grad = torch.ones(3)
    fused.step()
    resumed = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))], lr=0.1)
    load_state(resumed, full_state(fused))
    assert resumed.param_groups[0]["fused"] is None and resumed.param_groups[0]["lr"] == 0.1
    (state,) = resumed.state.values()
    assert int(state["step"]) == 1 and state["exp_avg"].abs().sum() > 0
