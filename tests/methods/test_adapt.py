"""What a recipe trains, and that nothing else moves."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from normtune.errors import InputError
from normtune.methods.adapt import adapt, restore_base, select_parameters
from normtune.methods.norms import TunedNorm
from normtune.methods.recipe import parse, resolve
from normtune.methods.registry import RecipeError
from normtune.models.parts import find_parts
from normtune.training.changes import change_report
from tests.support.base_models import KINDS, base, logits, train_a_little

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
    """A scalar that every logit of two image-question pairs enters, with gradients."""
    with_gradients = logits.__wrapped__  # type: ignore[attr-defined]
    return -with_gradients(model).float().log_softmax(-1)[..., 7].sum()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_only_what_the_recipe_names_learns_and_the_rest_stays_to_the_bit(
    kind: str, dtype: torch.dtype, recipe: str
) -> None:
    model = base(kind, dtype)
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    tuned = adapt(model, recipe)
    assert all(p.dtype == torch.float32 for p in tuned.trained.values())
    wanted = {id(p) for p in tuned.trained.values()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == wanted
    frozen = {name: p for name, p in model.named_parameters() if id(p) not in wanted}
    before = {name: p.detach().clone() for name, p in frozen.items()}
    start = {name: p.detach().clone() for name, p in tuned.trained.items()}
    for name in values.keys() & start.keys():
        assert torch.equal(start[name].to(dtype), values[name])
    step(model, list(tuned.trained.values()))
    assert all(p.grad is None for p in frozen.values())
    assert all(torch.equal(p, before[name]) for name, p in frozen.items())
    moved = [name for name, p in tuned.trained.items() if not torch.equal(p, start[name])]
    silent = set(tuned.trained) - set(moved)
    assert not {
        name for name in silent if tuned.trained[name].grad is not None and tuned.trained[name].grad.any()
    }
    assert len(moved) > len(tuned.trained) / 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recipe", ["ln", "attention", "ffn", "full", "ln+bias"])
def test_an_untouched_tuned_model_gives_the_bases_logits(kind: str, recipe: str) -> None:
    for dtype in DTYPES:
        model = base(kind, dtype)
        expected = logits(model)
        adapt(model, recipe)
        close = 2e-6 if dtype == torch.float32 else 0.1  # torch's bf16 layer norm rounds in another order
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=close)


@pytest.mark.parametrize("kind", KINDS)
def test_ln_in_fp32_has_the_gradients_of_plain_autograd(kind: str) -> None:
    tuned = adapt(base(kind), "ln")
    plain = base(kind).requires_grad_(False)
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
            torch.testing.assert_close(parameter.grad, theirs, rtol=1e-4, atol=1e-5)


def test_every_gain_of_a_bf16_base_moves_at_lr_1e_4() -> None:
    tuned = adapt(base("miss", torch.bfloat16), "ln")
    before = copy.deepcopy(tuned.trained)
    for _ in range(5):
        tuned.model.zero_grad()
        step(tuned.model, list(tuned.trained.values()), lr=1e-4)
    report = change_report(before, tuned)
    assert report.share == 1.0
    assert report.warning is None


@pytest.mark.parametrize("kind", KINDS)
def test_untune_gives_the_base_back(kind: str) -> None:
    for dtype in DTYPES:
        model = base(kind, dtype)
        expected, before = logits(model), state(model)
        tuned = adapt(model, "ln+lora(r=2)")
        train_a_little(tuned)
        assert not torch.equal(logits(model), expected)
        assert restore_base(tuned) is model
        assert torch.equal(logits(model), expected)
        after = state(model)
        assert list(after) == list(before)
        assert all(
            torch.equal(after[name], value) and after[name].dtype == value.dtype
            for name, value in before.items()
        )


def test_untune_refuses_where_the_bases_values_are_gone() -> None:
    tuned = adapt(base("miss"), "encoder=ffn")
    with pytest.raises(InputError, match="was trained in place"):
        restore_base(tuned)


def test_tied_tensors_stay_tied_when_they_are_trained_from_bf16() -> None:
    model = base("miss", torch.bfloat16)
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
    found = find_parts(base("miss"))

    def chosen(text: str) -> list[str]:
        return select_parameters(found, resolve(parse(text), found.parts))

    roles = {place.name: (place.part, place.role, place.layer) for place in found.parameters}
    assert {roles[name][:2] for name in chosen("encoder=ln")} == {("encoder", "norm")}
    assert {roles[name] for name in chosen("decoder=attention[1:]")} == {("decoder", "attention", 1)}
    assert chosen("full") == [place.name for place in found.parameters]
    assert chosen("ffn") == [place.name for place in found.parameters if place.role == "ffn"]
    gains, shifts = chosen("ln(bias=0)"), chosen("ln(gain=0)")
    assert sorted(gains + shifts) == sorted(chosen("ln")) and all(name.endswith("weight") for name in gains)
    biases = chosen("bias")
    assert all(name.endswith("bias") and roles[name][1] != "norm" for name in biases)
    both = [place.name for place in found.parameters if place.role == "norm" or place.name in biases]
    assert chosen("ln+bias") == both
    assert chosen("encoder=ln[-1:]") == [name for name in chosen("encoder=ln") if ".layer.1." in name]
    assert chosen("frozen") == []


@pytest.mark.parametrize(
    ("kind", "recipe", "message"),
    [
        (
            "llava",
            "connector=ln",
            "'ln' finds nothing in part 'connector'; parts that have some: vision, language",
        ),
        ("miss", "encoder=ln[7:]", "'ln[7:]' finds nothing: part 'encoder' has 2 layers. Change the range"),
        (
            "llava",
            "language=bias",
            "'bias' finds nothing in part 'language'; parts that have some: vision, connector",
        ),
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
def test_a_recipe_that_finds_nothing_is_refused_by_name(kind: str, recipe: str, message: str) -> None:
    model = base(kind)
    before = [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(RecipeError) as caught:
        adapt(model, recipe)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [(name, type(module)) for name, module in model.named_modules()] == before


def test_norms_are_replaced_only_where_they_are_trained() -> None:
    tuned = adapt(base("llava"), "language=ln[1:]")
    replaced = {name for name, module in tuned.model.named_modules() if isinstance(module, TunedNorm)}
    assert replaced == set(tuned.base_norms)
    assert all("language_model.layers.1." in name for name in replaced)
    assert len(replaced) == 2


def test_places_and_methods_say_where_each_trained_tensor_is_from() -> None:
    tuned = adapt(base("llava"), "vision=ln,connector=full,language=lora(r=2)")
    assert set(tuned.part_and_role) == set(tuned.methods) == set(tuned.trained)
    assert set(tuned.methods.values()) == {"ln", "full", "lora"}
    assert set(tuned.part_and_role.values()) == {
        ("vision", "norm"),
        ("connector", "other"),
        ("language", "lora"),
    }


def test_the_change_report_says_how_far_each_role_went() -> None:
    tuned = adapt(base("miss"), "encoder=ln,decoder=lora(r=2)")
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
    with pytest.raises(InputError, match="no earlier value"):
        change_report({}, tuned)
