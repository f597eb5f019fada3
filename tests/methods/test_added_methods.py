"""LoRA, IA3, prefixes and bottleneck adapters: where they are added and what they compute."""

from __future__ import annotations

import copy
from inspect import unwrap
from typing import Any

import pytest
import torch
from peft import BeftConfig, LoraConfig, MissConfig, PeftConfig, RoadConfig, VeraConfig, get_peft_model
from torch import Tensor, nn

from normtune.errors import InputError
from normtune.methods.adapt import adapt, restore_base
from normtune.methods.output_modules import Bottleneck
from tests.support.base_models import CACHE_ARGUMENT, KINDS, compute_logits, perturb_trained, tiny_base
from tests.support.tolerance import assert_close, differ

VECTORS = ["vera(r=4)", "road", "miss(columns=4)", "beft", "ssf", "gamma"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["lora", "ia3", "adapter", *VECTORS])
def test_an_untrained_method_gives_the_bases_logits(kind: str, method: str) -> None:
    model = tiny_base(kind)
    expected = compute_logits(model)
    tuned = adapt(model, method)
    assert len(tuned.additions) == len([part for part, _ in tuned.recipe.parts if part != "connector"])
    assert torch.equal(compute_logits(model), expected)
    perturb_trained(tuned)
    assert differ(compute_logits(model), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["prefix", "ptuning"])
def test_an_untrained_prefix_changes_the_logits(kind: str, method: str) -> None:
    """Ten random keys receive a share of the attention from the first step on, as in PEFT."""
    model = tiny_base(kind)
    expected = compute_logits(model)
    adapt(model, method)
    assert not torch.equal(compute_logits(model), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["lora", "ia3", "adapter", "prefix", "ptuning"])
def test_the_seed_decides_the_initial_values_and_the_callers_random_state_stays(kind: str, method: str) -> None:
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first, same, other = (adapt(tiny_base(kind), method, seed=seed).trained for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], same[name]) for name in first)
    if method != "ia3":  # starts with ones, whatever the seed
        assert any(not torch.equal(first[name], other[name]) for name in first)


def test_lora_is_added_to_query_and_value_of_self_and_cross_attention() -> None:
    tuned = adapt(tiny_base("miss"), "encoder=lora(r=2)[1:]")
    layer = "text_encoder.encoder.layer.1"
    linears = [
        f"{layer}.{attention}.self.{leaf}"
        for attention in ("attention", "crossattention")
        for leaf in ("query", "value")
    ]
    assert set(tuned.trained) == {f"{linear}.lora_{side}" for linear in linears for side in "AB"}
    assert {tuple(p.shape) for p in tuned.trained.values()} == {(2, 16), (16, 2)}
    assert set(tuned.part_and_role.values()) == {("encoder", "lora")}


def test_ia3_is_added_to_key_value_output_and_the_feed_forwards_input() -> None:
    tuned = adapt(tiny_base("miss"), "encoder=ia3[:1]")
    layer = "text_encoder.encoder.layer.0"
    linears = [
        f"{layer}.{attention}.{leaf}"
        for attention in ("attention", "crossattention")
        for leaf in ("self.key", "self.value", "output.dense")
    ]
    assert set(tuned.trained) == {f"{linear}.ia3" for linear in [*linears, f"{layer}.output.dense"]}
    assert tuned.trained[f"{layer}.output.dense.ia3"].numel() == 24  # scales the input of the last linear
    assert tuned.trained[f"{layer}.attention.self.key.ia3"].numel() == 16


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # PEFT's model reads it
@pytest.mark.parametrize(
    ("options", "peft_options"),
    [
        ("", {"target_modules": r".*language_model.*\.(q_proj|v_proj)"}),
        (",rslora=1", {"target_modules": r".*language_model.*\.(q_proj|v_proj)", "use_rslora": True}),
        (",dora=1", {"target_modules": r".*language_model.*\.(q_proj|v_proj)", "use_dora": True}),
        (",targets=all-linear,dora=1", {"target_modules": r".*language_model.*_proj", "use_dora": True}),
        (",targets=o_proj+mlp.down_proj", {"target_modules": r".*language_model.*(o_proj|mlp\.down_proj)"}),
    ],
)
def test_lora_computes_what_pefts_own_model_does(options: str, peft_options: dict[str, Any]) -> None:
    ours = tiny_base("llava")
    tuned = adapt(ours, f"language=lora(r=4,alpha=8{options})")
    perturb_trained(tuned)
    theirs = tiny_base("llava")
    peft_model = get_peft_model(theirs, LoraConfig(r=4, lora_alpha=8, **peft_options))
    state = dict(peft_model.named_parameters())
    names = {name: f"base_model.model.{name}.default.weight" for name in tuned.trained}
    assert set(names.values()) == {name for name, parameter in state.items() if parameter.requires_grad}
    with torch.no_grad():
        for name, value in tuned.trained.items():
            state[names[name]].copy_(value)
    assert_close(compute_logits(ours), compute_logits(theirs))
    for model in (ours, theirs):
        unwrap(compute_logits)(model).square().sum().backward()  # without its no_grad
    for name, parameter in tuned.trained.items():
        assert_close(parameter.grad, state[names[name]].grad, msg=name)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning", "ignore:Detected that the base layer")
