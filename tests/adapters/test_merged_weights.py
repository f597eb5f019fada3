"""What a LoRA and an IA3 make of a weight: the formulas of their papers, and one new tensor at most."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, inject_adapter_in_model
from torch import nn

from normtune.adapters.merged_weights import UNMERGEABLE, changed_by, refuse_unmergeable, with_addition
from normtune.methods.registry import ADDED, METHODS
from normtune.training.memory_plan.live_bytes import LiveTensorBytes
from tests.support.base_models import outcome

WEIGHT = torch.linspace(-1, 1, 48).reshape(6, 8)


def layer_of(config: Any, bias: bool = True) -> Any:
    model = nn.Sequential(nn.Linear(8, 6, bias))
    inject_adapter_in_model(config, model)
    return model[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lora_adds_its_scaled_product(dtype: torch.dtype) -> None:
    layer = layer_of(LoraConfig(r=2, lora_alpha=6, target_modules=["0"]))
    assert changed_by(layer) == ["weight"]
    trained = {"0.lora_A": torch.randn(2, 8), "0.lora_B": torch.randn(6, 2)}
    old = WEIGHT.to(dtype)
    new = with_addition("0", layer, "weight", old, trained)
    assert new.dtype == torch.float32
    assert torch.equal(new, old.float() + 3 * (trained["0.lora_B"] @ trained["0.lora_A"]))
    assert torch.equal(old, WEIGHT.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_ia3_scales_rows_and_bias_or_columns(dtype: torch.dtype) -> None:
    rows = layer_of(IA3Config(target_modules=["0"], feedforward_modules=[]))
    assert changed_by(rows) == ["weight", "bias"]
    old, bias = WEIGHT.to(dtype), torch.arange(6).to(dtype)
    trained = {"0.ia3": torch.randn(6, 1)}
    assert torch.equal(with_addition("0", rows, "weight", old, trained), old.float() * trained["0.ia3"])
    scaled = with_addition("0", rows, "bias", bias, trained)
    assert scaled.shape == (6,) and torch.equal(scaled, bias.float() * trained["0.ia3"].flatten())
    assert changed_by(layer_of(IA3Config(target_modules=["0"], feedforward_modules=[]), False)) == ["weight"]
    columns = layer_of(IA3Config(target_modules=["0"], feedforward_modules=["0"]))
    assert changed_by(columns) == ["weight"]
    trained = {"0.ia3": torch.randn(1, 8)}
    assert torch.equal(with_addition("0", columns, "weight", old, trained), old.float() * trained["0.ia3"])


@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_one_fp32_tensor_of_the_weight_s_size_is_made(method: str) -> None:
    layer = layer_of(
        LoraConfig(r=2, target_modules=["0"])
        if method == "lora"
        else IA3Config(target_modules=["0"], feedforward_modules=[])
    )
    trained = {"0.lora_A": torch.ones(2, 8), "0.lora_B": torch.ones(6, 2), "0.ia3": torch.ones(6, 1)}
    old = WEIGHT.bfloat16()
    with LiveTensorBytes() as live:
        with_addition("0", layer, "weight", old, trained)
    assert live.peak == 4 * WEIGHT.numel()


def test_the_methods_that_are_refused_are_those_that_no_weight_can_stand_for() -> None:
    assert set(UNMERGEABLE) == set(ADDED) - {"lora", "ia3"}
    refuse_unmergeable(set(METHODS) - set(UNMERGEABLE))
    for method, reason in UNMERGEABLE.items():
        assert reason in outcome(lambda method=method: refuse_unmergeable(["ln", method]))
