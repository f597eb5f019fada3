"""A quantised base: what is quantised, exact gradients of its results, and adapters shared with the base.

Tests that quantise run if the extra is installed: pip install 'normtune[quantize]'.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from normtune.adapters.fingerprint import fingerprint, same_base
from normtune.adapters.storage import load_adapter, load_model, save_adapter
from normtune.data.groups import Group
from normtune.data.phantom import phantom_dataset as phantom
from normtune.errors import InputError
from normtune.evaluation.config import EvaluateConfig
from normtune.evaluation.evaluate import evaluate_config
from normtune.methods.adapt import adapt
from normtune.models import quantization
from normtune.models.family import Family
from normtune.models.loading import load
from normtune.models.parts import find_parts
from normtune.models.quantization import Int8Linear, int8_linear, quantised_linears
from normtune.training.config import TrainConfig
from normtune.training.memory_plan.live_bytes import LiveTensorBytes
from normtune.training.saved_activations import save_fewer_activations
from normtune.training.train import train
from tests.support.tiny_models import make_tiny
from tests.support.tolerance import relative_bound, relative_error

installed = all(find_spec(package) for package in quantization.PACKAGES.values())
needs_extra = pytest.mark.skipif(not installed, reason="needs pip install 'normtune[quantize]'")
KINDS = tuple(quantization.PACKAGES)


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny("llava", tmp_path_factory.mktemp("llava")))


def batch_of(family: Any) -> dict[str, Any]:
    dataset = phantom("a", images=2)
    examples = [example for example in dataset.examples if example.images == dataset.examples[0].images][:3]
    segments = tuple(family.tokenize(e.id, e.question, e.answer) for e in examples)
    pixels = [family.preprocess_image(dataset.open_image(key)) for key in examples[0].images]
    return family.collate([Group(examples[0].images, segments)], [pixels])


def gradients(family: Any, recipe: str = "ln") -> torch.Tensor:
    tuned = adapt(family.model, recipe)
    family.loss(batch_of(family))[0].backward()
    grads = [parameter.grad.flatten() for parameter in tuned.trained.values() if parameter.grad is not None]
    return torch.cat(grads)


# --- without the extra --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_without_the_extra_the_error_names_the_package(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=rf"--quantize {kind} needs {quantization.PACKAGES[kind]}.*\[quantize\]"):
        load("nano", quantize=kind)


def test_a_misspelt_kind_is_refused() -> None:
    with pytest.raises(InputError, match="--quantize int4: unknown"):
        load("nano", quantize="int4")
    with pytest.raises(InputError, match="--quantize"):
        TrainConfig.checked(model="nano", data="phantom-a", out=Path("out"), quantize="int4")


@pytest.mark.parametrize("name", ["nano", "llava"])
def test_only_linears_in_layers_of_text_parts_are_quantised(name: str, llava: str) -> None:
    model = load("nano" if name == "nano" else llava).model
    quantised_names = set(quantised_linears(model))
    parts = {"nano": {"encoder", "decoder"}, "llava": {"language"}}[name]
    for info in find_parts(model).parameters:
        owner, _, attribute = info.name.rpartition(".")
        text = info.part in parts and info.role in ("attention", "ffn") and attribute == "weight"
        assert (owner in quantised_names) == (text or (info.is_bias and owner in quantised_names)), info.name


def test_skipped_modules_cover_all_other_linears_and_no_quantised_one(llava: str) -> None:
    model = load(llava).model
    quantised_names = set(quantised_linears(model))
    skipped = quantization._modules_to_skip(model, quantised_names)
    assert "lm_head" in skipped and "model.vision_tower" in skipped
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert any(f"{name}.".startswith(f"{module_name}.") for module_name in skipped) == (
                name not in quantised_names
            ), name


def test_the_int8_product_and_its_gradient_are_those_of_the_dequantised_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(-127, 128, (5, 7), generator=generator, dtype=torch.int8)
    scale, bias = torch.rand(5, 1, generator=generator), torch.randn(5, generator=generator)
    x = torch.randn(2, 3, 7, generator=generator, requires_grad=True)
    weight, same = q.float() * scale, x.detach().clone().requires_grad_()
    out, expected = int8_linear(x, q, scale, bias), nn.functional.linear(same, weight, bias)
    torch.testing.assert_close(out, expected)
    seed = torch.randn(out.shape, generator=generator)
    out.backward(seed)
    expected.backward(seed)
    torch.testing.assert_close(x.grad, same.grad)


def test_the_int8_product_saves_no_dequantised_weights() -> None:
    q, scale = torch.ones(64, 64, dtype=torch.int8), torch.ones(64, 1)
    x = torch.randn(1, 64, requires_grad=True)
    with LiveTensorBytes() as counter:
        out = int8_linear(x, q, scale, None)
        assert counter.now == out.nbytes
        assert counter.peak >= 64 * 64 * 4  # the weights were made, and freed


# --- with it ------------------------------------------------------------------------------------------------


@needs_extra
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["nano", "llava"])
def test_a_quantised_base_counts_and_fingerprints_as_the_base(name: str, kind: str, dtype: str, llava: str) -> None:
    source = "nano" if name == "nano" else llava
    base, quantised = load(source).model, load(source, quantize=kind, dtype=dtype).model
    assert fingerprint(base) == fingerprint(quantised)
    # without its files only the other parameters can be compared
    for module in quantised.modules():
        vars(module).pop("unquantised_samples", None)
    assert fingerprint(quantised).endswith("-quantised") and same_base(fingerprint(base), fingerprint(quantised))
    assert find_parts(base).total == find_parts(quantised).total
    quantised_names = set(quantised_linears(base))
    for module_name, module in quantised.named_modules():
        if isinstance(module, nn.Linear):
            assert (type(module) is nn.Linear) == (module_name not in quantised_names), module_name
            if type(module) is nn.Linear:
                expected = base.get_submodule(module_name).weight.to(module.weight.dtype)
                torch.testing.assert_close(module.weight, expected, rtol=0, atol=0)


@needs_extra
@pytest.mark.parametrize("kind", quantization.PACKAGES)
def test_an_adapter_of_a_quantised_base_is_refused_by_another_base(kind: str, llava: str, tmp_path: Path) -> None:
    """The other base differs in linear layers of the language model alone, which are quantised."""
    other = load(llava)
    with torch.no_grad():
        for name in quantised_linears(other.model):
            other.model.get_submodule(name).weight.mul_(1.25)
    other.save(tmp_path / "other")
    base = load(llava, quantize=kind)
    identity = fingerprint(base.model)
    save_adapter(adapt(base.model, "ln"), tmp_path / "ln", base_name="tiny", base_fingerprint=identity)
    for quantize in (None, kind):
        load_adapter(load(llava, quantize=quantize).model, tmp_path / "ln")
        with pytest.raises(InputError, match="this base has other values"):
            load_adapter(load(str(tmp_path / "other"), quantize=quantize).model, tmp_path / "ln")


def dequantised_base(source: str, quantised: nn.Module) -> Family:
    """The base in full precision with the values of the quantised linears."""
    family = load(source)
    for name in quantised_linears(family.model):
        layer: Any = quantised.get_submodule(name)
        if isinstance(layer, Int8Linear):
            weight = layer.weight.dequantize()
        else:
            from bitsandbytes.functional import dequantize_4bit

            weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        linear: Any = family.model.get_submodule(name)
        linear.weight.data.copy_(weight)
    return family


@needs_extra
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["nano", "llava"])
def test_gradients_of_a_quantised_base_are_those_of_its_dequantised_weights(name: str, kind: str, llava: str) -> None:
    """How far they are from the base's own gradients depends on the weights, not on this code."""
    source = "nano" if name == "nano" else llava
    quantised = load(source, quantize=kind)
    near, exact = gradients(quantised), gradients(load(source))
    assert relative_error(near, exact) > 0
    assert relative_error(near, gradients(dequantised_base(source, quantised.model))) < relative_bound()