@pytest.mark.parametrize(
    ("method", "config"),
    [
        ("vera(r=4)", VeraConfig(r=4, target_modules=r".*language_model.*\.(q_proj|v_proj)")),
        ("beft", BeftConfig(target_modules=r".*language_model.*\.v_proj")),
        ("road[:1]", RoadConfig(group_size=16, target_modules=r".*language_model.*layers\.0\..*_proj")),
        ("miss(columns=4)", MissConfig(r=2, mini_r=4, init_weights="mini", target_modules=r".*language_model.*_proj")),
    ],
)
def test_vectors_compute_what_pefts_own_model_does(method: str, config: PeftConfig) -> None:
    ours, theirs = tiny_base("llava"), tiny_base("llava")
    tuned = adapt(ours, f"language={method}")
    perturb_trained(tuned)
    state = dict(get_peft_model(theirs, config).named_parameters())
    names = {name: f"base_model.model.{name}.default" for name in tuned.trained}
    assert set(names.values()) == {name for name, parameter in state.items() if parameter.requires_grad}
    with torch.no_grad():
        for name, value in tuned.trained.items():
            state[names[name]].copy_(value)
    assert_close(compute_logits(ours), compute_logits(theirs))
    for model in (ours, theirs):
        unwrap(compute_logits)(model).square().sum().backward()  # without its no_grad
    for name, parameter in tuned.trained.items():
        assert_close(parameter.grad, state[names[name]].grad, msg=name)


def test_vectors_behind_linears_are_rows_of_the_weights_and_biases() -> None:
    """SSF: scale * (W x + b) + shift = (scale W) x + (scale b + shift)."""
    expected, model = tiny_base("miss"), tiny_base("miss")
    tuned = adapt(model, "encoder=ssf")
    perturb_trained(tuned)
    with torch.no_grad():
        for name in {name.rpartition(".ssf.")[0] for name in tuned.trained}:
            scale, shift = (tuned.trained[f"{name}.ssf.{vector}"] for vector in ("scale", "shift"))
            linear = expected.get_submodule(name)
            linear.weight.mul_(scale[:, None])
            linear.bias.mul_(scale).add_(shift)
    assert_close(compute_logits(model), compute_logits(expected))


@pytest.mark.parametrize("method", ["adapter", "ssf", "gamma"])
def test_a_copy_of_the_model_has_vectors_of_its_own(method: str) -> None:
    tuned = adapt(tiny_base("miss"), method)
    expected, copied = compute_logits(tuned.model), copy.deepcopy(tuned.model)
    perturb_trained(tuned)
    assert differ(compute_logits(tuned.model), expected)
    assert torch.equal(compute_logits(copied), expected)


