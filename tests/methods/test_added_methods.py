"""LoRA, IA3, prefixes and adapters: what is added where, and that it computes what it should."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from normtune.errors import InputError
from normtune.methods.adapt import adapt, restore_base
from normtune.methods.bottleneck import Bottleneck
from tests.support.base_models import CACHE, KINDS, base, logits, train_a_little


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["lora", "ia3", "adapter"])
def test_the_start_is_the_base(kind: str, method: str) -> None:
    model = base(kind)
    expected = logits(model)
    tuned = adapt(model, method)
    assert len(tuned.additions) == len([part for part, _ in tuned.recipe.parts if part != "connector"])
    assert torch.equal(logits(model), expected)
    train_a_little(tuned)
    assert not torch.allclose(logits(model), expected, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["prefix", "ptuning"])
def test_a_prefix_starts_near_the_base_but_not_at_it(kind: str, method: str) -> None:
    """Ten random keys take their share of the attention from the first step on, as in PEFT."""
    model = base(kind)
    expected = logits(model)
    adapt(model, method)
    assert not torch.equal(logits(model), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["lora", "ia3", "adapter", "prefix", "ptuning"])
def test_the_seed_decides_the_start_and_leaves_the_callers_numbers_alone(kind: str, method: str) -> None:
    torch.manual_seed(7)
    state = torch.get_rng_state()
    one, same, other = (adapt(base(kind), method, seed=seed).trained for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one[name], same[name]) for name in one)
    if method != "ia3":  # ones, whatever the seed
        assert any(not torch.equal(one[name], other[name]) for name in one)


def test_lora_stands_on_query_and_value_of_self_and_cross_attention() -> None:
    tuned = adapt(base("miss"), "encoder=lora(r=2)[1:]")
    layer = "text_encoder.encoder.layer.1"
    sites = [
        f"{layer}.{attention}.self.{leaf}"
        for attention in ("attention", "crossattention")
        for leaf in ("query", "value")
    ]
    assert set(tuned.trained) == {f"{site}.lora_{side}" for site in sites for side in "AB"}
    assert {tuple(p.shape) for p in tuned.trained.values()} == {(2, 16), (16, 2)}
    assert set(tuned.part_and_role.values()) == {("encoder", "lora")}


def test_ia3_stands_on_key_value_output_and_the_feed_forwards_input() -> None:
    tuned = adapt(base("miss"), "encoder=ia3[:1]")
    layer = "text_encoder.encoder.layer.0"
    sites = [
        f"{layer}.{attention}.{leaf}"
        for attention in ("attention", "crossattention")
        for leaf in ("self.key", "self.value", "output.dense")
    ]
    assert set(tuned.trained) == {f"{site}.ia3" for site in [*sites, f"{layer}.output.dense"]}
    assert tuned.trained[f"{layer}.output.dense.ia3"].numel() == 24  # scales the input of the last linear
    assert tuned.trained[f"{layer}.attention.self.key.ia3"].numel() == 16


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # asked by PEFT's own model
def test_lora_computes_what_pefts_own_model_does() -> None:
    ours = base("llava")
    tuned = adapt(ours, "language=lora(r=4,alpha=8)")
    train_a_little(tuned)
    theirs = base("llava")
    config = LoraConfig(r=4, lora_alpha=8, target_modules=r".*language_model.*\.(q_proj|v_proj)")
    peft_model = get_peft_model(theirs, config)
    state = dict(peft_model.named_parameters())
    with torch.no_grad():
        for name, value in tuned.trained.items():
            state[f"base_model.model.{name}.default.weight"].copy_(value)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-6)


def test_dropout_is_peft_lora_dropout() -> None:
    tuned = adapt(base("miss"), "decoder=lora(dropout=0.5)")
    train_a_little(tuned)
    tuned.model.eval()
    assert torch.equal(logits(tuned.model), logits(tuned.model))
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
def test_a_prefix_on_llava_is_a_cache_that_every_token_sees(method: str) -> None:
    """Reference: the same keys and values handed to the untouched model as its cache, positions from 0."""
    from transformers import DynamicCache

    plain, model = base("llava"), base("llava")
    tuned = adapt(model, f"language={method}")
    train_a_little(tuned)
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(5, 36, (2, 7), generator=generator)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, 5:] = 0
    with torch.no_grad():
        ours = model(input_ids=ids, attention_mask=mask).logits
        cache = DynamicCache()
        prefix = prefix_of(model, "language")
        for layer in range(2):
            key, value = (one.expand(2, -1, -1, -1).clone() for one in prefix(layer))
            cache.update(key, value, layer)
        theirs = plain(
            input_ids=ids,
            attention_mask=torch.cat([torch.ones(2, 3, dtype=torch.long), mask], 1),
            position_ids=torch.arange(7).expand(2, -1),
            **{CACHE: cache},
        ).logits
    seen = mask.bool()
    torch.testing.assert_close(ours[seen], theirs[seen], rtol=0, atol=2e-6)


def test_a_prefix_on_llava_generates_the_same_with_and_without_a_cache() -> None:
    model = base("llava")
    train_a_little(adapt(model, "language=ptuning(n=3)"))
    ids = torch.randint(5, 36, (2, 7), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        first = model(input_ids=ids[:, :4], use_cache=True)
        cache, pieces = first[CACHE], [first.logits]
        for column in range(4, 7):
            step = model(input_ids=ids[:, column : column + 1], use_cache=True, **{CACHE: cache})
            pieces.append(step.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=2e-6)


def test_a_prefix_on_miss_is_seen_by_every_query_of_self_attention() -> None:
    """Reference: the attention written out by hand."""
    model = base("miss")
    train_a_little(adapt(model, "encoder=ptuning(n=3)"))
    attention = model.get_submodule("text_encoder.encoder.layer.1.attention.self")
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(4))
    seen: list[Tensor] = []
    attention.register_forward_hook(lambda module, args, out: seen.append(out))
    inputs: list[Tensor] = []
    attention.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.no_grad():
        logits(model)
        x = inputs[0]
        heads = 2
        query, key, value = (
            linear(x).view(*x.shape[:2], heads, -1).transpose(1, 2)
            for linear in (attention.query, attention.key, attention.value)
        )
        more_keys, more_values = (one.expand(len(x), -1, -1, -1) for one in prefix_of(model, "encoder")(1))
        key, value = torch.cat([more_keys, key], 2), torch.cat([more_values, value], 2)
        weights = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1)
        expected = (weights @ value).transpose(1, 2).flatten(2)
    out = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


def test_prefixes_leave_vision_alone_unless_they_are_asked_to() -> None:
    assert {place[0] for place in adapt(base("miss"), "prefix").part_and_role.values()} == {
        "encoder",
        "decoder",
    }
    assert {place[0] for place in adapt(base("llava"), "prefix").part_and_role.values()} == {"language"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["lora", "ia3", "adapter", "prefix", "ptuning", "ln+lora+adapter+ptuning"])
def test_what_was_added_comes_off_again(kind: str, method: str) -> None:
    model = base(kind)
    expected, names = logits(model), list(model.state_dict())
    tuned = adapt(model, method)
    train_a_little(tuned)
    assert not torch.equal(logits(model), expected)
    assert restore_base(tuned) is model
    assert torch.equal(logits(model), expected)
    assert list(model.state_dict()) == names


def test_two_methods_on_one_linear_are_refused_and_the_model_stays_whole() -> None:
    model = base("miss")
    expected = logits(model)
    with pytest.raises(InputError, match="only one of lora and ia3"):
        adapt(model, "lora+ia3")
    assert torch.equal(logits(model), expected)
    adapt(model, "encoder=lora[:1]+ia3[1:]")


def test_a_part_without_a_place_for_the_method_is_refused_where_it_was_named() -> None:
    with pytest.raises(InputError, match="lora finds no query or value projection in part 'connector'"):
        adapt(base("llava"), "connector=lora")
    adapt(base("llava"), "connector?=lora,language=lora")
