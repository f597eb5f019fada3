"""Modules that save fewer activations compute the same, and save the bytes of the table in the module."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaModel
from transformers.activations import ACT2FN

from normtune.methods.adapt import adapt
from normtune.methods.norms import TunedNorm
from normtune.models.families.llava import LlavaFamily
from normtune.training.memory_plan.live_bytes import LiveTensorBytes
from normtune.training.saved_activations import identify_activation, save_fewer_activations
from tests.support.tiny_models import make_tiny
from tests.support.tolerance import MODEL_TERMS, assert_close, relative_bound, relative_error

WIDTH, FORWARD, HEADS, LENGTH = 64, 176, 4, 32


def llama(layers: int = 1, dtype: torch.dtype = torch.float32, **options: Any) -> LlamaModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": WIDTH,
        "intermediate_size": FORWARD,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "vocab_size": 50,
    }
    return LlamaModel(LlamaConfig(**sizes | options)).to(dtype)


def norms_trained(model: nn.Module, *, tuned: bool) -> nn.Module:
    """Train only the norms: transformers' own, or `TunedNorm` in their place."""
    model.requires_grad_(False)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if "norm" in name:
                child.requires_grad_(True)
                if tuned:
                    setattr(parent, name, TunedNorm.from_norm(child))
    return model


def run(model: Any) -> Tensor:
    """Return a scalar of the model's last hidden states."""
    dtype = next(p for n, p in model.named_parameters() if "embed" in n).dtype
    x = torch.randn(1, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
    mask = torch.full((LENGTH, LENGTH), -torch.inf).triu(1).to(dtype)[None, None]
    states = model(inputs_embeds=x, attention_mask=mask, use_cache=False).last_hidden_state
    return states.float().square().mean()


def saved_bytes(layers: int, *, tuned: bool, save_fewer: bool) -> int:
    model = norms_trained(llama(layers, torch.bfloat16), tuned=tuned)
    if save_fewer:
        with save_fewer_activations(model), LiveTensorBytes() as counter:
            loss = run(model)
            return counter.now + 0 * loss.numel()
    with LiveTensorBytes() as counter:
        loss = run(model)
        return counter.now + 0 * loss.numel()


def bytes_per_token_and_layer(**options: Any) -> float:
    return (saved_bytes(3, **options) - saved_bytes(1, **options)) / 2 / LENGTH


def test_llama_block_saves_only_what_is_needed() -> None:
    needed = 4 * FORWARD + 8 * WIDTH + 4 * WIDTH + 4 * HEADS + 8
    assert bytes_per_token_and_layer(tuned=True, save_fewer=True) == needed


def test_modules_of_transformers_save_more() -> None:
    eager = 6 * FORWARD + 16 * WIDTH + 4 * WIDTH + 4 * HEADS + 8
    assert bytes_per_token_and_layer(tuned=False, save_fewer=False) == eager


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_pytorch_tanh", "quick_gelu"])
def test_loss_and_gradients_equal_those_of_transformers(act: str, dtype: torch.dtype) -> None:
    model = llama(2, dtype, hidden_act=act)
    expected_loss = run(model)
    expected = gradients(model, expected_loss)
    with save_fewer_activations(model) as changed:
        assert any(name.endswith("mlp") for name in changed)
        loss = run(model)
        reduced = gradients(model, loss)
    assert torch.equal(loss, expected_loss)
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        terms = MODEL_TERMS if dtype == torch.float32 else 4  # a few values are rounded to bf16 in a row
        assert_close(reduced[name].to(dtype), gradient, terms=terms, magnitude=scale, msg=name)


def test_modules_are_restored_after_an_error() -> None:
    model = llama()
    before = dict(model.named_modules())
    with pytest.raises(ZeroDivisionError), save_fewer_activations(model) as changed:
        assert isinstance(model.norm, TunedNorm) and "norm" in changed
        raise ZeroDivisionError
    assert dict(model.named_modules()) == before
    assert not any("forward" in module.__dict__ for module in model.modules())


class Shifted(nn.Module):
    """Has the submodules of a gated MLP and computes something else."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(4, 4) for _ in range(3))
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) + 1


def test_mlp_that_computes_something_else_is_unchanged() -> None:
    with save_fewer_activations(nn.Sequential(Shifted())) as changed:
        assert changed == []


@pytest.mark.parametrize("act", ["silu", "gelu", "quick_gelu"])
def test_activations_are_identified_by_their_values(act: str) -> None:
    assert identify_activation(ACT2FN[act]) == act


def test_unknown_activation_is_not_identified() -> None:
    assert identify_activation(ACT2FN["relu"]) is None
    assert identify_activation(nn.Linear(3, 3)) is None


def test_clip_saves_the_input_of_quick_gelu_once() -> None:
    sizes = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": HEADS}
    saved = {}
    for save_fewer in (False, True):
        for layers in (1, 2):
            torch.manual_seed(0)
            config = CLIPVisionConfig(**sizes, num_hidden_layers=layers, image_size=16, patch_size=4)
            model = norms_trained(CLIPVisionModel(config).to(torch.bfloat16), tuned=True)
            pixels = torch.zeros(1, 3, 16, 16, dtype=torch.bfloat16)
            context = save_fewer_activations(model) if save_fewer else LiveTensorBytes()
            with context, LiveTensorBytes() as counter:
                states = model(pixels).last_hidden_state
                saved[save_fewer, layers] = counter.now + 0 * states.numel()
    tokens = 17
    before, after = ((saved[save_fewer, 2] - saved[save_fewer, 1]) / tokens for save_fewer in (False, True))
    statistics = 16 + 4 * HEADS  # two norms' mean and 1/std, and attention's log-sum-exp
    assert (before, after) == (28 * WIDTH + statistics, 20 * WIDTH + statistics)


@pytest.mark.parametrize("recipe", ["language=ln", "lora-4", "ffn"])
def test_gradients_of_a_family_are_equal(recipe: str, tmp_path: Any) -> None:
    family = LlavaFamily.load(make_tiny("llava", tmp_path), torch.float32)
    tuned = adapt(family.model, recipe)
    ids = torch.tensor([[5, 6, 7, 8]])

    def loss() -> Tensor:
        return family.decoder(input_ids=ids, use_cache=False).last_hidden_state.square().sum()

    expected = gradients(family.model, loss())
    with save_fewer_activations(family.model):
        reduced = gradients(family.model, loss())
    assert tuned.trained and expected and expected.keys() == reduced.keys()
    for name, gradient in expected.items():
        assert relative_error(reduced[name], gradient) < relative_bound(), name
