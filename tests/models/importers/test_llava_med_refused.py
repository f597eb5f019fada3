"""Checkpoints that are broken, incomplete or not LLaVA-Med's are refused with an error of one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from normtune.models.importers.llava_med.importer import import_llava_med
from tests.support.llava_med_original import (
    HEADS,
    FileFormat,
    OriginalModel,
    import_error,
    make_original,
    original_tensors,
    randomize,
    write_clip,
    write_delta_and_base,
    write_original,
    write_tensors,
)


@pytest.fixture(scope="module")
def original() -> OriginalModel:
    return make_original()


@pytest.fixture(scope="module")
def separated() -> OriginalModel:
    return make_original("1.0")


Tensors = dict[str, Tensor]
BROKEN: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "an unknown name": (
        lambda tensors: {**tensors, "model.adapter.weight": torch.ones(2)},
        "model.adapter.weight, which",
    ),
    "a quantised weight": (
        lambda tensors: {**tensors, "model.layers.0.mlp.up_proj.SCB": torch.ones(2)},
        "neither an adapter nor quantised",
    ),
    "a layer too many": (
        lambda tensors: {**tensors, "model.layers.2.input_layernorm.weight": torch.ones(32)},
        "model.layers.2.input_layernorm.weight, which LLaVA-Med of this config does not have",
    ),
    "a missing tensor": (
        lambda tensors: {name: tensor for name, tensor in tensors.items() if "layers.1.mlp.up" not in name},
        "lacks model.language_model.layers.1.mlp.up_proj.weight",
    ),
    "no head": (
        lambda tensors: {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"},
        "lacks lm_head.weight",
    ),
    "no projector": (
        lambda tensors: {name: tensor for name, tensor in tensors.items() if "mm_projector" not in name},
        "model.multi_modal_projector.linear_2.weight and 1 more",
    ),
    "a projector of one layer": (
        lambda tensors: {name: tensor for name, tensor in tensors.items() if "mm_projector.2" not in name},
        "lacks model.multi_modal_projector.linear_2.weight",
    ),
    "a norm of another width": (
        lambda tensors: {**tensors, "model.norm.weight": torch.ones(40)},
        "model.norm.weight is of shape [40], not [32]",
    ),
    "an embedding of another width": (
        lambda tensors: {**tensors, "model.embed_tokens.weight": torch.ones(419, 40)},
        "model.embed_tokens.weight is of shape [419, 40]",
    ),
    "an embedding with fewer rows": (
        lambda tensors: {**tensors, "model.embed_tokens.weight": tensors["model.embed_tokens.weight"][:300]},
        "model.embed_tokens.weight is of shape [300, 32]",
    ),
    "a tensor twice": (
        lambda tensors: {**tensors, "model.mm_projector.weight": tensors["model.mm_projector.0.weight"]},
        "model.mm_projector.0.weight and model.mm_projector.weight, which are one tensor",
    ),
    "half a tower": (
        lambda tensors: {name: tensor for name, tensor in tensors.items() if "encoder.layers.2.mlp.fc1" not in name},
        "lacks model.vision_tower.encoder.layers.2.mlp.fc1.weight",
    ),
    "a tower without positions": (
        lambda tensors: {name: tensor for name, tensor in tensors.items() if "position_embedding" not in name},
        "lacks embeddings.position_embedding.weight, so its sizes are unknown",
    ),
    "a delta": (
        lambda tensors: {**tensors, "model.norm.weight": torch.full((32,), 1e-3)},
        "looks like a delta: the gains of its final norm are near zero. Give --base",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_checkpoint_is_refused(original: OriginalModel, tmp_path: Path, what: str) -> None:
    change, message = BROKEN[what]
    source = write_original(tmp_path / "src", original, tensors=change(original_tensors(original, tower=True)))
    assert message in import_error(source, tmp_path / "out", **HEADS)


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "transformers' layout": ({"architectures": None, "model_type": "llava", "text_config": {}}, "layout already"),
    "another model": ({"architectures": ["BertModel"], "model_type": "bert"}, "of type 'bert', not of LLaVA-Med's"),
    "tiles": ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio is 'anyres'"),
    "another projector": ({"mm_projector_type": "mlp3x_gelu"}, "mm_projector_type is 'mlp3x_gelu'"),
    "a projector of two layers that is called one": (
        {"mm_projector_type": "linear"},
        "holds model.mm_projector.2.weight, but mm_projector_type is 'linear'",
    ),
    "another feature": ({"mm_vision_select_feature": "all"}, "neither 'patch' nor 'cls_patch'"),
    "no layer": ({"mm_vision_select_layer": None}, "mm_vision_select_layer is None, not a number"),
    "no width": ({"mm_hidden_size": None}, "lacks mm_hidden_size"),
    "another width": ({"mm_hidden_size": 48}, "32 wide, the checkpoint's mm_hidden_size is 48"),
    "more words than rows": ({"vocab_size": 100}, "tokens, the model 100. Give --tokenizer"),
    "marks that the tokenizer has not": ({"mm_use_im_start_end": True}, "trained with <im_start> and <im_end>"),
    "an unknown image encoder": (
        {"mm_vision_tower": "laion/CLIP-ViT-H"},
        "its tensors do not show its activation function",
    ),
}


@pytest.mark.parametrize("what", CONFIGS)
def test_a_config_that_cannot_be_imported_is_refused(original: OriginalModel, tmp_path: Path, what: str) -> None:
    changes, message = CONFIGS[what]
    source = write_original(tmp_path / "src", original, **changes)
    assert message in import_error(source, tmp_path / "out", **HEADS)


def spoil(file: str, content: bytes | None) -> Callable[[Path], None]:
    def replace_file(source: Path) -> None:
        if content is None:
            (source / file).unlink()
        else:
            (source / file).write_bytes(content)

    return replace_file


FILES: dict[str, tuple[FileFormat, Callable[[Path], None], str]] = {
    "no config": ("bin", spoil("config.json", None), "config.json is missing"),
    "a config that is a list": ("bin", spoil("config.json", b"[]"), "is no model's config"),
    "no tokenizer": ("bin", spoil("tokenizer.json", None), "holds no tokenizer"),
    "a damaged tokenizer": ("bin", spoil("tokenizer.json", b"{}"), "cannot read the tokenizer"),
    "a missing shard": (
        "bin",
        spoil("pytorch_model-00002-of-00003.bin", None),
        "pytorch_model-00002-of-00003.bin is missing, but pytorch_model.bin.index.json names it",
    ),
    "a damaged shard": (
        "bin",
        spoil("pytorch_model-00002-of-00003.bin", b"PK\x03\x04 cut"),
        "is not a checkpoint that opens safely",
    ),
    "a cut safetensors file": (
        "safetensors",
        spoil("model-00001-of-00003.safetensors", b"\x10\x00\x00\x00\x00\x00\x00\x00{}"),
        "cannot read",
    ),
    "an index of nothing": ("bin", spoil("pytorch_model.bin.index.json", b"{}"), "holds no weight_map"),
    "an index that promises more": (
        "bin",
        spoil("pytorch_model.bin.index.json", b'{"weight_map": {"a": "pytorch_model-00001-of-00003.bin"}}'),
        "pytorch_model-00001-of-00003.bin lacks a, which the index lists",
    ),
    "no weights": ("bin", spoil("pytorch_model.bin.index.json", None), "holds no weights"),
}


@pytest.mark.parametrize("what", FILES)
def test_damaged_files_are_refused(original: OriginalModel, tmp_path: Path, what: str) -> None:
    form, act, message = FILES[what]
    source = write_original(tmp_path / "src", original, form=form)
    act(source)
    assert message in import_error(source, tmp_path / "out", **HEADS)


def test_a_pickle_that_could_run_code_is_refused(original: OriginalModel, tmp_path: Path) -> None:
    source = write_original(tmp_path / "src", original, form="bin", shards=1)
    torch.save({"a": Path("b")}, source / "pytorch_model.bin")
    assert "holds more than tensors" in import_error(source, tmp_path / "out", **HEADS)


def test_a_delta_and_a_base_that_do_not_belong_together_are_refused(separated: OriginalModel, tmp_path: Path) -> None:
    delta, base, _ = write_delta_and_base(make_original("1.0"), tmp_path, torch.float32)
    clip = write_clip(tmp_path / "clip", separated.clip)
    options: dict[str, Any] = {"vision": str(clip)}
    assert "looks like a delta" in import_error(delta, tmp_path / "out", **options)
    model = write_original(tmp_path / "model", separated, tower=False)
    assert "is no delta" in import_error(model, tmp_path / "out", base=str(base), **options)
    base_tensors = {
        name: base_tensor for name, base_tensor in original_tensors(separated, tower=False).items() if "mm_" not in name
    }
    for name, change, message in (
        ("deep", {"model.layers.2.mlp.up_proj.weight": torch.ones(48, 32)}, "has no delta for"),
        ("wide", {"model.norm.weight": torch.ones(48)}, "model.norm.weight is of shape [48], not [32]"),
    ):
        write_tensors(tmp_path / name, {**base_tensors, **change}, "bin", 1)
        assert message in import_error(delta, tmp_path / "out", base=str(tmp_path / name), **options)
    del base_tensors["model.norm.weight"]
    write_tensors(tmp_path / "poor", base_tensors, "bin", 1)
    assert "lacks model.norm.weight, which" in import_error(
        delta, tmp_path / "out", base=str(tmp_path / "poor"), **options
    )


def test_a_missing_directory_and_a_model_other_than_clip_are_refused(original: OriginalModel, tmp_path: Path) -> None:
    source = write_original(tmp_path / "src", original, tower=False)
    assert "none is no directory" in import_error(tmp_path / "none", tmp_path / "out")
    assert "a model of type 'llava_mistral', not a CLIP" in import_error(source, tmp_path / "out", vision=str(source))
    other = randomize(
        type(original.clip)(type(original.clip.config)(**{**original.clip.config.to_dict(), "hidden_size": 64}))
    )
    clip = write_clip(tmp_path / "clip", other)
    assert "is of shape" in import_error(source, tmp_path / "out", vision=str(clip))
    odd_heads = write_original(tmp_path / "heads", original)
    assert "32 wide, not a multiple of 64. Give --vision, or --vision-heads" in import_error(
        odd_heads, tmp_path / "out"
    )


def test_a_full_directory_is_not_overwritten(original: OriginalModel, tmp_path: Path) -> None:
    source = write_original(tmp_path / "src", original)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept").touch()
    assert "is not an empty directory" in import_error(source, tmp_path / "out", **HEADS)
    (tmp_path / "out" / "kept").unlink()
    import_llava_med(str(source), tmp_path / "out", **HEADS)
    assert (tmp_path / "out" / "config.json").is_file()
