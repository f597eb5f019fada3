"""Adapters trained in one pass end where each ends by itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from normtune.adapters.multi.bank import build_bank
from normtune.adapters.multi.rows import RowAdapters
from normtune.adapters.storage import load_adapter
from normtune.data.groups import group_by_image
from normtune.data.records import Example
from normtune.errors import InputError
from normtune.methods.adapt import adapt
from normtune.methods.norms import TunedNorm
from normtune.models.family import Family
from normtune.models.image_cache import ImageCache
from normtune.models.loading import load
from normtune.models.miss.vision import VisionTransformer
from normtune.runtime.files import read_json
from normtune.training import joint_run as lane_module
from normtune.training.collator import Collator
from normtune.training.config import TrainConfig
from normtune.training.joint import backward, train_together
from normtune.training.joint_run import AdapterRun
from normtune.training.train import train
from tests.models.families.test_families import PAIRS, image
from tests.support.base_models import outcome
from tests.support.fake_family import fake_dataset
from tests.support.tiny_miss import save_tiny_miss
from tests.support.tiny_models import TINY, make_tiny

TOLERANCE = 1e-5
EXAMPLES = [Example(str(i), (name,), *pair, "open", "train") for i, (name, *pair) in enumerate(PAIRS)]


def config(base: Path, out: Path, **options: Any) -> TrainConfig:
    values: dict[str, Any] = {"data": "phantom-b:4", "tune": "ln", "batch": 8, "limit": 16}
    values |= {"epochs": 2, "save_every": 99}
    return TrainConfig(model=str(base), out=out, device="cpu", **(values | options))


def assert_same_end(together: Path, apart: Path) -> None:
    """The same delta and the same records, in another folder and another time."""
    ours, theirs = (load_file(folder / "adapter.safetensors") for folder in (together, apart))
    assert ours.keys() == theirs.keys()
    assert all(bool((ours[name] - theirs[name]).abs().max() < TOLERANCE) for name in ours)
    one, other = (read_json(folder / "adapter.json") for folder in (together, apart))
    logs = [info["metrics"]["training"].pop("loss") for info in (one, other)]
    assert [step for step, _ in logs[0]] == [step for step, _ in logs[1]] and logs[0]
    torch.testing.assert_close(torch.tensor(logs[0]), torch.tensor(logs[1]), rtol=TOLERANCE, atol=0)
    for info in (one, other):
        del info["sha256"], info["metrics"]
    assert one == other
    for name in ("pairs", "steps", "trainable", "computed_once", "recipe", "warning"):
        first, second = (read_json(folder / "train_result.json")[name] for folder in (together, apart))
        assert first == second, name
    assert not (together / "checkpoints").exists()


@pytest.mark.parametrize("at_once", [3, 2])
def test_adapters_of_one_pass_equal_their_runs_apart(at_once: int, base: Path, tmp_path: Path) -> None:
    """Of seeds, rates, schedules, clipping, batches and data sets of their own."""
    ways: list[dict[str, Any]] = [
        {"lr": 1e-3, "schedule": "linear", "seed": 1, "max_grad_norm": 0.5, "label_smoothing": 0.1},
        {"batch": 3, "accumulate": 2, "seed": 2, "max_steps": 4, "balance": "tokens"},
        {"data": "phantom-a:3", "cap": 3, "warmup": 0.5, "max_steps": 2},
    ]
    ways = [{"memory": "tight"} | way for way in ways]
    configs = [config(base, tmp_path / f"{i}", **way) for i, way in enumerate(ways)]
    results = train_together(configs, at_once=at_once)
    assert [result.together for result in results] == [3] * 3
    for i, way in enumerate(ways):
        alone = train(config(base, tmp_path / "apart" / f"{i}", **way))
        assert_same_end(tmp_path / f"{i}", tmp_path / "apart" / f"{i}")
        assert alone.together == 1 and alone.changed == results[i].changed
    ends = [load_file(tmp_path / f"{i}" / "adapter.safetensors") for i in range(3)]
    name = next(iter(ends[0]))
    assert all(not torch.allclose(ends[0][name], other[name], atol=1e-4) for other in ends[1:])
    load_adapter(load(str(base)).model, tmp_path / "1")


def test_what_is_frozen_runs_once_an_image_for_all_adapters(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    forward = VisionTransformer.forward

    def counting(self: VisionTransformer, pixels: Tensor) -> Tensor:
        seen.append(len(pixels))
        return forward(self, pixels)

    monkeypatch.setattr(VisionTransformer, "forward", counting)
    ways = [{"tune": "decoder=ln", "seed": seed} for seed in (0, 1)]
    results = train_together([config(base, tmp_path / f"{i}", **way) for i, way in enumerate(ways)])
    images = len({example.images for example in _examples(base, tmp_path)})
    assert sum(seen) == images and results[0].computed_once == "question states, which the decoder reads"
    train(config(base, tmp_path / "apart", **ways[1]))
    assert_same_end(tmp_path / "1", tmp_path / "apart")


def _examples(base: Path, out: Path) -> Sequence[Example]:
    from normtune.data.registry import open_configured

    return open_configured(config(base, out)).split("train")[:16]


def test_llava_adapters_equal_their_runs_apart(tmp_path: Path) -> None:
    """Hidden states below the tuned layers are shared."""
    base = make_tiny("llava", tmp_path / "base")
    ways = [{"tune": "language=ln[1:]", "seed": seed, "max_steps": 3} for seed in (0, 1)]
    train_together([config(base, tmp_path / f"{i}", **way) for i, way in enumerate(ways)], at_once=2)
    train(config(base, tmp_path / "apart", **ways[1]))
    assert_same_end(tmp_path / "1", tmp_path / "apart")


def test_a_pass_that_was_killed_goes_on_from_each_adapters_checkpoint(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adapters are cut off at different steps; one of them was done."""
    ways = [{"save_every": 1}, {"seed": 1, "save_every": 2}, {"max_steps": 2}]
    configs = [config(base, tmp_path / f"{i}", **way) for i, way in enumerate(ways)]
    train_together([one.model_copy(update={"out": tmp_path / "whole" / one.out.name}) for one in configs])
    after, passes = AdapterRun.record_batch, 0

    def cut(self: AdapterRun, *rest: Any) -> None:
        nonlocal passes
        passes += self.adapter == 0
        if passes == 4:
            raise KeyboardInterrupt
        after(self, *rest)

    monkeypatch.setattr(AdapterRun, "record_batch", cut)
    with pytest.raises(KeyboardInterrupt):
        train_together(configs)
    monkeypatch.setattr(AdapterRun, "record_batch", after)
    with pytest.raises(InputError, match=r"together-3 is of a run with other options \(lr\)"):
        train_together([configs[0].model_copy(update={"lr": 1.0}), *configs[1:]])
    steps: list[int] = []
    monkeypatch.setattr(
        AdapterRun, "next", lambda self, plain=AdapterRun.next: steps.append(self.adapter) or plain(self)
    )
    train_together(configs)
    total = read_json(tmp_path / "0" / "train_result.json")["steps"]
    assert [steps.count(adapter) for adapter in range(3)] == [total - 3, total - 2, 0]
    for one in configs:
        assert_same_end(one.out, tmp_path / "whole" / one.out.name)


