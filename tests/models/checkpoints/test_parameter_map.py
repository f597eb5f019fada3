"""The files of a base tell its fingerprint and the places of its tensors without loading it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from normtune.adapters.fingerprint import fingerprint
from normtune.models.checkpoints.parameter_map import placement, stored_as_is
from normtune.models.checkpoints.reader import SINGLE_FILE, Checkpoint
from normtune.models.loading import load, meta_model
from tests.support.base_models import save_base
from tests.support.tiny_models import TINY, make_tiny

WORDS = "text_decoder.bert.embeddings.word_embeddings.weight"
HEAD = "text_decoder.cls.predictions.decoder.weight"


def on_disk(directory: Path) -> tuple[Any, Checkpoint, dict[str, list[str]]]:
    body: Any = meta_model(str(directory))
    checkpoint = Checkpoint(directory)
    return body, checkpoint, placement(body, checkpoint)


def fingerprint_on_disk(directory: Path) -> str:
    body, checkpoint, placed = on_disk(directory)
    assert stored_as_is(placed, checkpoint)
    assert all(one.device.type == "meta" for one in body.parameters())
    return fingerprint(body, lambda name, places: checkpoint.values(placed[name][0], places))


def edit(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a checkpoint of one file."""
    tensors = load_file(directory / SINGLE_FILE)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors)
    save_file(tensors, directory / SINGLE_FILE, metadata={"format": "pt"})


def loaded_fingerprint(kind: str, directory: Path, dtype: torch.dtype) -> str:
    from transformers import AutoModelForImageTextToText

    from normtune.models.miss.model import MissForQuestionAnswering

    loader: Any = MissForQuestionAnswering if kind == "miss" else AutoModelForImageTextToText
    return fingerprint(loader.from_pretrained(directory, dtype=dtype))


@pytest.mark.parametrize("kind", ["miss", *TINY])
def test_the_fingerprint_of_the_files_is_that_of_the_loaded_model(kind: str, tmp_path: Path) -> None:
    if kind == "miss":
        save_base(kind, tmp_path)
    else:
        make_tiny(kind, tmp_path)
    mark = fingerprint_on_disk(tmp_path)
    assert mark == loaded_fingerprint(kind, tmp_path, torch.float32)

    def halve(tensors: dict[str, Tensor]) -> None:
        tensors |= {name: one.bfloat16() for name, one in tensors.items()}

    edit(tmp_path, halve)
    assert fingerprint_on_disk(tmp_path) == mark == loaded_fingerprint(kind, tmp_path, torch.bfloat16)

    def move(tensors: dict[str, Tensor]) -> None:
        next(one for one in tensors.values() if one.dtype == torch.bfloat16).view(-1)[0] += 1

    edit(tmp_path, move)
    assert fingerprint_on_disk(tmp_path) != mark


def test_the_fingerprint_of_the_shipped_model_is_read_from_its_file() -> None:
    family = load("nano")
    assert fingerprint_on_disk(Path(family.model.config.name_or_path)) == fingerprint(family.model)


def test_a_tied_tensor_has_every_place_that_the_file_gives_it(tmp_path: Path) -> None:
    save_base("miss", tmp_path)
    placed = on_disk(tmp_path)[2]
    (only,) = placed[WORDS]
    assert placed[HEAD] == [only]
    mark = fingerprint_on_disk(tmp_path)
    other = HEAD if only == WORDS else WORDS

    edit(tmp_path, lambda tensors: tensors.update({other: tensors[only].clone()}))
    assert set(on_disk(tmp_path)[2][WORDS]) == {WORDS, HEAD}
    assert fingerprint_on_disk(tmp_path) == mark

    edit(tmp_path, lambda tensors: tensors.pop(only))  # the other name alone: it is tied from there
    assert on_disk(tmp_path)[2][WORDS] == [other]
    assert fingerprint_on_disk(tmp_path) == mark


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
def test_what_the_files_do_not_tell_is_seen(change: Any, tmp_path: Path) -> None:
    save_base("miss", tmp_path)
    edit(tmp_path, change)
    _, checkpoint, placed = on_disk(tmp_path)
    assert not stored_as_is(placed, checkpoint)


def test_a_tensor_that_belongs_to_no_parameter_does_not_matter(tmp_path: Path) -> None:
    save_base("miss", tmp_path)
    mark = fingerprint_on_disk(tmp_path)
    edit(tmp_path, lambda tensors: tensors.update({"text_encoder.position_ids": torch.arange(16)}))
    assert fingerprint_on_disk(tmp_path) == mark


def test_a_converted_tensor_has_no_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.core_model_loading import Transpose, WeightConverter

    save_base("miss", tmp_path)
    turned = WeightConverter("query.weight", "query.weight", [Transpose(0, 1)])
    monkeypatch.setattr(
        "normtune.models.checkpoints.parameter_map.get_model_conversion_mapping", lambda *_: [turned]
    )
    _, checkpoint, placed = on_disk(tmp_path)
    assert {name for name, keys in placed.items() if not keys} == {
        name for name in placed if name.endswith("query.weight")
    }
    assert not stored_as_is(placed, checkpoint)
    assert stored_as_is({WORDS: placed[WORDS]}, checkpoint)
