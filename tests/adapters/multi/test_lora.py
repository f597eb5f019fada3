"""A linear with several LoRA adapters computes for each row what PEFT's layer of its adapter computes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from normtune.adapters.multi.lora import MIN_ROWS_FOR_RUNS, MultiAdapterLoRA, lora_matrices
from normtune.adapters.multi.rows import ActiveRows, RowAdapters
from normtune.methods.adapt import adapt
from tests.support.base_models import KINDS, compute_logits, tiny_base
from tests.support.tolerance import MODEL_TERMS, assert_close

WIDTH, OUT, RANK = 12, 20, 3


def multi_linear(adapters: int, loaded: set[int], dtype: torch.dtype) -> MultiAdapterLoRA:
    """A linear with random matrices for the loaded adapters and zeros for the others."""
    torch.manual_seed(0)
    down, up = torch.randn(adapters, RANK, WIDTH), torch.randn(adapters, OUT, RANK)
    for adapter in {*range(adapters)} - loaded:
        down[adapter], up[adapter] = 0.0, 0.0
    return MultiAdapterLoRA(nn.Linear(WIDTH, OUT).to(dtype), down, up, ActiveRows(), loaded)


def peft_output(linear: MultiAdapterLoRA, adapter: int, x: Tensor) -> Tensor:
    """What PEFT computes for one adapter: the update in fp32, the sum rounded once."""
    plain = linear.base_layer(x)
    if adapter not in linear.loaded:
        return plain
    return (plain + x.float() @ linear.down[adapter].T @ linear.up[adapter].T).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [2, MIN_ROWS_FOR_RUNS])
@torch.inference_mode()
def test_each_row_uses_the_matrices_of_its_adapter(length: int, dtype: torch.dtype) -> None:
    """Short and long units; adapter 0 has no matrices."""
    units = 6
    linear = multi_linear(units + 1, {*range(1, units + 1)}, dtype)
    adapters = [(unit * 3) % (units + 1) for unit in range(units)]
    x = torch.randn(units, length, WIDTH).to(dtype)
    with linear.active_rows.use(RowAdapters(adapters)):
        out = linear(x)
    pieces = x.split(1)
    expected = torch.cat([peft_output(linear, adapter, piece) for adapter, piece in zip(adapters, pieces, strict=True)])
    assert out.dtype == dtype and out.shape == expected.shape
    assert_close(out, expected, terms=1 if dtype == torch.bfloat16 else MODEL_TERMS)


@torch.inference_mode()
def test_rows_of_adapters_without_matrices_equal_the_bases_output_to_the_bit() -> None:
    linear = multi_linear(4, {3}, torch.float32)
    x = torch.randn(2, 5, WIDTH)
    with linear.active_rows.use(RowAdapters([1, 2])):
        assert torch.equal(linear(x), linear.base_layer(x))
    with pytest.raises(AssertionError, match="adapters of these rows are not set"):
        linear(x)


@pytest.mark.parametrize("kind", KINDS)
def test_lora_matrices_are_those_of_the_recipe_and_the_model_is_unchanged(kind: str) -> None:
    model = tiny_base(kind)
    before = compute_logits(model)
    matrices = lora_matrices(model, RANK)
    assert torch.equal(compute_logits(model), before)
    tuned = adapt(copy.deepcopy(model), f"all=lora(r={RANK})", train_unused=True)
    assert {name: matrix.shape for name, matrix in matrices.items()} == {
        name: tuple(parameter.shape) for name, parameter in tuned.trained.items()
    }
    starts = [matrix.columns.start for matrix in matrices.values()]
    stops = [matrix.columns.stop for matrix in matrices.values()]
    assert starts == [0, *stops[:-1]] and stops[-1] == tuned.trainable
