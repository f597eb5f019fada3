"""Reading a checkpoint by the tensor: names, some values of one, and files that are damaged."""

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
from tests.support.base_models import outcome

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_values_are_those_of_the_flat_tensor_however_far_apart(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    shape = data.draw(st.lists(st.integers(0, 6), max_size=3))
    dtype = data.draw(st.sampled_from(DTYPES))
    tensor = (100 * torch.randn(shape)).to(dtype)
    start = data.draw(st.integers(0, tensor.numel()))
    places = range(start, data.draw(st.integers(start, tensor.numel())), data.draw(st.integers(1, 7)))
    directory = tmp_path_factory.mktemp("file")
    save_file({"before": torch.ones(3), "it": tensor}, directory / SINGLE_FILE)
    near = data.draw(st.sampled_from([0, 16, 1 << 16]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader, "_RUN", near)
        found = Checkpoint(directory).values("it", places)
    assert found.dtype == dtype
    assert torch.equal(found, tensor.flatten()[places.start : places.stop : places.step])
    assert torch.equal(Checkpoint(directory).tensor("it"), tensor)


def test_the_tensor_of_the_last_shard_counts_and_the_dtype_is_that_of_most_bytes(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2), "b": torch.zeros(9).bfloat16()}, tmp_path / "1.safetensors")
    save_file({"a": torch.ones(4), "c": torch.zeros(99, dtype=torch.int64)}, tmp_path / "2.safetensors")
    places = {"b": "1.safetensors", "a": "2.safetensors", "c": "2.safetensors"}
    (tmp_path / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    found = Checkpoint(tmp_path)
    assert [path.name for path in found.files] == ["1.safetensors", "2.safetensors"]
    assert found.entries["a"].shape == (4,) and torch.equal(found.tensor("a"), torch.ones(4))
    assert found.dtype == torch.bfloat16
    assert found.entries["a"].floating and not found.entries["c"].floating


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_an_input_error_or_reads_as_some_header(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("file") / "x.safetensors"
    save_file({"a": torch.ones(2, 3), "b": torch.ones(4)}, path)
    whole = path.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    path.write_bytes(whole[:at] + data.draw(st.binary(max_size=8)) + whole[at + 1 :])
    try:
        entries = read_header(path)
    except InputError as error:
        assert "x.safetensors" in str(error)
    else:
        assert all(entry.start + entry.bytes <= path.stat().st_size for entry in entries.values())


def test_a_file_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2, 3)}, tmp_path / SINGLE_FILE)
    whole = (tmp_path / SINGLE_FILE).read_bytes()
    (tmp_path / SINGLE_FILE).write_bytes(whole[:-1])
    assert "is cut short" in outcome(lambda: Checkpoint(tmp_path))
    (tmp_path / SINGLE_FILE).write_bytes(whole)
    found = Checkpoint(tmp_path)
    (tmp_path / SINGLE_FILE).unlink()
    assert "cannot read" in outcome(lambda: found.values("a", range(2)))
    assert "cannot read" in outcome(lambda: found.tensor("a"))
