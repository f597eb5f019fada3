"""`adapt` trains what the recipe selects and changes nothing else."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from normtune.adapters.fingerprint import fingerprint
from normtune.adapters.storage import load_adapter, save_adapter
from normtune.errors import InputError
from normtune.methods.adapt import adapt, restore_base, select_parameters
from normtune.methods.norms import TunedNorm
from normtune.methods.recipe import parse, resolve
from normtune.methods.registry import RecipeError
from normtune.models.parts import find_parts, unused_parameters
from normtune.training.changes import change_report
from tests.support.base_models import KINDS, compute_logits, perturb_trained, tiny_base
from tests.support.tolerance import MODEL_TERMS, assert_close

RECIPES = (
    "ln",
    "ln-language",
    "ln(bias=0)",
    "ln+bias",
    "attention",
    "ffn",
    "full",
    "lora-4",
    "prefix",
    "ptuning",
    "ia3",
    "adapter",
    "vision=ln,language=lora(r=2)",
    "ln+lora(r=2)+adapter(width=4)",
)
DTYPES = (torch.float32, torch.bfloat16)


def step(model: nn.Module, parameters: list[nn.Parameter], lr: float = 1e-2) -> None:
    """One AdamW step."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.1)
    loss(model).backward()
    optimizer.step()


