"""Devices and dtypes by name."""

from __future__ import annotations

import pytest
import torch

from normtune.errors import InputError
from normtune.models.loading import load, resolve_device, resolve_dtype

CPU, GPU = torch.device("cpu"), torch.device("cuda", 1)


@pytest.mark.parametrize("supports_bf16", [True, False])
def test_the_automatic_dtype_depends_on_the_device(supports_bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supports_bf16)
    assert resolve_dtype("auto", CPU) == "float32"
    assert resolve_dtype("auto", GPU) == ("bfloat16" if supports_bf16 else "float32")
    assert resolve_dtype("bfloat16", CPU) == "bfloat16" and resolve_dtype("float32", GPU) == "float32"


def test_a_model_on_the_cpu_is_loaded_in_float32() -> None:
    assert {parameter.dtype for parameter in load("nano").model.parameters()} == {torch.float32}


@pytest.mark.skipif(torch.cuda.is_available(), reason="it has that device")
def test_a_missing_device_is_named() -> None:
    with pytest.raises(InputError, match="device 'cuda:1' is not available"):
        resolve_device("cuda:1")