def test_a_disk_that_is_full_is_told(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(lane_module, "save_file", full)
    told = outcome(lambda: train_together([config(base, tmp_path / "a", max_steps=1)]))
    assert "cannot write a checkpoint" in told and "it goes on from the last whole checkpoint" in told


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"tune": "decoder=ln"}, "--tune is ln for .* runs of one pass train the same norms"),
        ({"dtype": "bfloat16"}, "--dtype is float32 for .* runs of one pass share it"),
        ({"group": False}, "--no-group turns the base's dropout on"),
        ({"compile": True}, "--compile: layers of several adapters"),
        ({"tracker": "wandb"}, "--tracker wandb"),
        ({"out": "a"}, "two adapters would be written to"),
    ],
)
def test_runs_that_cannot_share_a_pass_are_refused(
    options: dict[str, Any], told: str, base: Path, tmp_path: Path
) -> None:
    options = {key: tmp_path / value if key == "out" else value for key, value in options.items()}
    second = config(base, tmp_path / "b").model_copy(update=options)
    with pytest.raises(InputError, match=told):
        train_together([config(base, tmp_path / "a"), second])


@pytest.mark.parametrize("tune", ["encoder=lora(r=2)", "decoder=attention", "vision=ln,decoder=ia3"])
def test_recipes_of_more_than_norms_are_refused(tune: str, base: Path, tmp_path: Path) -> None:
    told = outcome(lambda: train_together([config(base, tmp_path / "a", tune=tune)]))
    assert "adapters share a pass by their norms alone" in told
    assert "trains nothing" in outcome(lambda: train_together([config(base, tmp_path / "a", tune="frozen")]))
    assert "at least one config" in outcome(lambda: train_together([]))