def loss(model: nn.Module) -> Tensor:
    """A scalar that depends on every logit of two image-question pairs, with gradients."""
    with_gradients = compute_logits.__wrapped__  # type: ignore[attr-defined]
    return -with_gradients(model).float().log_softmax(-1)[..., 7].sum()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_selected_parameters_train_and_all_others_stay_the_same_to_the_bit(
    kind: str, dtype: torch.dtype, recipe: str
) -> None:
    model = tiny_base(kind, dtype)
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    tuned = adapt(model, recipe)
    assert all(p.dtype == torch.float32 for p in tuned.trained.values())
    trained_ids = {id(p) for p in tuned.trained.values()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == trained_ids
    frozen = {name: p for name, p in model.named_parameters() if id(p) not in trained_ids}
    before = {name: p.detach().clone() for name, p in frozen.items()}
    start = {name: p.detach().clone() for name, p in tuned.trained.items()}
    for name in values.keys() & start.keys():
        assert torch.equal(start[name].to(dtype), values[name])
    step(model, list(tuned.trained.values()))
    assert all(p.grad is None for p in frozen.values())
    assert all(torch.equal(p, before[name]) for name, p in frozen.items())
    moved = [name for name, p in tuned.trained.items() if not torch.equal(p, start[name])]
    for name in tuned.trained.keys() - set(moved):  # only parameters without a gradient may stay
        grad = tuned.trained[name].grad
        assert grad is None or not grad.any()
    assert len(moved) > len(tuned.trained) / 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recipe", ["ln", "attention", "ffn", "full", "ln+bias"])
def test_an_untouched_tuned_model_gives_the_bases_logits(kind: str, recipe: str) -> None:
    for dtype in DTYPES:
        model = tiny_base(kind, dtype)
        expected = compute_logits(model)
        adapt(model, recipe)
        # bf16 layer norms of torch round in another order; their sums are fp32, so that few roundings add up
        assert_close(compute_logits(model), expected, terms=MODEL_TERMS if dtype == torch.float32 else 16)


@pytest.mark.parametrize("kind", KINDS)
def test_ln_in_fp32_has_the_gradients_of_plain_autograd(kind: str) -> None:
    tuned = adapt(tiny_base(kind), "ln")
    plain = tiny_base(kind).requires_grad_(False)
    parameters = dict(plain.named_parameters())
    for name in tuned.trained:
        parameters[name].requires_grad_(True)
    for model in (tuned.model, plain):
        loss(model).backward()
    for name, parameter in tuned.trained.items():
        theirs = parameters[name].grad
        if theirs is None:  # the last vision layer is not read by LLaVA
            assert parameter.grad is None
        else:
            assert_close(parameter.grad, theirs, msg=name)


def test_every_gain_of_a_bf16_base_moves_at_lr_1e_4() -> None:
    tuned = adapt(tiny_base("miss", torch.bfloat16), "ln")
    before = copy.deepcopy(tuned.trained)
    for _ in range(5):
        tuned.model.zero_grad()
        step(tuned.model, list(tuned.trained.values()), lr=1e-4)
    report = change_report(before, tuned)
    assert report.share == 1.0
    assert report.warning is None


@pytest.mark.parametrize("kind", KINDS)
def test_restore_base_restores_modules_and_values(kind: str) -> None:
    for dtype in DTYPES:
        model = tiny_base(kind, dtype)
        expected, before = compute_logits(model), state(model)
        tuned = adapt(model, "ln+lora(r=2)")
        perturb_trained(tuned)
        assert not torch.equal(compute_logits(model), expected)
        assert restore_base(tuned) is model
        assert torch.equal(compute_logits(model), expected)
        after = state(model)
        assert list(after) == list(before)
        assert all(
            torch.equal(after[name], value) and after[name].dtype == value.dtype for name, value in before.items()
        )


def test_restore_base_refuses_if_the_bases_values_were_overwritten() -> None:
    tuned = adapt(tiny_base("miss"), "encoder=ffn")
    with pytest.raises(InputError, match="was trained in place"):
        restore_base(tuned)


def test_tied_tensors_stay_tied_when_they_are_trained_from_bf16() -> None:
    model = tiny_base("miss", torch.bfloat16)
    tuned = adapt(model, "decoder=full")
    head = model.get_submodule("text_decoder.cls.predictions.decoder")
    words = model.get_submodule("text_decoder.bert.embeddings.word_embeddings")
    assert torch.equal(head.weight, words.weight)
    step(model, list(tuned.trained.values()))
    assert torch.equal(head.weight, words.weight)
    assert head.weight.dtype == torch.bfloat16
    name = next(name for name, p in tuned.trained.items() if p.shape == (40, 16))
    assert torch.equal(tuned.trained[name].bfloat16(), head.weight)


def test_a_recipe_selects_by_part_role_and_layer() -> None:
    parts = find_parts(tiny_base("miss"))

    def selected(text: str) -> list[str]:
        return list(select_parameters(parts, resolve(parse(text), parts.parts)))

    roles = {info.name: (info.part, info.role, info.layer) for info in parts.parameters}
    assert {roles[name][:2] for name in selected("encoder=ln")} == {("encoder", "norm")}
    assert {roles[name] for name in selected("decoder=attention[1:]")} == {("decoder", "attention", 1)}
    assert selected("full") == [info.name for info in parts.parameters]
    assert selected("ffn") == [info.name for info in parts.parameters if info.role == "ffn"]
    gains, shifts = selected("ln(bias=0)"), selected("ln(gain=0)")
    assert sorted(gains + shifts) == sorted(selected("ln")) and all(name.endswith("weight") for name in gains)
    biases = selected("bias")
    assert all(name.endswith("bias") and roles[name][1] != "norm" for name in biases)
    norms_and_biases = [info.name for info in parts.parameters if info.role == "norm" or info.name in biases]
    assert selected("ln+bias") == norms_and_biases
    assert selected("encoder=ln[-1:]") == [name for name in selected("encoder=ln") if ".layer.1." in name]
    assert selected("frozen") == []


@pytest.mark.parametrize(
    ("kind", "recipe", "message"),
    [
        ("llava", "connector=ln", "'ln' finds nothing in part 'connector'; parts that have some: vision, language"),
        ("miss", "encoder=ln[7:]", "'ln[7:]' finds nothing: part 'encoder' has 2 layers. Change the range"),
        ("llava", "language=bias", "'bias' finds nothing in part 'language'; parts that have some: vision, connector"),
        (
            "llava",
            "language=ln(gain=0)",
            "'ln(gain=0)' finds nothing in part 'language'; parts that have some: vision. ",
        ),
        ("llava", "encoder=ln", "this model has no part 'encoder'"),
        ("miss", "connector=ln", "this model has no part 'connector'"),
        ("llava", "connector?=ln", "finds nothing to train"),
    ],
)
def test_a_recipe_that_finds_nothing_is_refused_with_part_and_method(kind: str, recipe: str, message: str) -> None:
    model = tiny_base(kind)
    before = [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(RecipeError) as caught:
        adapt(model, recipe)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [(name, type(module)) for name, module in model.named_modules()] == before


def test_norms_are_replaced_only_where_they_are_trained() -> None:
    tuned = adapt(tiny_base("llava"), "language=ln[1:]")
    replaced = {name for name, module in tuned.model.named_modules() if isinstance(module, TunedNorm)}
    assert replaced == set(tuned.base_norms)
    assert all("language_model.layers.1." in name for name in replaced)
    assert len(replaced) == 2


def test_every_trained_tensor_has_a_method_a_part_and_a_role() -> None:
    tuned = adapt(tiny_base("llava"), "vision=ln,connector=full,language=lora(r=2)")
    assert set(tuned.part_and_role) == set(tuned.methods) == set(tuned.trained)
    assert set(tuned.methods.values()) == {"ln", "full", "lora"}
    assert set(tuned.part_and_role.values()) == {("vision", "norm"), ("connector", "other"), ("language", "lora")}


@pytest.mark.parametrize("recipe", ["ln", "vision=full", "lora-4", "ln+bias", "ia3"])
def test_parameters_that_the_model_never_uses_are_left_out(recipe: str, tmp_path: Path) -> None:
    """LLaVA reads the states before the last layer of its image encoder."""
    model = tiny_base("llava")
    assert model.config.vision_feature_layer == -2
    fingerprint_of_base = fingerprint(model)
    everything = adapt(copy.deepcopy(model), recipe, train_unused=True)
    tuned = adapt(copy.deepcopy(model), recipe)
    loss(everything.model).backward()
    unused = {name for name, parameter in everything.trained.items() if parameter.grad is None}
    assert unused and set(everything.trained) - set(tuned.trained) == unused
    if recipe not in ("lora-4", "ia3"):  # values of the base, not of added layers
        assert tuned.left_out == everything.trainable - tuned.trainable and everything.left_out == 0
    # an adapter of an earlier version, which has them, still loads
    perturb_trained(everything)
    save_adapter(everything, tmp_path, base_name="tiny", base_fingerprint=fingerprint_of_base)
    loaded = load_adapter(model, tmp_path)
    assert loaded.trained.keys() == everything.trained.keys()
    assert torch.equal(compute_logits(loaded.model), compute_logits(everything.model))


def test_layers_are_counted_with_those_that_are_never_used() -> None:
    tuned = adapt(tiny_base("llava"), "vision=ln[-2:]")
    layers = {info.layer for info in tuned.parts.parameters if info.name in tuned.trained}
    assert layers == {tuned.parts.depth("vision") - 2}
    with pytest.raises(InputError, match="finds nothing to train"):
        adapt(tiny_base("llava"), "vision=ln[-1:]")
    model = tiny_base("llava")
    model.config.vision_feature_layer = -1
    assert unused_parameters(model, find_parts(model)) == frozenset()
    model.config.vision_feature_layer = [0, 1]
    assert {
        name.rpartition(".")[0].split(".layers.")[-1][0] for name in unused_parameters(model, find_parts(model))
    } >= {"1"}


def test_the_change_report_has_the_change_of_each_role() -> None:
    tuned = adapt(tiny_base("miss"), "encoder=ln,decoder=lora(r=2)")
    before = copy.deepcopy(tuned.trained)
    report = change_report(before, tuned)
    assert report.share == 0
    assert report.warning is not None and "only 0.00%" in report.warning
    with torch.no_grad():
        for name, parameter in tuned.trained.items():
            if tuned.part_and_role[name] == ("encoder", "norm"):
                parameter.mul_(1.5)
    report = change_report(before, tuned)
    assert report.warning is None
    changes = {(change.part, change.role): change for change in report.changes}
    norm, lora = changes["encoder", "norm"], changes["decoder", "lora"]
    assert norm.changed == 1.0
    assert norm.relative == pytest.approx(0.5)
    assert lora.changed == 0.0
    assert report.share == pytest.approx(norm.values / (norm.values + lora.values))
    with torch.no_grad():
        next(iter(tuned.trained.values()))[0] = torch.nan
    broken = change_report(before, tuned)
    assert broken.warning is not None and "1 trained values are not finite" in broken.warning
    with pytest.raises(InputError, match="no value from before training"):
        change_report({}, tuned)
