"""A linear with the matrices of several LoRA adapters gives each row what PEFT's layer of its own gives."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from normtune.adapters.multi.lora import MIN_ROWS_FOR_RUNS, MultiAdapterLoRA, targets
from normtune.adapters.multi.rows import ActiveRows, RowAdapters
from normtune.methods.adapt import adapt
from tests.support.base_models import KINDS, base, logits

WIDE, OUT, RANK = 12, 20, 3


def mixed_linear(adapters: int, used: set[int], dtype: torch.dtype) -> MultiAdapterLoRA:
    torch.manual_seed(0)
    down, up = torch.randn(adapters, RANK, WIDE), torch.randn(adapters, OUT, RANK)
    for one in {*range(adapters)} - used:
        down[one], up[one] = 0.0, 0.0
    return MultiAdapterLoRA(nn.Linear(WIDE, OUT).to(dtype), down, up, ActiveRows(), used)


def of_one(linear: MultiAdapterLoRA, adapter: int, x: Tensor) -> Tensor:
    """As PEFT computes it: the update in fp32, the sum rounded once."""
    plain = linear.base_layer(x)
    if adapter not in linear.used:
        return plain
    return (plain + x.float() @ linear.down[adapter].T @ linear.up[adapter].T).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [None, (1, 3, 2)])
@pytest.mark.parametrize("length", [2, MIN_ROWS_FOR_RUNS])
@torch.inference_mode()
def test_each_row_takes_the_matrices_of_its_owner(
    length: int, sizes: tuple[int, ...] | None, dtype: torch.dtype
) -> None:
    """Short units and long ones, of equal sizes and of others; adapter 0 has no matrices."""
    units = 6
    every = sizes and sizes * (units // 3)
    linear = mixed_linear(units + 1, {*range(1, units + 1)}, dtype)
    adapters = [(unit * 3) % (units + 1) for unit in range(units)]
    shape = (units, length, WIDE) if every is None else (sum(every), WIDE)
    x = torch.randn(shape).to(dtype)
    with linear.rows.use(RowAdapters(adapters, every)):
        found = linear(x)
    rows = x.split([1] * units if every is None else list(every))
    wanted = torch.cat([of_one(linear, one, some) for one, some in zip(adapters, rows, strict=True)])
    assert found.dtype == dtype and found.shape == wanted.shape
    torch.testing.assert_close(found, wanted, rtol=0.01 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


@torch.inference_mode()
def test_rows_of_adapters_without_matrices_are_the_bases_own_to_the_bit() -> None:
    linear = mixed_linear(4, {3}, torch.float32)
    x = torch.randn(2, 5, WIDE)
    with linear.rows.use(RowAdapters([1, 2])):
        assert torch.equal(linear(x), linear.base_layer(x))
    with pytest.raises(AssertionError, match="whose these rows are"):
        linear(x)


@pytest.mark.parametrize("kind", KINDS)
def test_targets_are_the_matrices_of_the_recipe_and_the_model_stays_as_it_was(kind: str) -> None:
    model = base(kind)
    before = logits(model)
    found = targets(model, RANK)
    assert torch.equal(logits(model), before)
    tuned = adapt(copy.deepcopy(model), f"all=lora(r={RANK})")
    assert {name: one.shape for name, one in found.items()} == {
        name: tuple(one.shape) for name, one in tuned.trained.items()
    }
    stops = [one.place.stop for one in found.values()]
    assert [one.place.start for one in found.values()] == [0, *stops[:-1]] and stops[-1] == tuned.trainable