# --- every family -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["miss", *TINY])
def family(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Family:
    folder = tmp_path_factory.mktemp(request.param)
    return load(str(save_tiny_miss(folder) if request.param == "miss" else make_tiny(request.param, folder)))


def test_gradients_of_a_mixed_batch_are_each_adapters_own(family: Any) -> None:
    """All norms are tuned, those of the image encoder too; images are of several sizes, and shared."""
    tuned = adapt(family.model, "ln")
    starts = []
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        starts.append(
            {
                name: one.detach() + 0.2 * torch.randn(one.shape, generator=generator)
                for name, one in tuned.trained.items()
            }
        )
    collate = Collator(family, ImageCache(family, fake_dataset(EXAMPLES, image)))
    batches = [group_by_image(EXAMPLES, max_group_size=2), group_by_image(EXAMPLES[2:])]
    wanted, losses = [], []
    for start, batch in zip(starts, batches, strict=True):
        with torch.no_grad():
            for name, one in tuned.trained.items():
                one.copy_(start[name])
        family.model.zero_grad()
        loss, tokens = family.loss(collate(batch))
        (loss / tokens).backward()
        losses.append(float(loss.detach() / tokens))
        wanted.append({name: one.grad.clone() for name, one in tuned.trained.items() if one.grad is not None})
    norms = {name: norm for name, norm in family.model.named_modules() if isinstance(norm, TunedNorm)}
    mixed = build_bank(tuned, 2)
    for adapter, start in enumerate(starts):
        mixed.set_adapter(adapter, start)
    lanes: list[Any] = [
        SimpleNamespace(
            adapter=adapter,
            config=SimpleNamespace(label_smoothing=0.0),
            collate=collate,
            scale_loss=lambda loss, batch=batch: (
                loss / sum(len(collate.segment(e).answer) for g in batch for e in g)
            ),
        )
        for adapter, batch in enumerate(batches)
    ]
    rows = ("pad", "pack") if hasattr(family, "rows") else ("pad",)
    for layout in rows:
        family.rows = layout
        mixed.grads.zero_()
        found = backward(family, mixed, list(zip(lanes, batches, strict=True)))
        assert found == pytest.approx(losses, rel=TOLERANCE)
        for adapter in range(2):
            scale = max(float(one.norm()) for one in wanted[adapter].values())
            for name, place in mixed.slices.items():
                own = wanted[adapter].get(name, torch.zeros(()))
                gap = float((mixed.grads[adapter, place] - own.flatten()).norm())
                assert gap < TOLERANCE * max(float(own.norm()), 0.01 * scale), (layout, name)
    family.rows = "pad"
    assert len(norms) > 5


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("kind", ["miss", "llava"])
def test_answers_of_a_mixed_batch_are_each_adapters_own(
    kind: str, beams: int, base: Path, tmp_path: Path
) -> None:
    """Answers end at different lengths, so that rows leave the batch."""
    family = load(str(base if kind == "miss" else make_tiny(kind, tmp_path)))
    tuned = adapt(family.model, "ln")
    mixed = build_bank(tuned, 3)
    generator = torch.Generator().manual_seed(1)
    mixed.values.add_(0.5 * torch.randn(mixed.values.shape, generator=generator))
    asked = [Example(e.id, e.images, e.question, "", "open", "train") for e in EXAMPLES]
    groups, pixels, owners = [], [], []
    from normtune.data.groups import Group

    for members in group_by_image(asked):
        own = family.preprocess_image(image(members[0].images[0]))
        for adapter in (2, 0, 1):  # one image of several adapters
            segments = tuple(family.tokenize(e.id, e.question, None) for e in members)
            groups.append(Group(members[0].images, segments))
            pixels.append([dict(own)])
            owners.append(adapter)
    family.active_text_rows = mixed.texts
    rows = [len(group.segments) if kind == "miss" else 1 for group in groups]
    texts = [owner for owner, count in zip(owners, rows, strict=True) for _ in range(count)]
    with mixed.use(RowAdapters(owners), RowAdapters(texts)):
        found = family.generate_answers(groups, pixels, max_new_tokens=8, beams=beams)
    for adapter in range(3):
        with mixed.use(RowAdapters([adapter]), RowAdapters([adapter])):
            family.active_text_rows = None
            for group, images, owner, answers in zip(groups, pixels, owners, found, strict=True):
                if owner == adapter:
                    alone = family.generate_answers([group], [images], max_new_tokens=8, beams=beams)[0]
                    assert [a.text for a in alone] == [a.text for a in answers]
                    assert [a.score for a in alone] == pytest.approx([a.score for a in answers], rel=1e-4)
    assert len({answer.text for answers in found for answer in answers}) > 3
