from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from normtune.errors import InputError
from normtune.methods.adapt import adapt
from normtune.methods.norms import TunedNorm
from normtune.methods.recipe import parse
from normtune.models.causal.family import CausalFamily
from normtune.models.loading import load
from normtune.models.quantization import int8_linear
from normtune.training import layer_wrapping
from normtune.training.layer_wrapping import MemoryTier, checkpoint_activations, compile_layers
from normtune.training.saved_activations import save_fewer_activations
from tests.models.families.test_families import grouped
from tests.support.tiny_models import TEXT_SIZES, make_tiny
from tests.support.tolerance import assert_close

# torch warns about its own code while it traces
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")

STEPS = ([[0, 1, 2]], [[0, 1], [3, 4]], [[3, 4], [5]])  # questions by group; rows of three lengths


def losses_and_gradients(family: CausalFamily) -> list[Tensor]:
    tensors = []
    for members in STEPS:
        family.model.zero_grad()
        loss, _ = family.loss(family.collate(*grouped(family, members)))
        loss.backward()
        tensors += [loss.detach(), *(p.grad.clone() for p in family.model.parameters() if p.grad is not None)]
    return tensors


@pytest.mark.parametrize(("name", "tier"), [("llava_med", "fast"), ("gemma3", "tight")])
def test_compiled_layers_give_equal_gradients_with_few_graphs(name: str, tier: MemoryTier, tmp_path: Path) -> None:
    family = load(str(make_tiny(name, tmp_path)))
    assert isinstance(family, CausalFamily)
    adapt(family.model, parse("language=ln"), seed=0)
    layer = family.decoder.layers[0]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    counter: Any = CompileCounter()
    with save_fewer_activations(family.model):
        expected = losses_and_gradients(family)
        with compile_layers(family.model, backend=counter) as names, checkpoint_activations(family.model, tier):
            compiled = losses_and_gradients(family)
            first = counter.frame_count
            losses_and_gradients(family)
    assert len(names) == len(family.decoder.layers) and "forward" not in layer.__dict__
    # a graph with and one without gradients for the layer's input, each for one row and for several
    assert counter.frame_count == first <= 4
    assert not torch._dynamo.utils.counters["graph_break"]
    for tensor, expected_tensor in zip(compiled, expected, strict=True):
        assert_close(tensor, expected_tensor)


@pytest.mark.parametrize("recipe", ["ln", "language=lora(r=2)"])
def test_all_layers_of_a_deep_model_share_their_graphs(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More layers than torch's recompile limit: with a graph for each layer, most would not be compiled."""
    monkeypatch.setitem(TEXT_SIZES, "num_hidden_layers", torch._dynamo.config.recompile_limit + 2)
    family = load(str(make_tiny("llava_med", tmp_path)))
    assert isinstance(family, CausalFamily)
    adapt(family.model, recipe)
    batch = family.collate(*grouped(family, [[0, 1], [3, 4]]))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with save_fewer_activations(family.model), compile_layers(family.model, backend="aot_eager"):
        family.loss(batch)[0].backward()
    counters = torch._dynamo.utils.counters
    # the input of the first layer needs gradients only if the image encoder is trained
    assert counters["stats"]["unique_graphs"] == (1 if recipe == "ln" else 2)
    assert not counters["graph_break"]


def test_too_many_graphs_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = load(str(make_tiny("llava_med", tmp_path)))
    assert isinstance(family, CausalFamily)
    batches = [family.collate(*grouped(family, members)) for members in STEPS[:2]]  # one row, then two
    monkeypatch.setattr(layer_wrapping, "MAX_GRAPHS", 1)
    torch._dynamo.reset()
    with (
        pytest.raises(InputError, match=r"^--compile: .* more than 1 graphs .* Leave out --compile"),
        compile_layers(family.model, backend="eager"),
    ):
        for batch in batches:
            family.loss(batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["layer", "rms", "rms_offset", "int8"])
def test_traced_autograd_functions_give_equal_gradients(kind: str, dtype: torch.dtype) -> None:
    """torch 2.11 loses gradients through results of in-place operations or of casts to the same dtype."""
    x = torch.randn(3, 8, dtype=dtype, generator=torch.Generator().manual_seed(0)).requires_grad_()
    gain = torch.linspace(0.5, 2.0, 8, requires_grad=True)
    q, scale = torch.arange(64, dtype=torch.int8).view(8, 8), torch.linspace(0.1, 1.0, 8)
    bias = torch.ones(8, requires_grad=True) if kind == "layer" else None
    module: Any = None
    if kind != "int8":
        module = TunedNorm(kind, gain, bias, 1e-6)
    trained = [x, *([] if module is None else module.parameters())]

    def computed(x: Tensor) -> Tensor:
        return 2 * (int8_linear(x, q, scale, None) if module is None else module(x))

    def gradients(function: Any) -> Sequence[Tensor]:
        return torch.autograd.grad(function(x).float().square().sum(), trained)

    torch._dynamo.reset()
    expected, compiled = gradients(computed), gradients(torch.compile(computed, backend="eager"))
    assert all(gradient.abs().sum() > 0 for gradient in expected)
    for gradient, expected_gradient in zip(compiled, expected, strict=True):
        torch.testing.assert_close(gradient, expected_gradient)


def test_disabled_compilation_changes_nothing(tmp_path: Path) -> None:
    model = load(str(make_tiny("llava_med", tmp_path))).model
    with compile_layers(model, enabled=False) as names:
        assert list(names) == [] and not any("forward" in module.__dict__ for module in model.modules())


def test_failing_compiler_is_reported_in_one_line(tmp_path: Path) -> None:
    family = load(str(make_tiny("llava_med", tmp_path)))
    assert isinstance(family, CausalFamily)

    def fail(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("No working C++ compiler found\nand more")

    batch = family.collate(*grouped(family, [[0, 1]]))
    torch._dynamo.reset()
    with (
        pytest.raises(InputError, match=r"^--compile: .*No working C\+\+ compiler found\. Leave out --compile\.$"),
        compile_layers(family.model, backend=fail),
    ):
        family.loss(batch)
    assert "forward" not in family.decoder.layers[0].__dict__