@needs_extra
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_same_after_answers_without_gradients(kind: str, llava: str) -> None:
    new, used = load(llava, quantize=kind, dtype="bfloat16"), load(llava, quantize=kind, dtype="bfloat16")
    with torch.inference_mode():
        used.loss(batch_of(used))
    torch.testing.assert_close(gradients(used), gradients(new), rtol=0, atol=0)


@needs_extra
def test_an_int8_layer_computes_what_torchao_does(llava: str) -> None:
    model = load(llava, quantize="int8").model
    layer = next(module for module in model.modules() if isinstance(module, Int8Linear))
    x = torch.randn(2, layer.in_features)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


@needs_extra
@pytest.mark.parametrize("kind", KINDS)
def test_no_weights_are_saved_for_the_backward_pass(kind: str, llava: str) -> None:
    saved_bytes = {}
    for name, options in {"base": {}, "quantised": {"quantize": kind}}.items():
        family = load(llava, **options)  # type: ignore[arg-type]
        adapt(family.model, "ln")
        batch = batch_of(family)
        with save_fewer_activations(family.model), LiveTensorBytes() as counter:
            loss = family.loss(batch)[0]
            saved_bytes[name] = counter.now
            del loss
    assert saved_bytes["quantised"] <= saved_bytes["base"] * 1.01


@needs_extra
@pytest.mark.parametrize("recipe", ["language=attention", "full", "ffn"])
def test_a_recipe_that_trains_quantised_parameters_is_refused(recipe: str, llava: str) -> None:
    with pytest.raises(InputError, match=r"quantised.*--quantize"):
        adapt(load(llava, quantize="int8").model, recipe)


@needs_extra
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recipe", ["lora-4", "connector=full,language=ln", "ia3", "prefix"])
def test_other_recipes_train_on_a_quantised_base(kind: str, recipe: str, llava: str) -> None:
    result = gradients(load(llava, quantize=kind), recipe)
    assert torch.isfinite(result).all() and result.norm() > 0


@needs_extra
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_moves_from_a_quantised_base_to_the_base_and_back(kind: str, tmp_path: Path) -> None:
    run = {"model": "nano", "data": "phantom-a:4", "limit": 40, "batch": 12, "max_steps": 2, "device": "cpu"}
    train(TrainConfig.checked(**run, out=tmp_path / "on-quantised", quantize=kind, cache=tmp_path / "cache"))
    train(TrainConfig.checked(**run, out=tmp_path / "on-base"))
    plain = load_model("nano", tmp_path / "on-quantised", device="cpu")
    quantised = load_model("nano", tmp_path / "on-base", device="cpu", quantize=kind)
    for family in (plain, quantised):
        assert torch.isfinite(family.loss(batch_of(family))[0])


@needs_extra
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_base_is_evaluated(kind: str, tmp_path: Path) -> None:
    config = EvaluateConfig.checked(
        model="nano", data="phantom-a:5", limit=8, out=tmp_path, quantize=kind, device="cpu"
    )
    assert evaluate_config(config).record["rows"] == 8
