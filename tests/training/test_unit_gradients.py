"""The gradients of several units from two backward passes are those of a pass for each unit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from normtune.data.groups import Group
from normtune.methods.adapt import adapt
from normtune.models.answer_loss import answer_loss
from normtune.models.family import Family
from normtune.models.loading import load
from normtune.models.types import Pixels
from normtune.training.layer_wrapping import checkpoint_activations
from normtune.training.saved_activations import save_fewer_activations
from normtune.training.unit_gradients import UnitGradients
from tests.models.families.test_families import PAIRS, image
from tests.support.base_models import input_error
from tests.support.tiny_models import make_tiny
from tests.support.tolerance import MODEL_TERMS, assert_close

# image a is in two groups; the images b and c belong to one patient
GROUPS = [[0, 1], [2], [3, 4], [5]]
UNITS = {"a": 0, "b": 1, "c": 1}
# MISS with heads on answer tokens, LLaVA's tiles, packed patches of Qwen-VL with norms of queries and keys, windows
FAMILIES = ("miss", "nano", "llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "gemma3", "idefics3")

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: Any, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Family]:
    known = {"miss": str(base), "nano": "nano"}
    source = known.get(request.param) or str(make_tiny(request.param, tmp_path_factory.mktemp(request.param)))
    family = load(source, dtype=torch.float32)
    tuned = adapt(family.model, "ln")
    family.model.eval()
    family.trained = tuned.trained  # type: ignore[attr-defined]
    with save_fewer_activations(family.model):
        yield family


def make_groups(family: Family) -> list[Group]:
    segments = [family.tokenize(str(i), question, answer) for i, (_, question, answer) in enumerate(PAIRS)]
    return [Group((PAIRS[members[0]][0],), tuple(segments[i] for i in members)) for members in GROUPS]


def row_losses(family: Family, groups: list[Group]) -> tuple[Tensor, Tensor]:
    """The loss of each answer token, and its unit."""
    pixels: dict[str, Pixels] = {name: family.preprocess_image(image(name)) for name in "abc"}
    batch = send_to_device(family.collate(groups, [[pixels[group.images[0]]] for group in groups]), family.device)
    states, labels, segments = family.answer_states(batch)
    losses = answer_loss(family.head, states, labels, vocabulary=family.vocabulary, reduction="none")
    units = torch.tensor([UNITS[group.images[0]] for group in groups for _ in group.segments])
    return losses, units[segments]


def one_by_one(family: Family) -> Tensor:
    """The gradient of each unit from a batch of its own, by autograd."""
    trained: dict[str, nn.Parameter] = family.trained  # type: ignore[attr-defined]
    rows = []
    for unit in (0, 1):
        losses, _ = row_losses(family, [group for group in make_groups(family) if UNITS[group.images[0]] == unit])
        gradients = torch.autograd.grad(losses.sum(), list(trained.values()), allow_unused=True)
        pairs = zip(gradients, trained.values(), strict=True)
        flat = [p.new_zeros(p.numel()) if g is None else g.flatten() for g, p in pairs]
        rows.append(torch.cat(flat))
    return torch.stack(rows)


@pytest.mark.parametrize("memory", ["fast", "tight"])
def test_gradients_of_units_are_those_of_a_pass_for_each(family: Family, memory: Any) -> None:
    expected = one_by_one(family)
    gradients = UnitGradients(family.model, family.trained)  # type: ignore[attr-defined]
    assert gradients.many and gradients.values == expected.shape[1]
    with checkpoint_activations(family.model, memory), gradients.watch():
        losses, unit_of = row_losses(family, make_groups(family))
        actual = gradients.of_many(losses, unit_of, 2)
    assert expected.norm(dim=1).min() > 0
    # the patches of an image add to the terms of a sum
    assert_close(actual, expected, terms=4 * MODEL_TERMS)
    assert_close(actual.norm(dim=1), expected.norm(dim=1))
    assert all(parameter.grad is None for parameter in gradients.parameters)


def test_the_gradient_of_one_unit_is_autograds(family: Family) -> None:
    gradients = UnitGradients(family.model, family.trained)  # type: ignore[attr-defined]
    losses, _ = row_losses(family, make_groups(family)[:2])
    assert torch.equal(gradients.of_one(losses)[0], one_by_one(family)[0])


@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_a_bf16_base_gives_the_gradients_of_the_same_forward_pass(name: str, tmp_path: Path) -> None:
    family = load(str(make_tiny(name, tmp_path)), dtype=torch.bfloat16)
    gradients = UnitGradients(family.model, adapt(family.model, "ln").trained)
    family.model.eval()
    with gradients.watch():
        losses, unit_of = row_losses(family, make_groups(family))
        expected = torch.stack([
            torch.cat([g.flatten() for g in torch.autograd.grad(
                losses[unit_of == unit].sum(), gradients.parameters, retain_graph=True, materialize_grads=True)])
            for unit in (0, 1)
        ])  # fmt: skip
        actual = gradients.of_many(losses, unit_of, 2)
    assert actual.dtype == torch.float32
    assert_close(actual, expected, terms=4 * MODEL_TERMS)


def test_tokens_of_several_units_are_an_error(base: Path) -> None:
    family = load(str(base), dtype=torch.float32)
    family.trained = adapt(family.model, "ln").trained  # type: ignore[attr-defined]
    gradients = UnitGradients(family.model, family.trained)  # type: ignore[attr-defined]
    # like batch statistics: every image sees the mean of all images
    family.model.visual_encoder.register_forward_hook(lambda module, inputs, output: output + output.mean(0))
    with gradients.watch():
        losses, unit_of = row_losses(family, make_groups(family))
        message = input_error(lambda: gradients.of_many(losses, unit_of, 2))
    assert "depends on several patients or images" in message


@pytest.mark.parametrize("recipe", ["lora", "full", "ln+lora"])
def test_other_methods_need_a_pass_for_each_unit(base: Path, recipe: str) -> None:
    family = load(str(base), dtype=torch.float32)
    assert not UnitGradients(family.model, adapt(family.model, recipe).trained).many
