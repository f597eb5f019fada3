"""Training from a frozen trunk's states gives the loss and gradients of the whole model."""

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
from tests.models.families.test_families import CHUNK_TERMS, GROUPINGS, PAIRS, image, turns
from tests.support import tiny_models
from tests.support.tiny_miss import tiny_miss
from tests.support.tolerance import MODEL_TERMS, approx, relative_bound, relative_error

SHARING = tuple(
    name for name in (*tiny_models.TINY, *tiny_models.MORE) if not name.startswith("paligemma") and name != "gemma4"
)
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


def adapted_copy(family: Family, recipe: str) -> tuple[Any, TunedModel]:
    """An adapted copy of the family; added parameters do not start at zero, so that all have gradients."""
    copied: Any = type(family)(copy.deepcopy(family.model), family.processor)
    if "prefix" in recipe and getattr(copied.model.config, "model_type", "") == "gemma4":
        pytest.skip("the keys of its layers differ in shape, so that no prefix fits")
    # two layers in all; or recurrent layers, where the only attention is in the second
    attention = "lora" in recipe or "prefix" in recipe
    if isinstance(copied, CausalFamily) and (len(copied.decoder.layers) == 2 or (copied.recurrent and attention)):
        recipe = recipe.replace("[2:]", "[1:]")
    tuned = adapt(copied.model, recipe)
    with torch.no_grad():
        for parameter in tuned.trained.values():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return copied, tuned


def groups(family: Family, grouping: str) -> list[Group]:
    return [
        Group((PAIRS[members[0]][0],), tuple(segment(family, i) for i in members)) for members in GROUPINGS[grouping]
    ]


def segment(family: Family, i: int) -> Segment:
    return family.tokenize(str(i), PAIRS[i][1], PAIRS[i][2])


def state_cache(family: Family, tuned: TunedModel) -> StateCache:
    trunk = family.frozen_trunk(tuned.trained.values())
    assert trunk is not None
    questions = {(name,): [segment(family, i) for i in range(len(PAIRS)) if PAIRS[i][0] == name] for name in "abc"}
    return StateCache(trunk, ImageCache(family, Dataset("noise", [], image), frozen=True), questions)


def loss_and_gradients(family: Family, tuned: TunedModel, batch: dict[str, Any]) -> tuple[float, dict[str, Tensor]]:
    family.model.zero_grad()
    loss, _ = family.loss(batch)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in tuned.trained.items() if p.grad is not None}
    assert gradients.keys() == tuned.trained.keys()
    return float(loss.detach()), gradients


def bound(family: Any) -> float:
    """A gated DeltaNet rounds more than other layers."""
    return relative_bound(terms=CHUNK_TERMS if getattr(family, "recurrent", ()) else MODEL_TERMS)


def assert_same_step(family: Family, tuned: TunedModel, grouping: str) -> None:
    batch_groups = groups(family, grouping)
    pixels = [[family.preprocess_image(image(group.images[0]))] for group in batch_groups]
    loss, expected = loss_and_gradients(family, tuned, family.collate(batch_groups, pixels))
    cached_loss, cached_gradients = loss_and_gradients(family, tuned, state_cache(family, tuned).collate(batch_groups))
    assert cached_loss == approx(loss)
    for name, gradient in expected.items():
        assert relative_error(cached_gradients[name], gradient) < bound(family), name


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_states_in_place_of_images_give_the_same_loss_and_gradients(base: CausalFamily, grouping: str) -> None:
    assert_same_step(*adapted_copy(base, UPPER["norms"]), grouping)


@pytest.mark.parametrize("method", [method for method in UPPER if method != "norms"])
def test_states_give_the_same_step_with_added_parameters(base: CausalFamily, method: str) -> None:
    if method == "adapter" and base.config.model_type.endswith("moe"):
        pytest.skip("a mixture of experts has no feed-forward for it")
    assert_same_step(*adapted_copy(base, UPPER[method]), "cap of two")


