"""Merged weights follow the papers' formulas of LoRA and IA3, and at most one new tensor is created."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, inject_adapter_in_model
from torch import nn

from normtune.adapters.merged_weights import UNMERGEABLE, changed_tensors, check_mergeable, merged_tensor
from normtune.methods.registry import ADDED, METHODS
from normtune.training.memory_plan.live_bytes import LiveTensorBytes
from tests.support.base_models import input_error

WEIGHT = torch.linspace(-1, 1, 48).reshape(6, 8)


def layer_of(config: Any, bias: bool = True) -> Any:
    model = nn.Sequential(nn.Linear(8, 6, bias))
    inject_adapter_in_model(config, model)
    return model[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lora_adds_its_scaled_product(dtype: torch.dtype) -> None:
    layer = layer_of(LoraConfig(r=2, lora_alpha=6, target_modules=["0"]))
    assert changed_tensors(layer) == ["weight"]
    trained = {"0.lora_A": torch.randn(2, 8), "0.lora_B": torch.randn(6, 2)}
    old = WEIGHT.to(dtype)
    new = merged_tensor("0", layer, "weight", old, trained)
    assert new.dtype == torch.float32
    assert torch.equal(new, old.float() + 3 * (trained["0.lora_B"] @ trained["0.lora_A"]))
    assert torch.equal(old, WEIGHT.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_ia3_scales_rows_and_bias_or_columns(dtype: torch.dtype) -> None:
    rows = layer_of(IA3Config(target_modules=["0"], feedforward_modules=[]))
    assert changed_tensors(rows) == ["weight", "bias"]
    old, bias = WEIGHT.to(dtype), torch.arange(6).to(dtype)
    trained = {"0.ia3": torch.randn(6, 1)}
    assert torch.equal(merged_tensor("0", rows, "weight", old, trained), old.float() * trained["0.ia3"])
    scaled = merged_tensor("0", rows, "bias", bias, trained)
    assert scaled.shape == (6,) and torch.equal(scaled, bias.float() * trained["0.ia3"].flatten())
    assert changed_tensors(layer_of(IA3Config(target_modules=["0"], feedforward_modules=[]), False)) == ["weight"]
    columns = layer_of(IA3Config(target_modules=["0"], feedforward_modules=["0"]))
    assert changed_tensors(columns) == ["weight"]
    trained = {"0.ia3": torch.randn(1, 8)}
    assert torch.equal(merged_tensor("0", columns, "weight", old, trained), old.float() * trained["0.ia3"])


@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_one_fp32_tensor_of_the_weights_size_is_created(method: str) -> None:
    layer = layer_of(
        LoraConfig(r=2, target_modules=["0"])
        if method == "lora"
        else IA3Config(target_modules=["0"], feedforward_modules=[])
    )
    trained = {"0.lora_A": torch.ones(2, 8), "0.lora_B": torch.ones(6, 2), "0.ia3": torch.ones(6, 1)}
    old = WEIGHT.bfloat16()
    with LiveTensorBytes() as created:
        merged_tensor("0", layer, "weight", old, trained)
    assert created.peak == 4 * WEIGHT.numel()


def test_added_methods_other_than_lora_and_ia3_are_refused_with_the_reason() -> None:
    assert set(UNMERGEABLE) == set(ADDED) - {"lora", "ia3"}
    check_mergeable(set(METHODS) - set(UNMERGEABLE))
    for method, reason in UNMERGEABLE.items():
        assert reason in input_error(lambda method=method: check_mergeable(["ln", method]))