def test_difffit_scales_what_each_block_adds_to_the_residual_stream() -> None:
    tuned = adapt(tiny_base("miss"), "encoder=gamma[:1]")
    layer = "text_encoder.encoder.layer.0"
    blocks = ("attention.output.dense", "crossattention.output.dense", "output.dense")
    assert set(tuned.trained) == {f"{layer}.{block}.gamma.scale" for block in blocks}


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
@pytest.mark.parametrize("targets", ["all-linear", "q_proj+fc2+linear_1"])
def test_targets_are_pefts_target_modules(targets: str) -> None:
    """The same linears, number of parameters, logits and gradients, from the same initial values."""
    ours = tiny_base("llava")
    tuned = adapt(ours, f"lora(r=3,targets={targets})", train_unused=True)
    names = "all-linear" if targets == "all-linear" else targets.split("+")
    theirs = tiny_base("llava")
    peft_model = get_peft_model(theirs, LoraConfig(r=3, lora_alpha=16, target_modules=names))
    state = {
        name.removeprefix("base_model.model.").replace(".default.weight", ""): parameter
        for name, parameter in peft_model.named_parameters()
        if parameter.requires_grad
    }
    assert set(state) == set(tuned.trained)
    assert tuned.trainable == peft_model.get_nb_trainable_parameters()[0]
    with torch.no_grad():
        for name, parameter in tuned.trained.items():
            state[name].copy_(parameter)  # B is zero: A has a gradient from the second step on
    for _ in range(2):
        for model in (ours, theirs):
            unwrap(compute_logits)(model).square().sum().backward()
        for name, parameter in tuned.trained.items():
            if parameter.grad is not None:  # the last layer of the vision tower is not used
                assert_close(parameter.grad, state[name].grad, msg=name)
        with torch.no_grad():
            for parameter in [*tuned.trained.values(), *state.values()]:
                if parameter.grad is not None:
                    parameter -= 0.01 * parameter.grad
                    parameter.grad = None
    assert_close(compute_logits(ours), compute_logits(theirs))
    assert differ(compute_logits(ours), compute_logits(tiny_base("llava")))


def test_a_target_of_no_linear_is_refused_with_those_of_the_model() -> None:
    model = tiny_base("llava")
    expected = compute_logits(model)
    with pytest.raises(
        InputError, match=r"no linear 'q_prj' in language, did you mean 'q_proj'\? \(linears: down_proj"
    ):
        adapt(model, "language=lora(targets=q_prj+v_proj)")
    with pytest.raises(InputError, match="no linear 'lm_head' in vision, connector, language"):
        adapt(model, "lora(targets=lm_head)")  # all-linear leaves it out, too
    with pytest.raises(InputError, match="lora finds no linear of 'lora"):
        adapt(model, "connector=lora(targets=q_proj),language=lora(targets=q_proj)")
    assert torch.equal(compute_logits(model), expected)
    assert {part for part, _ in adapt(model, "lora(targets=linear_1)").part_and_role.values()} == {"connector"}
    layers = adapt(tiny_base("llava"), "language=lora(targets=all-linear)[1:]").trained
    assert layers
    assert all(".layers.1." in name for name in layers)


def test_dropout_is_peft_lora_dropout() -> None:
    tuned = adapt(tiny_base("miss"), "decoder=lora(dropout=0.5)")
    perturb_trained(tuned)
    tuned.model.eval()
    assert torch.equal(compute_logits(tuned.model), compute_logits(tuned.model))
    layer = next(iter(tuned.additions[0].layers.values()))
    assert layer.lora_dropout["normtune"].p == 0.5


def test_a_bottleneck_adds_to_its_input_in_the_inputs_dtype() -> None:
    adapter = Bottleneck(6, 3, torch.device("cpu"))
    x = torch.randn(2, 5, 6)
    assert torch.equal(adapter(x), x)
    with torch.no_grad():
        adapter.up.weight.normal_()
        adapter.up.bias.normal_()
    expected = x + adapter.up(torch.relu(adapter.down(x)))
    torch.testing.assert_close(adapter(x), expected)
    assert adapter(x.bfloat16()).dtype == torch.bfloat16
    assert adapter.up.weight.dtype == torch.float32


def prefix_of(tuned_model: nn.Module, part: str) -> nn.Module:
    return tuned_model.get_submodule(f"normtune_prefix_{part}")