def test_groups_may_be_packed_into_one_row(base: CausalFamily) -> None:
    family, tuned = adapted_copy(base, UPPER["norms"])
    family.rows = "pack"
    assert_same_step(family, tuned, "mixed order")


def test_states_of_turns_are_saved_with_their_history(base: CausalFamily) -> None:
    family, tuned = adapted_copy(base, UPPER["norms"])
    group, pixels, _ = turns(family)
    loss, expected = loss_and_gradients(family, tuned, family.collate([group], [pixels]))
    trunk = family.frozen_trunk(tuned.trained.values())
    assert trunk is not None
    states = trunk.states(group, [family.encode_image(pixels[0])])
    cached_loss, cached_gradients = loss_and_gradients(family, tuned, trunk.collate([group], [states]))
    assert cached_loss == approx(loss)
    for name, gradient in expected.items():
        assert relative_error(cached_gradients[name], gradient) < bound(family), name


def test_neither_the_tower_nor_a_frozen_layer_runs_in_a_step(
    base: CausalFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, tuned = adapted_copy(base, UPPER["norms"])
    states = state_cache(family, tuned)
    batch = states.collate(groups(family, "by image"))
    layers = list(family.decoder.layers)
    ran = []
    for index, layer in enumerate(layers):
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
    monkeypatch.setattr(family, "features", lambda images: pytest.fail("the tower ran"))
    family.loss(batch)
    assert ran == list(range(len(layers)))[-1:]
    assert all(present is layer for present, layer in zip(family.decoder.layers, layers, strict=True))
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
def test_a_recipe_that_trains_the_first_layers_has_no_trunk(base: CausalFamily, recipe: str) -> None:
    family, tuned = adapted_copy(base, recipe)
    trunk = family.frozen_trunk(tuned.trained.values())
    if family.recurrent and recipe in ("language=lora(r=2)", "language=prefix(n=3)"):
        assert trunk is not None and trunk.depth == 1  # the first layer has no attention that they train
    else:
        assert trunk is None


def test_a_trained_head_tied_to_the_embedding_has_no_trunk() -> None:
    family: Any = load_tied()
    assert family.frozen_trunk([family.model.lm_head.weight]) is None
    untied = nn.Parameter(family.model.lm_head.weight.detach().clone())
    family.model.lm_head.weight = untied
    trunk = family.frozen_trunk([untied])
    assert trunk is not None and trunk.depth == len(family.decoder.layers)


def load_tied() -> CausalFamily:
    from transformers import AutoModelForImageTextToText

    from normtune.models.families.gemma3 import Gemma3Family

    config, processor = tiny_models.gemma3()
    config.tie_word_embeddings = True
    model: Any = AutoModelForImageTextToText.from_config(config)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    return Gemma3Family(model.eval(), processor)


def test_layers_that_take_image_features_are_not_in_a_trunk(tmp_path: Any) -> None:
    """Qwen3-VL's first two layers do: if norms are trained from the second on, all layers run."""
    family = load(str(tiny_models.make_tiny("qwen3_vl", tmp_path)))
    tuned = adapt(family.model, "language=ln[1:]")
    assert family.frozen_trunk(tuned.trained.values()) is None


def test_paligemma_has_no_trunk(tmp_path: Any) -> None:
    family = load(str(tiny_models.make_tiny("paligemma", tmp_path)))
    tuned = adapt(family.model, "language=ln[1:]")
    assert family.frozen_trunk(tuned.trained.values()) is None


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("method", ["ln", "lora(r=2)", "prefix(n=3)"])
def test_miss_reads_question_states_if_only_the_decoder_is_trained(grouping: str, method: str) -> None:
    assert_same_step(*adapted_copy(tiny_miss(), f"decoder={method}"), grouping)


@pytest.mark.parametrize("recipe", ["encoder=ln,decoder=ln", "vision=ln", "encoder=prefix(n=3)", "full"])
def test_miss_has_no_trunk_if_its_encoders_are_trained(recipe: str) -> None:
    family, tuned = adapted_copy(tiny_miss(), recipe)
    assert family.frozen_trunk(tuned.trained.values()) is None
