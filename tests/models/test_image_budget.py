"""`--max-pixels`: fewer image tokens, as with the same setting of transformers' image processors."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from normtune.data.groups import Group
from normtune.errors import InputError
from normtune.models.family import Family
from normtune.models.loading import load
from tests.support.tiny_models import make_tiny

LARGE = Image.effect_noise((96, 64), 60).convert("RGB")
LONG, SMALL = Image.effect_noise((96, 32), 60).convert("RGB"), Image.effect_noise((20, 20), 60).convert("RGB")
LIMITS = {  # a limit below what the tiny model reads by itself, for each kind of image processor
    "qwen2_vl": 4 * 16**2, "qwen3_vl": 4 * 16**2, "glm4v": 4 * 16**2, "llava_next": 32 * 64, "llava_onevision": 32 * 64,
    "internvl": 2 * 32**2, "idefics3": 32**2, "smolvlm": 32**2,
}  # fmt: skip


def tiny(name: str, folder: Path) -> Family:
    return load(str(make_tiny(name, folder / name)), dtype="float32", device="cpu")


def tokens(family: Family, image: Image.Image) -> int:
    return family.prefix_tokens([family.preprocess_image(image)])


@pytest.mark.parametrize("name", LIMITS)
def test_a_limit_takes_fewer_tokens_and_is_removed_again(name: str, tmp_path: Path) -> None:
    family, image = tiny(name, tmp_path), LONG if name == "internvl" else LARGE
    settings = copy.deepcopy(family.processor.image_processor.to_dict())
    own = tokens(family, image)
    with family.pixel_limit(LIMITS[name]):
        limited = tokens(family, image)
        assert family.max_pixels == LIMITS[name] and limited < own
        # loss and answers work with the new number of tokens
        pixels = family.preprocess_image(image)
        group = Group(("a",), (family.tokenize("1", "Where?", "lung"), family.tokenize("2", "What?", "a cat")))
        loss, count = family.loss(family.collate([group], [[pixels]]))
        assert torch.isfinite(loss) and int(count) > 0
        open_group = Group(("a",), (family.tokenize("1", "Where?", None), family.tokenize("2", "What?", None)))
        assert len(family.generate_answers([open_group], [[pixels]], max_new_tokens=2)[0]) == 2
        with family.pixel_limit(1 << 40):
            assert tokens(family, image) == own  # no limit raises the model's own
        assert tokens(family, image) == limited
    assert family.max_pixels is None and tokens(family, image) == own
    assert family.processor.image_processor.to_dict() == settings


@pytest.mark.parametrize("name", ["qwen2_vl", "glm4v"])
def test_an_image_of_any_size_stays_within_the_area(name: str, tmp_path: Path) -> None:
    family = tiny(name, tmp_path)
    limit = LIMITS[name]
    patch = family.processor.image_processor.patch_size
    with family.pixel_limit(limit):
        for image in (LARGE, SMALL):
            _, height, width = family.preprocess_image(image)["image_grid_thw"].tolist()
            assert height * width * patch**2 <= limit


def test_a_merged_checkpoint_saves_no_limit_that_was_removed(tmp_path: Path) -> None:
    family = tiny("llava_next", tmp_path)
    grids = copy.deepcopy(family.model.config.image_grid_pinpoints)  # type: ignore[union-attr]
    with family.pixel_limit(LIMITS["llava_next"]):
        assert family.model.config.image_grid_pinpoints != grids  # type: ignore[union-attr]
    assert family.model.config.image_grid_pinpoints == grids  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["llava", "gemma3", "paligemma"])
def test_families_of_one_size_refuse_a_limit(name: str, tmp_path: Path) -> None:
    family = tiny(name, tmp_path)
    family.use_max_pixels(None)
    with pytest.raises(InputError, match=f"models of type {name} read every image with the same number of tokens"):
        family.use_max_pixels(1000)
    assert family.max_pixels is None


@pytest.mark.parametrize("name", ["qwen2_vl", "llava_next", "internvl", "idefics3"])
def test_a_limit_below_the_smallest_image_is_refused(name: str, tmp_path: Path) -> None:
    family, before = tiny(name, tmp_path), None
    before = tokens(family, LARGE)
    with pytest.raises(InputError, match=r"--max-pixels 10: this model reads at least \d+ pixels of an image"):
        family.use_max_pixels(10)
    assert tokens(family, LARGE) == before


def test_training_records_the_limit_and_loading_applies_it(tmp_path: Path) -> None:
    import normtune
    from normtune.evaluation.config import EvaluateConfig
    from normtune.evaluation.evaluate import evaluate_config
    from normtune.runtime.files import read_json
    from normtune.training.config import TrainConfig
    from normtune.training.train import train

    base, limit = make_tiny("qwen2_vl", tmp_path / "base"), LIMITS["qwen2_vl"]
    run: dict[str, Any] = {"model": str(base), "data": "phantom-b:3", "device": "cpu"}
    train(TrainConfig(**run, out=tmp_path / "run", max_steps=1, batch=4, max_pixels=limit))
    assert read_json(tmp_path / "run/adapter.json")["data"]["limits"]["max_pixels"] == limit
    assert f"max_pixels: {limit}" in (tmp_path / "run/run.yaml").read_text()
    evaluation = EvaluateConfig(**run, out=tmp_path / "scores", adapter=tmp_path / "run", limit=2, max_new_tokens=2)
    evaluate_config(evaluation)
    family = normtune.load(base, device="cpu")
    seen: list[int | None] = []
    preprocess = family.preprocess_image
    family.preprocess_image = lambda image: (seen.append(family.max_pixels), preprocess(image))[1]  # type: ignore[method-assign,func-returns-value]
    normtune.ask(family, LARGE, "Where?", adapter=tmp_path / "run")
    normtune.ask(family, LARGE, "Where?")
    normtune.ask(family, LARGE, "Where?", adapter=tmp_path / "run", max_pixels=2 * limit)
    assert seen == [limit, None, 2 * limit] and family.max_pixels is None


def test_a_server_refuses_an_adapter_of_another_limit(tmp_path: Path) -> None:
    from normtune.serving.engine.engine import Engine
    from normtune.training.config import TrainConfig
    from normtune.training.train import train

    base, limit = make_tiny("qwen2_vl", tmp_path / "base"), LIMITS["qwen2_vl"]
    run = {"model": str(base), "data": "phantom-b:3", "device": "cpu", "max_steps": 1, "batch": 4}
    train(TrainConfig(**run, out=tmp_path / "run", max_pixels=limit))  # type: ignore[arg-type]
    engine = Engine(load(str(base), device="cpu"))
    try:
        with pytest.raises(InputError, match=rf"trained with --max-pixels {limit}, and this server reads"):
            engine.register("a", tmp_path / "run")
    finally:
        engine.close(drain=False)
    family = load(str(base), device="cpu")
    family.use_max_pixels(limit)
    engine = Engine(family)
    try:
        assert engine.register("a", tmp_path / "run").name == "a"
    finally:
        engine.close(drain=False)
