"""The planner's word is what the run then takes, to the byte where tensors are counted."""

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
from normtune.training.inspection import inspect_text, inspection, planned
from normtune.training.layer_wrapping import CHECKPOINT_EVERY, checkpoint_activations
from normtune.training.memory_plan.fake_model import bytes_of
from normtune.training.memory_plan.live_bytes import LiveTensorBytes
from normtune.training.memory_plan.plan import USABLE_SHARE, _Costs, _WeightlessRun, plan
from normtune.training.memory_plan.quantized import QuantizedPlaceholder, insert_placeholders, linear_bytes
from normtune.training.saved_activations import save_fewer_activations
from tests.support.tiny_models import make_tiny

MIB = 2**20


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny("llava", tmp_path_factory.mktemp("llava")))


def run_of(model: str, **options: Any) -> TrainConfig:
    given = {"data": "phantom-a:3", "batch": 12, "device": "cpu", "out": Path("out"), **options}
    return TrainConfig.checked(model=model, **given)


def hollow_run(config: TrainConfig) -> tuple[_WeightlessRun, _Costs]:
    dataset = open_configured(config)
    run = _WeightlessRun(config, dataset, dataset.split("train"), torch.device("cpu"))
    return run, _Costs(run, dataset, dataset.split("train"))


def measured(config: TrainConfig, groups: Any) -> tuple[int, int]:
    """Bytes of the real model, and the most that live in a real step besides it and the caches."""
    dataset = open_configured(config)
    family = load(config.model, dtype=config.dtype)
    tuned = adapt(family.model, config.tune)
    collate = build_collator(config, family, tuned, dataset, dataset.split("train"))
    cache = collate.states or collate.images
    with save_fewer_activations(family.model), LiveTensorBytes() as live:
        before = cache.bytes
        batch = collate(groups)
        grown, seen = cache.bytes - before, live.peak
        batch = send_to_device(batch, family.device)
        live.reset_peak()
        with checkpoint_activations(family.model, config.memory):
            family.loss(batch)[0].backward()
        return bytes_of(family.model), max(seen, live.peak) - grown


# masks that choose tokens in SmolVLM, sizes read from values in Qwen, a sequence a question in PaliGemma
@pytest.mark.parametrize("name", ["nano", "qwen2_5_vl", "smolvlm", "paligemma"])
def test_a_step_takes_what_was_planned(name: str, tmp_path: Path) -> None:
    model = "nano" if name == "nano" else str(make_tiny(name, tmp_path))
    config = run_of(model)
    run, costs = hollow_run(config)
    groups = costs.largest(config.batch)
    weights, step = measured(config, groups)
    assert run.weights == pytest.approx(weights, rel=0.01)
    assert run.step(groups, "fast") == pytest.approx(step, rel=0.01)


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
def test_recipes_tiers_and_dtypes_are_counted_as_they_run(options: dict[str, Any], llava: str) -> None:
    config = run_of(llava, **options)
    run, costs = hollow_run(config)
    groups = costs.largest(config.batch)
    weights, step = measured(config, groups)
    assert run.weights == pytest.approx(weights, rel=0.01)
    assert run.step(groups, config.memory) == pytest.approx(step, rel=0.01)


def test_stand_ins_take_the_bytes_of_quantised_linears() -> None:
    sizes = [(24, 32), (5, 64)]
    for kind in ("int8", "nf4"):
        linears = [nn.Linear(columns, rows, bias=False, device="meta") for rows, columns in sizes]
        insert_placeholders(linears, kind)
        assert all(type(one) is QuantizedPlaceholder for one in linears)
        assert sum(map(bytes_of, linears)) == linear_bytes(sizes, kind, 4)
    values = 24 * 32 + 5 * 64
    assert linear_bytes(sizes, "int8", 4) == values + 4 * (24 + 5)
    assert linear_bytes(sizes, "nf4", 4) == values // 2 + 4 * (12 + 5)
    assert linear_bytes(sizes, None, 2) == 2 * values


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_quantised_run_is_planned_without_the_extra(kind: str, llava: str) -> None:
    plain, quantised = plan(run_of(llava)), plan(run_of(llava, quantize=kind))
    assert quantised.requested.weights < plain.requested.weights
    other = next(w for w in plain.options if (w.memory, w.quantize) == ("fast", kind))
    assert other.weights == quantised.requested.weights
    assert other.step == pytest.approx(quantised.requested.step, rel=0.1)


def test_a_plan_names_every_way_and_what_fits(llava: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = plan(run_of(llava))
    assert {(w.memory, w.quantize) for w in found.options} == {
        (tier, kind) for tier in CHECKPOINT_EVERY for kind in (None, "int8", "nf4")
    }
    by_tier = {w.memory: w for w in found.options if w.quantize is None}
    assert by_tier["fast"].step > by_tier["balanced"].step > by_tier["tight"].step
    asked = found.requested
    parts = asked.weights + asked.optimiser + asked.step + asked.held + asked.program
    assert asked.total == parts and asked.fits
    between = (by_tier["fast"].step + by_tier["tight"].step) // 2
    short = int((asked.total - asked.program - asked.step + between) / USABLE_SHARE)
    monkeypatch.setattr("normtune.training.memory_plan.plan.available_bytes", lambda device: short)
    tight = plan(run_of(llava))
    assert not tight.requested.fits and 0 < (tight.requested.pairs_that_fit or 0) < tight.pairs
    fitting = {way.memory: way.fits for way in tight.options if way.quantize is None}
    assert fitting["tight"] and not fitting["fast"]


def test_a_smaller_batch_of_the_number_that_fits_does_fit(llava: str) -> None:
    config = run_of(llava, batch=24)
    run, costs = hollow_run(config)
    whole, half = costs.largest(24), costs.largest(12)
    pairs = sum(len(group) for group in half)
    per_pair = run.step(whole, "fast") / sum(len(group) for group in whole)
    assert run.step(half, "fast") < 1.25 * per_pair * pairs


def test_what_a_quantised_base_cannot_train_is_refused(llava: str) -> None:
    with pytest.raises(InputError, match="trains linears that --quantize int8"):
        plan(run_of(llava, tune="language=attention", quantize="int8"))
    assert {way.quantize for way in plan(run_of(llava, tune="language=attention")).options} == {None}


def test_inspect_plans_where_there_is_data(llava: str) -> None:
    found = planned(llava, "ln", {"data": "phantom-a:3", "device": "cpu"}, inspection(llava, "ln"))
    text = inspect_text(found)
    for word in ("peak memory", "weights", "free", "balanced", "int8", "nf4"):
        assert word in text
    with pytest.raises(InputError, match="--batch goes with --data"):
        planned(llava, "ln", {"batch": 3}, {})
    with pytest.raises(InputError, match="shape without a processor"):
        planned("miss-base", "ln", {"data": "phantom-a:3"}, {})


def test_the_host_says_what_it_has() -> None:
    assert resident_bytes() > 10 * MIB
    free = available_bytes(torch.device("cpu"))
    assert free is None or free > 0