@pytest.mark.parametrize("method", ["prefix(n=3)", "ptuning(n=3)"])
def test_a_prefix_on_llava_acts_like_a_cache_that_every_token_sees(method: str) -> None:
    """Reference: the same keys and values passed to the base as its cache, with positions from 0."""
    from transformers import DynamicCache

    plain, model = tiny_base("llava"), tiny_base("llava")
    tuned = adapt(model, f"language={method}")
    perturb_trained(tuned)
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(5, 36, (2, 7), generator=generator)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, 5:] = 0
    with torch.no_grad():
        ours = model(input_ids=ids, attention_mask=mask).logits
        cache = DynamicCache()
        prefix = prefix_of(model, "language")
        for layer in range(2):
            key, value = (tensor.expand(2, -1, -1, -1).clone() for tensor in prefix(layer))
            cache.update(key, value, layer)
        theirs = plain(
            input_ids=ids,
            attention_mask=torch.cat([torch.ones(2, 3, dtype=torch.long), mask], 1),
            position_ids=torch.arange(7).expand(2, -1),
            **{CACHE_ARGUMENT: cache},
        ).logits
    valid = mask.bool()
    assert_close(ours[valid], theirs[valid])


def test_a_prefix_on_llava_gives_the_same_logits_with_and_without_a_cache() -> None:
    model = tiny_base("llava")
    perturb_trained(adapt(model, "language=ptuning(n=3)"))
    ids = torch.randint(5, 36, (2, 7), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        first = model(input_ids=ids[:, :4], use_cache=True)
        cache, pieces = first[CACHE_ARGUMENT], [first.logits]
        for column in range(4, 7):
            step = model(input_ids=ids[:, column : column + 1], use_cache=True, **{CACHE_ARGUMENT: cache})
            pieces.append(step.logits)
    assert_close(torch.cat(pieces, 1), whole)


def test_a_prefix_on_miss_is_seen_by_every_query_of_self_attention() -> None:
    """Reference: the formula of the attention."""
    model = tiny_base("miss")
    perturb_trained(adapt(model, "encoder=ptuning(n=3)"))
    attention = model.get_submodule("text_encoder.encoder.layer.1.attention.self")
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(4))
    outputs: list[Tensor] = []
    attention.register_forward_hook(lambda module, args, out: outputs.append(out))
    inputs: list[Tensor] = []
    attention.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.no_grad():
        compute_logits(model)
        x = inputs[0]
        heads = 2
        query, key, value = (
            linear(x).view(*x.shape[:2], heads, -1).transpose(1, 2)
            for linear in (attention.query, attention.key, attention.value)
        )
        learned = prefix_of(model, "encoder")(1)
        prefix_keys, prefix_values = (tensor.expand(len(x), -1, -1, -1) for tensor in learned)
        key, value = torch.cat([prefix_keys, key], 2), torch.cat([prefix_values, value], 2)
        weights = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1)
        expected = (weights @ value).transpose(1, 2).flatten(2)
    out = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]
    assert_close(out, expected)


def test_prefixes_on_all_parts_skip_vision() -> None:
    for kind, parts in (("miss", {"encoder", "decoder"}), ("llava", {"language"})):
        assert {part for part, _ in adapt(tiny_base(kind), "prefix").part_and_role.values()} == parts


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["lora", "ia3", "adapter", "prefix", "ptuning", "ln+lora+adapter+ptuning", *VECTORS])
def test_restore_base_removes_added_layers(kind: str, method: str) -> None:
    model = tiny_base(kind)
    expected, names = compute_logits(model), list(model.state_dict())
    tuned = adapt(model, method)
    perturb_trained(tuned)
    assert not torch.equal(compute_logits(model), expected)
    assert restore_base(tuned) is model
    assert torch.equal(compute_logits(model), expected)
    assert list(model.state_dict()) == names


def test_two_methods_on_one_linear_are_refused_and_the_model_is_unchanged() -> None:
    model = tiny_base("miss")
    expected = compute_logits(model)
    with pytest.raises(InputError, match="only one of lora and ia3"):
        adapt(model, "lora+ia3")
    assert torch.equal(compute_logits(model), expected)
    adapt(model, "encoder=lora[:1]+ia3[1:]")


def test_a_part_without_a_layer_for_the_method_is_refused_unless_it_is_optional() -> None:
    with pytest.raises(InputError, match="lora finds no query or value projection in part 'connector'"):
        adapt(tiny_base("llava"), "connector=lora")
    adapt(tiny_base("llava"), "connector?=lora,language=lora")
