"""Activation checkpointing gives the same gradients and saves less."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normtune.data.groups import Group
from normtune.methods.adapt import adapt
from normtune.models.loading import load
from normtune.models.parts import layers
from normtune.training.layer_wrapping import MemoryTier, checkpoint_activations
from normtune.training.memory_plan.live_bytes import LiveTensorBytes
from tests.models.families.test_families import PAIRS, image
from tests.support.miss_batches import IMAGE, tiny_miss
from tests.support.tiny_models import MORE, TINY, make_tiny
from tests.support.tolerance import assert_close

TIERS: list[MemoryTier] = ["fast", "balanced", "tight"]


def miss_loss(model: Any) -> Tensor:
    torch.manual_seed(3)
    return model(
        input_ids=torch.randint(5, 50, (4, 6)),
        pixel_values=torch.randn(2, 3, IMAGE, IMAGE),
        decoder_input_ids=torch.randint(5, 50, (4, 3)),
        labels=torch.randint(5, 50, (4, 3)),
    ).loss


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("tier", ["balanced", "tight"])
@pytest.mark.parametrize("recipe", ["ln", "lora-4", "prefix", "decoder=full,vision=ln"])
def test_gradients_of_miss_are_bit_identical(recipe: str, tier: MemoryTier) -> None:
    model = tiny_miss()
    adapt(model, recipe)
    expected = gradients(model, miss_loss(model))
    with checkpoint_activations(model, tier):
        recomputed = gradients(model, miss_loss(model))
    assert expected and recomputed.keys() == expected.keys()
    assert all(torch.equal(recomputed[name], expected[name]) for name in expected)


@pytest.mark.parametrize("name", [*TINY, *MORE])
def test_gradients_of_every_family_are_equal(name: str, tmp_path: Path) -> None:
    family = load(str(make_tiny(name, tmp_path)))
    adapt(family.model, "all?=ln")
    segments = tuple(family.tokenize(str(i), question, answer) for i, (_, question, answer) in enumerate(PAIRS[:3]))
    pixels = [[family.preprocess_image(image("a"))]]

    def compute_gradients() -> dict[str, Tensor]:
        return gradients(family.model, family.loss(family.collate([Group(("a",), segments)], pixels))[0])

    expected = compute_gradients()
    with checkpoint_activations(family.model, "tight") as names:
        recomputed = compute_gradients()
    assert names and recomputed.keys() == expected.keys()
    for parameter, gradient in expected.items():
        assert_close(recomputed[parameter], gradient, msg=parameter)


@pytest.mark.parametrize(("tier", "every"), [("fast", 0), ("balanced", 2), ("tight", 1)])
def test_checkpointed_layers_run_twice_and_the_others_once(tier: MemoryTier, every: int) -> None:
    model = tiny_miss()
    adapt(model, "ln")
    runs: Counter[str] = Counter()
    for name in layers(model):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: runs.update([name]))
        # hooks of a layer run outside of its `forward`: its first norm counts the runs inside
    inside: Counter[str] = Counter()
    for name in layers(model):
        norm = next(m for m in model.get_submodule(name).modules() if type(m).__name__ == "TunedNorm")
        norm.register_forward_hook(lambda *_, name=name: inside.update([name]))
    with checkpoint_activations(model, tier) as names:
        miss_loss(model).backward()
    for name, (_, index) in layers(model).items():
        is_checkpointed = bool(every) and index % every == 0
        assert inside[name] == (2 if is_checkpointed else 1), name
        assert (name in names) == is_checkpointed and runs[name] == 1


def test_layers_run_once_without_gradients() -> None:
    model = tiny_miss()
    inside: list[int] = []
    model.visual_encoder.blocks[0].norm1.register_forward_hook(lambda *_: inside.append(1))
    with checkpoint_activations(model, "tight"), torch.no_grad():
        miss_loss(model)
    assert inside == [1]


def test_layers_are_restored() -> None:
    model = tiny_miss()
    with pytest.raises(ZeroDivisionError), checkpoint_activations(model, "tight"):
        raise ZeroDivisionError
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_each_tier_saves_less_than_the_previous_one() -> None:
    saved_bytes = []
    for tier in TIERS:
        model = tiny_miss()
        adapt(model, "ln")
        with checkpoint_activations(model, tier), LiveTensorBytes() as counter:
            loss = miss_loss(model)
            saved_bytes.append(counter.now)
            del loss
    assert saved_bytes[0] > 1.3 * saved_bytes[1] > 1.3 * saved_bytes[2]
