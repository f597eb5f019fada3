"""Parameters are mapped to the tensors of the files, and fingerprinted, without loading the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from normtune.adapters.fingerprint import fingerprint
from normtune.models.checkpoints.parameter_map import has_every_parameter, map_parameters
from normtune.models.checkpoints.reader import SINGLE_FILE, Checkpoint
from normtune.models.loading import load, meta_model
from tests.support.base_models import save_base
from tests.support.tiny_models import MORE, TINY, make_tiny

WORDS = "text_decoder.bert.embeddings.word_embeddings.weight"
HEAD = "text_decoder.cls.predictions.decoder.weight"


def on_disk(directory: Path) -> tuple[Any, Checkpoint, dict[str, list[str]]]:
    model: Any = meta_model(str(directory))
    checkpoint = Checkpoint(directory)
    return model, checkpoint, map_parameters(model, checkpoint)


def fingerprint_on_disk(directory: Path) -> str:
    model, checkpoint, parameter_map = on_disk(directory)
    assert has_every_parameter(parameter_map, checkpoint)
    assert all(parameter.device.type == "meta" for parameter in model.parameters())
    return fingerprint(model, lambda name, positions: checkpoint.read_values(parameter_map[name][0], positions))


def edit(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a checkpoint with a single file."""
    tensors = load_file(directory / SINGLE_FILE)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors)
    save_file(tensors, directory / SINGLE_FILE, metadata={"format": "pt"})


def loaded_fingerprint(kind: str, directory: Path, dtype: torch.dtype) -> str:
    from transformers import AutoModelForImageTextToText

    from normtune.models.miss.model import MissForQuestionAnswering

    loader: Any = MissForQuestionAnswering if kind == "miss" else AutoModelForImageTextToText
    return fingerprint(loader.from_pretrained(directory, dtype=dtype))


# the experts of mixtures are joined when they are loaded, so that they are no tensors of the files
@pytest.mark.parametrize("kind", ["miss", *TINY, *(name for name in MORE if not name.endswith("moe"))])
def test_the_fingerprint_of_the_files_equals_that_of_the_loaded_model(kind: str, tmp_path: Path) -> None:
    if kind == "miss":
        save_base(kind, tmp_path)
    else:
        make_tiny(kind, tmp_path)
    original = fingerprint_on_disk(tmp_path)
    assert original == loaded_fingerprint(kind, tmp_path, torch.float32)

    def halve(tensors: dict[str, Tensor]) -> None:
        tensors |= {name: tensor.bfloat16() for name, tensor in tensors.items()}

    edit(tmp_path, halve)
    assert fingerprint_on_disk(tmp_path) == original == loaded_fingerprint(kind, tmp_path, torch.bfloat16)

    def move(tensors: dict[str, Tensor]) -> None:
        next(tensor for tensor in tensors.values() if tensor.dtype == torch.bfloat16).view(-1)[0] += 1

    edit(tmp_path, move)
    assert fingerprint_on_disk(tmp_path) != original


def test_the_fingerprint_of_the_shipped_model_is_read_from_its_file() -> None:
    family = load("nano")
    assert fingerprint_on_disk(Path(family.model.config.name_or_path)) == fingerprint(family.model)


def test_a_tied_parameter_is_mapped_to_every_tensor_that_holds_it(tmp_path: Path) -> None:
    save_base("miss", tmp_path)
    parameter_map = on_disk(tmp_path)[2]
    (stored,) = parameter_map[WORDS]
    assert parameter_map[HEAD] == [stored]
    original = fingerprint_on_disk(tmp_path)
    other = HEAD if stored == WORDS else WORDS

    edit(tmp_path, lambda tensors: tensors.update({other: tensors[stored].clone()}))
    assert set(on_disk(tmp_path)[2][WORDS]) == {WORDS, HEAD}
    assert fingerprint_on_disk(tmp_path) == original

    edit(tmp_path, lambda tensors: tensors.pop(stored))  # only the other name is left, and the parameter is tied to it
    assert on_disk(tmp_path)[2][WORDS] == [other]
    assert fingerprint_on_disk(tmp_path) == original


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop("visual_encoder.norm.weight"),
        lambda tensors: tensors.update({"visual_encoder.norm.weight": torch.ones(3)}),
        lambda tensors: tensors.update({"visual_encoder.norm.weight": torch.ones(16, dtype=torch.int8)}),
        lambda tensors: tensors.update({HEAD: torch.ones(40, 16), WORDS: torch.zeros(40, 16)}),
        lambda tensors: tensors.update({HEAD: torch.ones(40, 16), WORDS: torch.ones(40, 16).bfloat16()}),
    ],
    ids=["missing", "of another shape", "quantised", "tied and different", "tied and of two precisions"],
)
def test_parameters_that_cannot_be_read_from_the_files_are_detected(change: Any, tmp_path: Path) -> None:
    save_base("miss", tmp_path)
    edit(tmp_path, change)
    _, checkpoint, parameter_map = on_disk(tmp_path)
    assert not has_every_parameter(parameter_map, checkpoint)


def test_a_tensor_of_no_parameter_is_ignored(tmp_path: Path) -> None:
    save_base("miss", tmp_path)
    original = fingerprint_on_disk(tmp_path)
    edit(tmp_path, lambda tensors: tensors.update({"text_encoder.position_ids": torch.arange(16)}))
    assert fingerprint_on_disk(tmp_path) == original


def test_a_converted_parameter_is_not_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.core_model_loading import Transpose, WeightConverter

    save_base("miss", tmp_path)
    transposed = WeightConverter("query.weight", "query.weight", [Transpose(0, 1)])
    monkeypatch.setattr(
        "normtune.models.checkpoints.parameter_map.get_model_conversion_mapping", lambda *_: [transposed]
    )
    _, checkpoint, parameter_map = on_disk(tmp_path)
    assert {name for name, keys in parameter_map.items() if not keys} == {
        name for name in parameter_map if name.endswith("query.weight")
    }
    assert not has_every_parameter(parameter_map, checkpoint)
    assert has_every_parameter({WORDS: parameter_map[WORDS]}, checkpoint)
