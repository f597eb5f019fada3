"""States below what is trained: fed in, they give the loss and gradients of the whole model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normtune.data.groups import Group, Segment
from normtune.data.records import Dataset
from normtune.methods.adapt import TunedModel, adapt
from normtune.models.causal.family import CausalFamily
from normtune.models.family import Family
from normtune.models.frozen_trunk import SkippedLayer
from normtune.models.image_cache import ImageCache
from normtune.models.loading import load
from normtune.training.state_cache import StateCache
from tests.models.families.test_families import GROUPINGS, PAIRS, image
from tests.support import tiny_models
from tests.support.tiny_miss import tiny_miss

SHARING = tuple(name for name in tiny_models.TINY if not name.startswith("paligemma"))
TOLERANCE = 3e-6  # sums of tiles in another order: 1.1e-6 was seen
UPPER = {  # of three layers; Gemma 3 has two
    "norms": "language=ln[2:]",
    "lora": "language=lora(r=2)[2:]",
    "prefix": "language=prefix(n=3)[2:]",
    "adapter": "language=adapter(width=4)[2:]",
}


@pytest.fixture(scope="module", params=SHARING)
def base(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CausalFamily]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny_models.TEXT_SIZES, "num_hidden_layers", 3)
        loaded = load(str(tiny_models.make_tiny(request.param, tmp_path_factory.mktemp(request.param))))
    assert isinstance(loaded, CausalFamily)
    yield loaded


def fresh(family: Family, recipe: str) -> tuple[Any, TunedModel]:
    """A copy of the family, adapted; what is added starts away from zero, so that all gradients matter."""
    own: Any = type(family)(copy.deepcopy(family.model), family.processor)
    if isinstance(own, CausalFamily) and len(own.decoder.layers) == 2:
        recipe = recipe.replace("[2:]", "[1:]")
    tuned = adapt(own.model, recipe)
    with torch.no_grad():
        for parameter in tuned.trained.values():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return own, tuned


def groups(family: Family, grouping: str) -> list[Group]:
    return [
        Group((PAIRS[members[0]][0],), tuple(segment(family, i) for i in members))
        for members in GROUPINGS[grouping]
    ]


def segment(family: Family, i: int) -> Segment:
    return family.tokenize(str(i), PAIRS[i][1], PAIRS[i][2])


def cached(family: Family, tuned: TunedModel) -> StateCache:
    below = family.frozen_trunk(tuned.trained.values())
    assert below is not None
    asked = {
        (name,): [segment(family, i) for i in range(len(PAIRS)) if PAIRS[i][0] == name] for name in "abc"
    }
    return StateCache(below, ImageCache(family, Dataset("noise", [], image), frozen=True), asked)


def stepped(family: Family, tuned: TunedModel, batch: dict[str, Any]) -> tuple[float, dict[str, Tensor]]:
    family.model.zero_grad()
    loss, _ = family.loss(batch)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in tuned.trained.items() if p.grad is not None}
    assert gradients.keys() == tuned.trained.keys()
    return float(loss.detach()), gradients


def assert_same_step(family: Family, tuned: TunedModel, grouping: str) -> None:
    asked = groups(family, grouping)
    pixels = [[family.preprocess_image(image(group.images[0]))] for group in asked]
    loss, wanted = stepped(family, tuned, family.collate(asked, pixels))
    own_loss, found = stepped(family, tuned, cached(family, tuned).collate(asked))
    assert abs(own_loss - loss) / loss < TOLERANCE
    for name, gradient in wanted.items():
        assert (found[name] - gradient).norm() / gradient.norm() < TOLERANCE, name


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_states_in_place_of_images_give_the_same_loss_and_gradients(
    base: CausalFamily, grouping: str
) -> None:
    assert_same_step(*fresh(base, UPPER["norms"]), grouping)


@pytest.mark.parametrize("method", [method for method in UPPER if method != "norms"])
def test_so_they_do_for_what_is_added_above(base: CausalFamily, method: str) -> None:
    assert_same_step(*fresh(base, UPPER[method]), "cap of two")


def test_groups_may_be_packed_into_one_row(base: CausalFamily) -> None:
    family, tuned = fresh(base, UPPER["norms"])
    family.rows = "pack"
    assert_same_step(family, tuned, "mixed order")


def test_neither_the_tower_nor_a_layer_below_runs_in_a_step(
    base: CausalFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, tuned = fresh(base, UPPER["norms"])
    states = cached(family, tuned)
    batch = states.collate(groups(family, "by image"))
    layers = list(family.decoder.layers)
    ran = []
    for index, layer in enumerate(layers):
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
    monkeypatch.setattr(family, "features", lambda images: pytest.fail("the tower ran"))
    family.loss(batch)
    assert ran == list(range(len(layers)))[-1:]
    assert all(own is layer for own, layer in zip(family.decoder.layers, layers, strict=True))
    assert not any(isinstance(module, SkippedLayer) for module in family.model.modules())


@pytest.mark.parametrize(
    "recipe",
    [
        "language=ln",
        "language=lora(r=2)",
        "language=prefix(n=3)",
        "vision=ln,language=ln[2:]",
        "connector=full,language=ln[2:]",
        "language=full",
    ],
)
def test_nothing_lies_below_what_reaches_down(base: CausalFamily, recipe: str) -> None:
    family, tuned = fresh(base, recipe)
    assert family.frozen_trunk(tuned.trained.values()) is None


def test_a_trained_head_that_is_the_embedding_too_reaches_down() -> None:
    family: Any = load_tied()
    assert family.frozen_trunk([family.model.lm_head.weight]) is None
    untied = nn.Parameter(family.model.lm_head.weight.detach().clone())
    family.model.lm_head.weight = untied
    below = family.frozen_trunk([untied])
    assert below is not None and below.depth == len(family.decoder.layers)


def load_tied() -> CausalFamily:
    from transformers import AutoModelForImageTextToText

    from normtune.models.families.gemma3 import Gemma3Family

    config, processor = tiny_models.gemma3()
    config.tie_word_embeddings = True
    model: Any = AutoModelForImageTextToText.from_config(config)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    return Gemma3Family(model.eval(), processor)


def test_layers_that_take_image_features_are_not_passed_over(tmp_path: Any) -> None:
    """Qwen3-VL's first two layers do: with norms trained from the second on, all layers run."""
    family = load(str(tiny_models.make_tiny("qwen3_vl", tmp_path)))
    tuned = adapt(family.model, "language=ln[1:]")
    assert family.frozen_trunk(tuned.trained.values()) is None


def test_paligemma_holds_nothing(tmp_path: Any) -> None:
    family = load(str(tiny_models.make_tiny("paligemma", tmp_path)))
    tuned = adapt(family.model, "language=ln[1:]")
    assert family.frozen_trunk(tuned.trained.values()) is None


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("method", ["ln", "lora(r=2)", "prefix(n=3)"])
def test_miss_reads_its_questions_from_states_where_only_the_decoder_is_trained(
    grouping: str, method: str
) -> None:
    assert_same_step(*fresh(tiny_miss(), f"decoder={method}"), grouping)


@pytest.mark.parametrize("recipe", ["encoder=ln,decoder=ln", "vision=ln", "encoder=prefix(n=3)", "full"])
def test_miss_has_nothing_below_where_its_encoders_are_trained(recipe: str) -> None:
    family, tuned = fresh(tiny_miss(), recipe)
    assert family.frozen_trunk(tuned.trained.values()) is None
