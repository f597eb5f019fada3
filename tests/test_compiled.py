from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from normtune.adapt import adapt
from normtune.compiled import compiled
from normtune.errors import InputError
from normtune.lean import lean
from normtune.models import load
from normtune.models.causal import CausalFamily
from normtune.recipe import parse
from normtune.recompute import Tier, recomputed
from tests.models.test_families import grouped
from tests.models.tiny import make_tiny

# the warnings are torch's own, of what it does while it traces
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")

STEPS = ([[0, 1, 2]], [[0, 1], [3, 4]], [[3, 4], [5]])  # of three lengths


def losses_and_gradients(family: CausalFamily) -> list[Tensor]:
    found = []
    for members in STEPS:
        family.model.zero_grad()
        loss, _ = family.loss(family.collate(*grouped(family, members)))
        loss.backward()
        found += [loss.detach(), *(p.grad.clone() for p in family.model.parameters() if p.grad is not None)]
    return found


@pytest.mark.parametrize(("name", "tier"), [("llava_med", "fast"), ("gemma3", "tight")])
def test_compiled_layers_give_the_same_and_compile_a_few_graphs_for_all_lengths(
    name: str, tier: Tier, tmp_path: Path
) -> None:
    family = load(str(make_tiny(name, tmp_path)))
    assert isinstance(family, CausalFamily)
    adapt(family.model, parse("language=ln"), seed=0)
    layer = family.decoder.layers[0]
    torch._dynamo.reset()
    counter: Any = CompileCounter()
    with lean(family.model):
        wanted = losses_and_gradients(family)
        with compiled(family.model, backend=counter) as names, recomputed(family.model, tier):
            found = losses_and_gradients(family)
            first = counter.frame_count
            losses_and_gradients(family)
    assert len(names) == len(family.decoder.layers) and "forward" not in layer.__dict__
    assert counter.frame_count == first <= 2 * len(names)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_nothing_is_compiled_where_it_is_not_wanted(tmp_path: Path) -> None:
    model = load(str(make_tiny("llava_med", tmp_path))).model
    with compiled(model, wanted=False) as names:
        assert list(names) == [] and not any("forward" in one.__dict__ for one in model.modules())


def test_a_compiler_that_fails_is_told_in_one_line(tmp_path: Path) -> None:
    family = load(str(make_tiny("llava_med", tmp_path)))
    assert isinstance(family, CausalFamily)

    def none(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("No working C++ compiler found\nand more")

    batch = family.collate(*grouped(family, [[0, 1]]))
    torch._dynamo.reset()
    with (
        pytest.raises(InputError, match=r"^--compile: .*No working C\+\+ compiler found\. Leave it out\.$"),
        compiled(family.model, backend=none),
    ):
        family.loss(batch)
    assert "forward" not in family.decoder.layers[0].__dict__
