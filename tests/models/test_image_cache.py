"""Cached image states equal those computed again, and are never those of another tower."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from normtune.data.records import Dataset
from normtune.data.registry import open_dataset
from normtune.errors import InputError
from normtune.evaluation.config import EvaluateConfig
from normtune.evaluation.evaluate import evaluate_config
from normtune.methods.adapt import adapt
from normtune.models.families.miss import MissFamily
from normtune.models.family import Family
from normtune.models.image_cache import ImageCache, image_store, tensor_bytes
from normtune.models.loading import load
from normtune.models.miss.vision import VisionTransformer
from normtune.models.parts import part_of
from normtune.training.config import TrainConfig
from normtune.training.train import train
from tests.models.families.test_families import grouped
from tests.models.families.test_families import image as family_image
from tests.support.tiny_miss import tiny_miss
from tests.support.tiny_models import MORE, TINY, make_tiny
from tests.support.tolerance import approx
from tests.training.test_train import DATA, config, equal_adapters

KINDS = ("miss", "llava", "qwen3_vl", "idefics3")


def image(key: str) -> Image.Image:
    noise = torch.randint(0, 256, (40, 56, 3), generator=torch.Generator().manual_seed(int(key)))
    return Image.fromarray(noise.to(torch.uint8).numpy())


IMAGES = Dataset("noise", [], image)


@pytest.fixture(scope="module", params=KINDS)
def source(request: Any, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base if request.param == "miss" else make_tiny(request.param, tmp_path_factory.mktemp("tiny"))


def cache(family: Family, folder: Path | None, **options: Any) -> ImageCache:
    return ImageCache(family, IMAGES, frozen=True, store=image_store(folder, family), **options)


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_states_from_disk_are_those_computed_to_the_bit(
    source: Path, tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = load(str(source), dtype=dtype)
    without = cache(family, None)("1")
    assert equal(cache(family, tmp_path)("1"), without)
    again = load(str(source), dtype=dtype)
    monkeypatch.setattr(type(again), "encode_image", lambda self, pixels: pytest.fail("the tower ran again"))
    assert equal(cache(again, tmp_path)("1"), without)
    (entry,) = tmp_path.rglob("*.safetensors")
    assert len(entry.stem) == 64 and set(entry.stem) <= set("0123456789abcdef")


def test_a_tower_with_one_changed_value_has_other_entries(source: Path, tmp_path: Path) -> None:
    family = load(str(source))
    part = part_of(family.model)
    directories = {image_store(tmp_path, family).folder}  # type: ignore[union-attr]
    vision = [p for name, p in family.model.named_parameters() if part(name) == "vision"]
    with torch.no_grad():
        for parameter in (vision[0], vision[-1]):
            last = parameter.view(-1)[-1:]
            last.copy_(torch.nextafter(last, last.new_tensor([9.0])))
            directories.add(image_store(tmp_path, family).folder)  # type: ignore[union-attr]
    assert len(directories) == 3


def test_language_values_do_not_change_the_key(source: Path, tmp_path: Path) -> None:
    family = load(str(source))
    before = image_store(tmp_path, family)
    tuned = adapt(family.model, "decoder=full" if isinstance(family, MissFamily) else "language=full")
    with torch.no_grad():
        for parameter in tuned.trained.values():
            parameter += 1
    after = image_store(tmp_path, family)
    assert before is not None and after is not None and before.folder == after.folder


@pytest.mark.parametrize("method", ["ln", "lora", "adapter", "prefix", "ptuning"])
def test_parameters_added_to_the_tower_change_the_key(base: Path, tmp_path: Path, method: str) -> None:
    family = load(str(base))
    tuned = adapt(family.model, f"vision={method}")
    first = image_store(tmp_path, family)
    with torch.no_grad():
        next(iter(tuned.trained.values())).view(-1)[0] += 1
    second = image_store(tmp_path, family)
    assert first is not None and second is not None and first.folder != second.folder


def test_an_image_preprocessed_differently_has_another_entry(source: Path, tmp_path: Path) -> None:
    family = load(str(source))
    first = cache(family, tmp_path)("1")
    processor: Any = family.processor.image_processor
    processor.image_mean = [0.2, 0.3, 0.4]
    assert not equal(cache(family, tmp_path)("1"), first)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2


def test_images_beyond_the_limit_are_read_from_disk(base: Path, tmp_path: Path) -> None:
    family = load(str(base))
    size = sum(value.nbytes for value in cache(family, None)("1").values())
    limited = cache(family, tmp_path, limit_bytes=size)
    whole = [limited(key) for key in ("1", "2")]
    assert list(limited.entries) == ["1"] and limited.bytes == size
    assert equal(limited("2"), whole[1]) and limited("1") is whole[0]


def test_an_unreadable_image_is_named(base: Path) -> None:
    def broken(key: str) -> Image.Image:
        raise OSError("truncated")

    opened = ImageCache(load(str(base)), Dataset("slake", [], broken))
    with pytest.raises(InputError, match=r"cannot read image x of dataset slake \(OSError\)"):
        opened("x")


def test_training_from_a_warm_cache_gives_the_same_adapter_and_runs_no_tower(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = {"tune": "encoder=ln", "epochs": 1}
    monkeypatch.setattr("normtune.training.train.estimate_memory", lambda *_: {})  # it runs the tower without values
    result = train(config(base, tmp_path / "without", **recipe))
    assert result.computed_once == "image states"
    assert "computed once per image: image states" in str(result)
    train(config(base, tmp_path / "cold", cache=tmp_path / "cache", **recipe))
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 6
    monkeypatch.setattr(VisionTransformer, "forward", lambda *_: pytest.fail("the tower ran again"))
    train(config(base, tmp_path / "warm", cache=tmp_path / "cache", **recipe))
    assert equal_adapters(tmp_path / "without", tmp_path / "cold") and equal_adapters(
        tmp_path / "without", tmp_path / "warm"
    )


def test_a_trained_tower_is_not_cached(base: Path, tmp_path: Path) -> None:
    result = train(config(base, tmp_path / "ln", epochs=1, limit=4, cache=tmp_path / "cache"))
    assert result.computed_once is None and not (tmp_path / "cache").exists()


def test_the_cache_is_not_part_of_a_runs_identity() -> None:
    from normtune.training.identity import option_identity

    with_cache = TrainConfig(model="nano", data=DATA, out=Path("x"), cache=Path("c"))
    assert option_identity(with_cache) == option_identity(TrainConfig(model="nano", data=DATA, out=Path("x")))


def test_evaluation_from_a_cache_gives_the_same_answers_and_separates_adapters(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(config(base, tmp_path / "ln", tune="vision=ln,decoder=ln", epochs=1, limit=20))
    options = {"model": str(base), "data": DATA, "device": "cpu", "candidates": "yes/no"}
    images = len(dict.fromkeys(e.images for e in open_dataset(DATA).split("test")))

    def answers(out: str, adapter: str | None, folder: Path | None) -> list[tuple[str, float]]:
        evaluate_config(
            EvaluateConfig(
                **options, out=tmp_path / out, cache=folder, adapter=None if adapter is None else tmp_path / adapter
            )
        )
        rows = map(json.loads, (tmp_path / out / "predictions.jsonl").read_text().splitlines())
        return [(row["prediction"], row["score"]) for row in rows]

    folder = tmp_path / "cache"
    without = {adapter: answers("plain", adapter, None) for adapter in (None, "ln")}
    cold = {adapter: answers("cold", adapter, folder) for adapter in (None, "ln")}
    assert len(list(folder.iterdir())) == 2 and len(list(folder.rglob("*.safetensors"))) == 2 * images
    with monkeypatch.context() as patch:
        patch.setattr(VisionTransformer, "forward", lambda *_: pytest.fail("the tower ran again"))
        warm = {adapter: answers("warm", adapter, folder) for adapter in (None, "ln")}
    assert warm == cold and without[None] != without["ln"]
    for adapter, answer_rows in without.items():
        for (text, score), (cold_text, cold_score) in zip(answer_rows, cold[adapter], strict=True):
            assert text == cold_text and score == approx(cold_score)


@pytest.mark.parametrize("name", [*TINY, *MORE, "miss"])
def test_images_in_the_dtype_of_the_base_give_equal_losses(name: str, tmp_path: Path) -> None:
    """Every model rounds pixels before it computes with them, so that half of their bytes are enough in bf16."""
    family: Any = tiny_miss() if name == "miss" else load(str(make_tiny(name, tmp_path)))
    family.model.to(torch.bfloat16)
    images = ImageCache(family, Dataset("noise", [], family_image))
    groups, pixels = grouped(family, [[0, 1], [3]])
    halved = [[images(key) for key in group.images] for group in groups]
    assert all(row["pixel_values"].dtype == torch.bfloat16 for rows in halved for row in rows)
    assert images.bytes < sum(tensor_bytes(image) for rows in pixels for image in rows)
    with torch.no_grad():
        losses = [family.loss(family.collate(groups, values))[0] for values in (pixels, halved)]
    if name.startswith("gemma4"):  # it scales pixels in fp32 before it rounds them
        assert float(losses[0]) == approx(float(losses[1]), dtype=torch.bfloat16)
    else:
        assert torch.equal(*losses)
