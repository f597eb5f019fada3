"""The memory plan against what `normtune bench gpu` measured on a GPU (benchmarks/gpu.json), at real shapes.

The planned models have fake tensors on the CPU. What a step saves is the same there, except for the masks, of which
CUDA has copies for the query heads that share a key head: a few MiB.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from normtune.methods.adapt import adapt
from normtune.models.quantization import quantised_linears
from normtune.training.layer_wrapping import CHECKPOINT_EVERY, MemoryTier, checkpoint_activations
from normtune.training.memory_plan.fake_model import BooleanIndexing, model_bytes, use_fake_tensors
from normtune.training.memory_plan.live_bytes import LiveTensorBytes
from normtune.training.memory_plan.quantized import linear_bytes
from normtune.training.saved_activations import save_fewer_activations

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
MIB = 2**20
PARTS = {"llava": "llava-step", "gemma3": "medgemma-step"}
NAMES = {
    ("ln", "fast"): "normtune ln",
    ("ln", "tight"): "normtune ln, tight",
    ("lora(r=16)", "fast"): "normtune lora(r=16)",
}


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("gpu_models")


def measured(part: str) -> dict[str, Any]:
    rows = json.loads((BENCHMARKS / "gpu.json").read_text(encoding="utf-8"))["rows"]
    figures: dict[str, Any] = next(row["figures"] for row in rows if row["part"] == part)
    return figures


def assert_within_a_tenth(planned: float, measured_mib: float) -> None:
    assert 0.9 * measured_mib < planned / MIB < 1.1 * measured_mib


@pytest.mark.parametrize(("kind", "recipe"), [("llava", "ln"), ("llava", "lora(r=16)"), ("gemma3", "ln")])
def test_a_step_takes_the_planned_memory(kind: str, recipe: str, models: Any) -> None:
    shape = models.model_shape(kind, tiny=False)
    model = shape.build(torch.device("meta"))
    family = models.build_family(kind, model, shape.image_prefix, shape.end_token)
    family.attention = "dense"
    tuned = adapt(model, recipe)
    tiers: list[MemoryTier] = [tier for tier in CHECKPOINT_EVERY if (recipe, tier) in NAMES]
    with save_fewer_activations(model):
        use_fake_tensors(model, torch.device("cpu"))
        resting = model_bytes(model) + 2 * 4 * tuned.trainable  # AdamW has two fp32 values for each trained one
        for tier in tiers:
            figures = measured(PARTS[kind])[NAMES[recipe, tier]]
            counts = [models.QUESTIONS_PER_IMAGE] * (figures["pairs"] // models.QUESTIONS_PER_IMAGE)
            with BooleanIndexing():
                batch = family.collate(*shape.groups(counts))
            with BooleanIndexing(), LiveTensorBytes() as counter, checkpoint_activations(model, tier):
                family.loss(batch)[0].backward()
            model.zero_grad(set_to_none=True)
            assert_within_a_tenth(counter.peak, figures["step_mib"])
            assert_within_a_tenth(resting + counter.peak, figures["peak_mib"])


@pytest.mark.parametrize("quantize", ["int8", "nf4"])
def test_a_quantised_base_takes_the_planned_memory(quantize: str, models: Any) -> None:
    """The benchmark also packs the scales of nf4, which makes its base a little smaller than the planned one."""
    model = models.model_shape("llava", tiny=False).build(torch.device("meta"))
    linears = [model.get_submodule(name) for name in quantised_linears(model)]
    sizes = [(linear.out_features, linear.in_features) for linear in linears]
    unquantised = model_bytes(model) - linear_bytes(sizes, None, torch.bfloat16.itemsize)
    planned = unquantised + linear_bytes(sizes, quantize, torch.bfloat16.itemsize)
    assert_within_a_tenth(planned, measured("quantized")[quantize]["weights_mib"])
