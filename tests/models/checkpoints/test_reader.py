"""Reading a checkpoint tensor by tensor: headers, single values, and damaged files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from normtune.errors import InputError
from normtune.models.checkpoints import reader
from normtune.models.checkpoints.reader import INDEX_FILE, SINGLE_FILE, Checkpoint, read_header
from tests.support.base_models import input_error

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64)


@settings(max_examples=40)
@given(data=st.data())
def test_values_equal_those_of_the_flattened_tensor_for_any_positions(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    shape = data.draw(st.lists(st.integers(0, 6), max_size=3))
    dtype = data.draw(st.sampled_from(DTYPES))
    tensor = (100 * torch.randn(shape)).to(dtype)
    start = data.draw(st.integers(0, tensor.numel()))
    positions = range(start, data.draw(st.integers(start, tensor.numel())), data.draw(st.integers(1, 7)))
    directory = tmp_path_factory.mktemp("file")
    save_file({"before": torch.ones(3), "it": tensor}, directory / SINGLE_FILE)
    max_span = data.draw(st.sampled_from([0, 16, 1 << 16]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader, "_MAX_SPAN", max_span)
        values = Checkpoint(directory).read_values("it", positions)
    assert values.dtype == dtype
    assert torch.equal(values, tensor.flatten()[positions.start : positions.stop : positions.step])
    assert torch.equal(Checkpoint(directory).get_tensor("it"), tensor)


def test_the_last_shards_tensor_is_used_and_the_dtype_is_that_of_most_bytes(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2), "b": torch.zeros(9).bfloat16()}, tmp_path / "1.safetensors")
    save_file({"a": torch.ones(4), "c": torch.zeros(99, dtype=torch.int64)}, tmp_path / "2.safetensors")
    file_names = {"b": "1.safetensors", "a": "2.safetensors", "c": "2.safetensors"}
    (tmp_path / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": file_names}))
    checkpoint = Checkpoint(tmp_path)
    assert [path.name for path in checkpoint.files] == ["1.safetensors", "2.safetensors"]
    assert checkpoint.entries["a"].shape == (4,) and torch.equal(checkpoint.get_tensor("a"), torch.ones(4))
    assert checkpoint.dtype == torch.bfloat16
    assert checkpoint.entries["a"].is_floating and not checkpoint.entries["c"].is_floating


@settings(max_examples=60)
@given(data=st.data())
def test_a_damaged_file_raises_an_input_error_or_has_a_valid_header(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("file") / "x.safetensors"
    save_file({"a": torch.ones(2, 3), "b": torch.ones(4)}, path)
    content = path.read_bytes()
    position = data.draw(st.integers(0, len(content) - 1))
    path.write_bytes(content[:position] + data.draw(st.binary(max_size=8)) + content[position + 1 :])
    try:
        entries = read_header(path)
    except InputError as error:
        assert "x.safetensors" in str(error)
    else:
        assert all(entry.start + entry.bytes <= path.stat().st_size for entry in entries.values())


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2, 3)}, tmp_path / SINGLE_FILE)
    content = (tmp_path / SINGLE_FILE).read_bytes()
    (tmp_path / SINGLE_FILE).write_bytes(content[:-1])
    assert "is truncated" in input_error(lambda: Checkpoint(tmp_path))
    (tmp_path / SINGLE_FILE).write_bytes(content)
    checkpoint = Checkpoint(tmp_path)
    (tmp_path / SINGLE_FILE).unlink()
    assert "cannot read" in input_error(lambda: checkpoint.read_values("a", range(2)))
    assert "cannot read" in input_error(lambda: checkpoint.get_tensor("a"))
