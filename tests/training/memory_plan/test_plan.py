"""Memory plans compared with the memory of real runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import send_to_device
from torch import nn

from normtune.data.registry import open_configured
from normtune.errors import InputError
from normtune.methods.adapt import adapt
from normtune.models.loading import load
from normtune.runtime.memory import available_bytes, resident_bytes
from normtune.training.collator import build_collator
from normtune.training.config import TrainConfig
from normtune.training.inspection import add_memory_plan, inspect_model, inspect_text
from normtune.training.layer_wrapping import CHECKPOINT_EVERY, checkpoint_activations
from normtune.training.memory_plan.fake_model import model_bytes
from normtune.training.memory_plan.live_bytes import LiveTensorBytes
from normtune.training.memory_plan.plan import USABLE_SHARE, _BatchCosts, _WeightlessRun, estimate_memory, plan_memory
from normtune.training.memory_plan.quantized import QuantizedPlaceholder, insert_placeholders, linear_bytes
from normtune.training.saved_activations import save_fewer_activations
from tests.support.tiny_models import make_tiny

PLANNED = 1 / 100  # by which share a plan may miss the bytes that a run allocates

MIB = 2**20


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny("llava", tmp_path_factory.mktemp("llava")))


def run_of(model: str, **options: Any) -> TrainConfig:
    values = {"data": "phantom-a:3", "batch": 12, "device": "cpu", "out": Path("out"), **options}
    return TrainConfig.checked(model=model, **values)


def weightless_run(config: TrainConfig) -> tuple[_WeightlessRun, _BatchCosts]:
    dataset = open_configured(config)
    run = _WeightlessRun(config, dataset, dataset.split("train"), torch.device("cpu"))
    return run, _BatchCosts(run, dataset, dataset.split("train"))


def measured(config: TrainConfig, groups: Any) -> tuple[int, int]:
    """Return the bytes of the real model, and the peak of a real step on top of the model and the caches."""
    dataset = open_configured(config)
    family = load(config.model, dtype=config.dtype)
    tuned = adapt(family.model, config.tune)
    collate = build_collator(config, family, tuned, dataset, dataset.split("train"))
    cache = collate.states or collate.images
    with save_fewer_activations(family.model), LiveTensorBytes() as counter:
        before = cache.bytes
        batch = collate(groups)
        newly_cached, collate_peak = cache.bytes - before, counter.peak
        batch = send_to_device(batch, family.device)
        counter.reset_peak()
        with checkpoint_activations(family.model, config.memory):
            family.loss(batch)[0].backward()
        return model_bytes(family.model), max(collate_peak, counter.peak) - newly_cached


# masks that choose tokens in SmolVLM, sizes read from values in Qwen, a sequence a question in PaliGemma
@pytest.mark.parametrize("name", ["nano", "qwen2_5_vl", "smolvlm", "paligemma"])
def test_step_takes_the_planned_memory(name: str, tmp_path: Path) -> None:
    model = "nano" if name == "nano" else str(make_tiny(name, tmp_path))
    config = run_of(model)
    run, costs = weightless_run(config)
    groups = costs.candidates(config.batch)[0]
    weights, step = measured(config, groups)
    assert run.weights == pytest.approx(weights, rel=PLANNED)
    assert run.step_bytes(groups, "fast") == pytest.approx(step, rel=PLANNED)


@pytest.mark.parametrize(
    "options",
    [
        {"tune": "lora-8"},
        {"tune": "language=ln[1:]"},
        {"tune": "vision=full,language=ln", "memory": "balanced"},
        {"tune": "ln-language", "dtype": "bfloat16"},
        {"tune": "language=prefix", "memory": "balanced"},
    ],
    ids=lambda options: str(options["tune"]),
)
def test_plan_covers_recipes_tiers_and_dtypes(options: dict[str, Any], llava: str) -> None:
    config = run_of(llava, **options)
    run, costs = weightless_run(config)
    groups = costs.candidates(config.batch)[0]
    weights, step = measured(config, groups)
    assert run.weights == pytest.approx(weights, rel=PLANNED)
    assert run.step_bytes(groups, config.memory) == pytest.approx(step, rel=PLANNED)


def test_placeholders_take_the_bytes_of_quantised_linears() -> None:
    sizes = [(24, 32), (5, 64)]
    for kind in ("int8", "nf4"):
        linears = [nn.Linear(columns, rows, bias=False, device="meta") for rows, columns in sizes]
        insert_placeholders(linears, kind)
        assert all(type(linear) is QuantizedPlaceholder for linear in linears)
        assert sum(map(model_bytes, linears)) == linear_bytes(sizes, kind, 4)
    values = 24 * 32 + 5 * 64
    assert linear_bytes(sizes, "int8", 4) == values + 4 * (24 + 5)
    assert linear_bytes(sizes, "nf4", 4) == values // 2 + 4 * (12 + 5)
    assert linear_bytes(sizes, None, 2) == 2 * values


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantised_run_is_planned_without_its_packages(kind: str, llava: str) -> None:
    plain, quantised = plan_memory(run_of(llava)), plan_memory(run_of(llava, quantize=kind))
    assert quantised.requested.weights < plain.requested.weights
    other = next(w for w in plain.options if (w.memory, w.quantize) == ("fast", kind))
    assert other.weights == quantised.requested.weights
    assert other.step == pytest.approx(quantised.requested.step, rel=10 * PLANNED)


def test_plan_has_every_option_and_whether_it_fits(llava: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_memory(run_of(llava))
    assert {(w.memory, w.quantize) for w in plan.options} == {
        (tier, kind) for tier in CHECKPOINT_EVERY for kind in (None, "int8", "nf4")
    }
    by_tier = {w.memory: w for w in plan.options if w.quantize is None}
    assert by_tier["fast"].step > by_tier["balanced"].step > by_tier["tight"].step
    requested = plan.requested
    parts = ("weights", "optimiser", "step", "cached", "allocator", "program")
    assert requested.total == sum(getattr(requested, name) for name in parts) and requested.fits
    # only where the process keeps freed memory
    assert all(option.allocator == 0 for option in plan.options if option.quantize or option.memory == "tight")
    between = (by_tier["fast"].step + by_tier["tight"].step) // 2
    free = requested.total - requested.program - requested.step + between
    short = int(free / USABLE_SHARE)
    monkeypatch.setattr("normtune.training.memory_plan.plan.available_bytes", lambda device: short)
    tight = plan_memory(run_of(llava))
    assert not tight.requested.fits and 0 < (tight.requested.pairs_that_fit or 0) < tight.pairs
    fits = {option.memory: option.fits for option in tight.options if option.quantize is None}
    assert fits["tight"] and not fits["fast"]


def test_memory_of_a_step_is_proportional_to_its_pairs(llava: str) -> None:
    config = run_of(llava, batch=24)
    run, costs = weightless_run(config)
    whole, half = costs.candidates(24)[0], costs.candidates(12)[0]
    pairs = sum(len(group) for group in half)
    per_pair = run.step_bytes(whole, "fast") / sum(len(group) for group in whole)
    assert run.step_bytes(half, "fast") < 1.25 * per_pair * pairs


def test_training_quantised_layers_is_refused(llava: str) -> None:
    with pytest.raises(InputError, match="trains linear layers that --quantize int8"):
        plan_memory(run_of(llava, tune="language=attention", quantize="int8"))
    plan = plan_memory(run_of(llava, tune="language=attention"))
    assert {option.quantize for option in plan.options} == {None}


def test_inspection_with_data_has_a_plan(llava: str) -> None:
    report = add_memory_plan(llava, "ln", {"data": "phantom-a:3", "device": "cpu"}, inspect_model(llava, "ln"))
    text = inspect_text(report)
    for word in ("peak memory", "weights", "free", "balanced", "int8", "nf4"):
        assert word in text
    with pytest.raises(InputError, match="--batch needs --data"):
        add_memory_plan(llava, "ln", {"batch": 3}, {})
    with pytest.raises(InputError, match="shape without a processor"):
        add_memory_plan("miss-base", "ln", {"data": "phantom-a:3"}, {})


def test_host_reports_its_memory() -> None:
    assert resident_bytes() > 10 * MIB
    free = available_bytes(torch.device("cpu"))
    assert free is None or free > 0


@pytest.mark.parametrize("options", [{"tune": "lora-8"}, {"tune": "full", "batch": 5}])
def test_estimate_of_the_preflight_is_the_plan_of_the_configured_run(options: dict[str, Any]) -> None:
    config = run_of("nano", **options)
    dataset = open_configured(config)
    examples = dataset.split("train")
    estimate, plan = estimate_memory(config, dataset, examples), plan_memory(config).requested
    names = ("weights", "optimiser", "cached", "fits")
    assert {name: estimate[name] for name in names} == {name: getattr(plan, name) for name in names}
    # the plan builds its batches twice: the second time it copies what the first time put into the caches
    assert 0 <= plan.step - estimate["step"] <= plan.cached
    parts = ("weights", "optimiser", "cached", "step", "allocator", "program")
    assert estimate["peak"] == sum(estimate[name] for name in parts)
    loaded = estimate_memory(config, dataset, examples, load("nano"))
    assert loaded["step"] == estimate["step"] and loaded["recipe"] == options["tune"]


def test_a_run_does_not_depend_on_its_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no kernel for fake tensors\nmore lines")

    monkeypatch.setattr(_WeightlessRun, "step_bytes", fail)
    config = run_of("nano")
    dataset = open_configured(config)
    assert estimate_memory(config, dataset, dataset.split("train")) == {"not_planned": "no kernel for fake tensors"}
