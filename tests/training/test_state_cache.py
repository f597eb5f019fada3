"""Cached hidden states: the same adapter, each image computed once, also when read from disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from normtune.data.registry import open_dataset
from normtune.methods.adapt import adapt
from normtune.models.causal.family import CausalFamily
from normtune.models.families.llava import LlavaFamily
from normtune.models.families.miss import MissFamily
from normtune.models.family import Family
from normtune.models.frozen_trunk import FrozenTrunk
from normtune.models.image_cache import LIMIT_BYTES
from normtune.models.loading import load
from normtune.models.miss.text import TextModel
from normtune.models.miss.vision import VisionTransformer
from normtune.training import state_cache
from normtune.training.collator import Collator, build_collator
from normtune.training.config import TrainConfig
from normtune.training.train import train
from tests.support.kill import StopAfterStep
from tests.support.tiny_models import make_tiny
from tests.support.tolerance import assert_close
from tests.training.test_train import config, equal_adapters, tensors

UPPER = {"miss": "decoder=ln", "llava": "language=ln[1:]"}


@pytest.fixture(scope="module", params=UPPER)
def kind(request: Any) -> str:
    return request.param


@pytest.fixture(scope="module")
def source(kind: str, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base if kind == "miss" else make_tiny("llava", tmp_path_factory.mktemp("llava"))


def options(kind: str, **more: Any) -> dict[str, Any]:
    return {"tune": UPPER[kind], "epochs": 2, "limit": 24} | more


def make_collator(source: Path, out: Path, limit_bytes: int = LIMIT_BYTES, **more: Any) -> Collator:
    run: TrainConfig = config(source, out, **more)
    dataset = open_dataset(run.data)
    family = load(run.model)
    tuned = adapt(family.model, run.tune)
    return build_collator(run, family, tuned, dataset, dataset.split("train"), limit_bytes=limit_bytes)


def test_cached_states_give_the_same_adapter(
    kind: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = train(config(source, tmp_path / "cached", **options(kind)))
    description = "question states" if kind == "miss" else "hidden states below layer 1 of 2"
    assert result.computed_once is not None and description in result.computed_once
    monkeypatch.setattr(MissFamily, "frozen_trunk", Family.frozen_trunk)
    monkeypatch.setattr(CausalFamily, "frozen_trunk", Family.frozen_trunk)
    assert train(config(source, tmp_path / "recomputed", **options(kind))).computed_once == "image states"
    cached, recomputed = tensors(tmp_path / "cached"), tensors(tmp_path / "recomputed")
    for name in recomputed:
        assert_close(cached[name], recomputed[name], msg=name)


@pytest.fixture
def no_memory_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    """The preflight's estimate runs the encoder too, on tensors without values."""
    monkeypatch.setattr("normtune.training.train.estimate_memory", lambda *_: {})


@pytest.mark.usefixtures("no_memory_estimate")
def test_each_image_is_computed_once_and_never_with_a_warm_cache(
    kind: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = 0
    family = MissFamily if kind == "miss" else LlavaFamily
    original: Any = family.encode_image

    def counting(self: Any, pixels: Any) -> Any:
        nonlocal encoded
        encoded += 1
        return original(self, pixels)

    monkeypatch.setattr(family, "encode_image", counting)
    run = options(kind, cap=2, dtype="float32" if kind == "miss" else "bfloat16")
    images = len({e.images for e in open_dataset("phantom-b:6").split("train")[:24]})
    train(config(source, tmp_path / "without", **run))
    assert encoded == images
    train(config(source, tmp_path / "cold", cache=tmp_path / "cache", **run))
    assert encoded == 2 * images
    train(config(source, tmp_path / "warm", cache=tmp_path / "cache", **run))
    assert encoded == 2 * images
    assert equal_adapters(tmp_path / "without", tmp_path / "cold") and equal_adapters(
        tmp_path / "without", tmp_path / "warm"
    )


@pytest.mark.usefixtures("no_memory_estimate")
def test_warm_cache_needs_no_encoder(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = options("miss", cache=tmp_path / "cache")
    train(config(base, tmp_path / "cold", **run))
    forward = TextModel.forward

    def only_decode(self: TextModel, *args: Any, **kwargs: Any) -> torch.Tensor:
        assert kwargs.get("causal"), "the question encoder ran again"
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(VisionTransformer, "forward", lambda *_: pytest.fail("the tower ran again"))
    monkeypatch.setattr(TextModel, "forward", only_decode)
    train(config(base, tmp_path / "warm", **run))
    assert equal_adapters(tmp_path / "cold", tmp_path / "warm")


def test_states_that_do_not_fit_are_cached_on_disk_only(kind: str, source: Path, tmp_path: Path) -> None:
    whole = make_collator(source, tmp_path, tune=UPPER[kind])
    assert whole.states is not None
    rows = sum(len(whole.states.trunk.tokens_of(s)) for segments in whole.states.questions.values() for s in segments)
    first = whole.states._entry(next(iter(whole.states.questions)))
    rows += len(whole.states.questions) * len(first["prefix"])
    needed = rows * first["segments"][0].nbytes
    for limit, is_cached in ((needed, True), (needed - 1, False)):
        assert (make_collator(source, tmp_path, limit, tune=UPPER[kind]).states is not None) is is_cached
        assert make_collator(source, tmp_path, limit, tune=UPPER[kind], cache=tmp_path / "cache").states is not None


def test_another_trunk_has_its_own_cache_folder(tmp_path: Path) -> None:
    source = make_tiny("llava", tmp_path / "base")

    def folder(recipe: str, change: str | None = None) -> Path:
        family = load(str(source))
        tuned = adapt(family.model, recipe)
        if change is not None:
            with torch.no_grad():
                family.model.get_parameter(change).view(-1)[-1] += 1
        trunk: FrozenTrunk | None = family.frozen_trunk(tuned.trained.values())
        assert trunk is not None
        store = state_cache.state_store(tmp_path / "cache", family, trunk)
        assert store is not None
        return store.folder

    layers = "model.language_model.layers"
    upper = folder("language=ln[1:]")
    assert upper == folder("language=ln[1:]", f"{layers}.1.mlp.up_proj.weight")
    assert upper == folder("language=lora(r=2)[1:]")
    others = {
        folder("language=ln[1:]", f"{layers}.0.mlp.up_proj.weight"),
        folder("language=ln[1:]", "model.language_model.embed_tokens.weight"),
        folder("language=ln[1:]", "model.multi_modal_projector.linear_1.bias"),
    }
    assert len(others) == 3 and upper not in others


def test_nothing_is_cached_without_grouping(kind: str, source: Path, tmp_path: Path) -> None:
    collator = make_collator(source, tmp_path, tune=UPPER[kind], group=False)
    assert collator.cached_states is None and collator.states is None


def test_resumed_run_gives_the_same_adapter(kind: str, source: Path, tmp_path: Path) -> None:
    """Groups are capped and shuffled: the resumed half uses images in another order than the whole run."""
    run = options(kind, cap=2, batch=6, save_every=3)
    train(config(source, tmp_path / "whole", **run))
    with pytest.raises(KeyboardInterrupt):
        train(config(source, tmp_path / "stopped", **run), progress=StopAfterStep(5))
    train(config(source, tmp_path / "stopped", **run))
    assert equal_adapters(tmp_path / "whole", tmp_path / "stopped")
