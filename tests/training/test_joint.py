"""Adapters that are trained in one pass equal adapters that are trained separately."""

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
from normtune.training import joint_run
from normtune.training.collator import Collator
from normtune.training.config import TrainConfig
from normtune.training.joint import accumulate_gradients, train_together
from normtune.training.joint_run import AdapterRun
from normtune.training.train import train
from tests.models.families.test_families import PAIRS, image
from tests.support.base_models import input_error
from tests.support.fake_family import fake_dataset
from tests.support.tiny_miss import save_tiny_miss
from tests.support.tiny_models import TINY, make_tiny
from tests.support.tolerance import MODEL_TERMS, approx, assert_close, differ, relative_bound

STEPS = 10  # optimiser steps of these runs; the rounding errors of all of them add up
EXAMPLES = [Example(str(i), (name,), *pair, "open", "train") for i, (name, *pair) in enumerate(PAIRS)]


def config(base: Path, out: Path, **options: Any) -> TrainConfig:
    values: dict[str, Any] = {"data": "phantom-b:4", "tune": "ln", "batch": 8, "limit": 16}
    values |= {"epochs": 2, "save_every": 99}
    return TrainConfig(model=str(base), out=out, device="cpu", **(values | options))


def assert_same_adapter(joint: Path, separate: Path) -> None:
    """Check that two folders have the same adapter and records, apart from paths and times."""
    tensors, expected = (load_file(folder / "adapter.safetensors") for folder in (joint, separate))
    assert tensors.keys() == expected.keys()
    for name in tensors:
        assert_close(tensors[name], expected[name], terms=STEPS * MODEL_TERMS, msg=name)
    info, expected_info = (read_json(folder / "adapter.json") for folder in (joint, separate))
    logs = [record["metrics"]["training"].pop("loss") for record in (info, expected_info)]
    assert [step for step, _ in logs[0]] == [step for step, _ in logs[1]] and logs[0]
    assert_close(torch.tensor(logs[0]), torch.tensor(logs[1]), terms=STEPS * MODEL_TERMS)
    for record in (info, expected_info):
        del record["sha256"], record["metrics"]
    assert info == expected_info
    for name in ("pairs", "steps", "trainable", "computed_once", "recipe", "warning"):
        value, expected_value = (read_json(folder / "train_result.json")[name] for folder in (joint, separate))
        assert value == expected_value, name
    assert not (joint / "checkpoints").exists()


@pytest.mark.parametrize("adapters_per_forward", [3, 2])
def test_adapters_of_one_pass_equal_separate_runs(adapters_per_forward: int, base: Path, tmp_path: Path) -> None:
    """The runs differ in seed, rate, schedule, clipping, batches and dataset."""
    variants: list[dict[str, Any]] = [
        {"lr": 1e-3, "schedule": "linear", "seed": 1, "max_grad_norm": 0.5, "label_smoothing": 0.1},
        {"batch": 3, "accumulate": 2, "seed": 2, "max_steps": 4, "balance": "tokens"},
        {"data": "phantom-a:3", "cap": 3, "warmup": 0.5, "max_steps": 2},
    ]
    variants = [{"memory": "tight"} | variant for variant in variants]
    configs = [config(base, tmp_path / f"{i}", **variant) for i, variant in enumerate(variants)]
    results = train_together(configs, adapters_per_forward=adapters_per_forward)
    assert [result.together for result in results] == [3] * 3
    for i, variant in enumerate(variants):
        single = train(config(base, tmp_path / "separate" / f"{i}", **variant))
        assert_same_adapter(tmp_path / f"{i}", tmp_path / "separate" / f"{i}")
        assert single.together == 1 and single.changed == results[i].changed
    adapters = [load_file(tmp_path / f"{i}" / "adapter.safetensors") for i in range(3)]
    name = next(iter(adapters[0]))
    assert all(differ(adapters[0][name], adapter[name]) for adapter in adapters[1:])
    load_adapter(load(str(base)).model, tmp_path / "1")


def test_frozen_encoder_runs_once_per_image_for_all_adapters(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded_images = 0
    forward = VisionTransformer.forward

    def counting(self: VisionTransformer, pixels: Tensor) -> Tensor:
        nonlocal encoded_images
        encoded_images += len(pixels)
        return forward(self, pixels)

    monkeypatch.setattr(VisionTransformer, "forward", counting)
    variants = [{"tune": "decoder=ln", "seed": seed} for seed in (0, 1)]
    results = train_together([config(base, tmp_path / f"{i}", **variants[i]) for i in (0, 1)])
    images = len({example.images for example in _examples(base, tmp_path)})
    assert encoded_images == images and results[0].computed_once == "question states, which the decoder reads"
    train(config(base, tmp_path / "separate", **variants[1]))
    assert_same_adapter(tmp_path / "1", tmp_path / "separate")


def _examples(base: Path, out: Path) -> Sequence[Example]:
    from normtune.data.registry import open_configured

    return open_configured(config(base, out)).split("train")[:16]


def test_llava_adapters_equal_separate_runs(tmp_path: Path) -> None:
    """The runs share the hidden states at the lowest tuned layer."""
    base = make_tiny("llava", tmp_path / "base")
    variants = [{"tune": "language=ln[1:]", "seed": seed, "max_steps": 3} for seed in (0, 1)]
    configs = [config(base, tmp_path / f"{i}", **variant) for i, variant in enumerate(variants)]
    train_together(configs, adapters_per_forward=2)
    train(config(base, tmp_path / "separate", **variants[1]))
    assert_same_adapter(tmp_path / "1", tmp_path / "separate")


def test_killed_pass_resumes_each_adapter_from_its_checkpoint(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last checkpoints are of different steps, and one adapter is finished."""
    variants = [{"save_every": 1}, {"seed": 1, "save_every": 2}, {"max_steps": 2}]
    configs = [config(base, tmp_path / f"{i}", **variant) for i, variant in enumerate(variants)]
    uninterrupted = tmp_path / "uninterrupted"
    train_together([c.model_copy(update={"out": uninterrupted / c.out.name}) for c in configs])
    record_batch, rounds = AdapterRun.record_batch, 0

    def interrupt(self: AdapterRun, *rest: Any) -> None:
        nonlocal rounds
        rounds += self.adapter == 0
        if rounds == 4:
            raise KeyboardInterrupt
        record_batch(self, *rest)

    monkeypatch.setattr(AdapterRun, "record_batch", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train_together(configs)
    monkeypatch.setattr(AdapterRun, "record_batch", record_batch)
    with pytest.raises(InputError, match=r"together-3 belongs to a run with other options \(lr\)"):
        train_together([configs[0].model_copy(update={"lr": 1.0}), *configs[1:]])
    steps: list[int] = []
    next_batch = AdapterRun.next_batch
    monkeypatch.setattr(AdapterRun, "next_batch", lambda self: steps.append(self.adapter) or next_batch(self))
    results = train_together(configs)
    assert [result.resumed_from_step for result in results] == [3, 2, 2]
    assert results[2].pairs > 0 and results[2].pairs_per_second == 0, "it was finished before the resume"
    total = read_json(tmp_path / "0" / "train_result.json")["steps"]
    assert [steps.count(adapter) for adapter in range(3)] == [total - 3, total - 2, 0]
    for config_ in configs:
        assert_same_adapter(config_.out, uninterrupted / config_.out.name)


def test_full_disk_is_reported(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(joint_run, "write_tensors", full)
    message = input_error(lambda: train_together([config(base, tmp_path / "a", max_steps=1)]))
    assert "cannot write a checkpoint" in message and "resume from the last complete checkpoint" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tune": "decoder=ln"}, "--tune is ln for .* runs of one pass train the same norms"),
        ({"dtype": "bfloat16"}, "--dtype is float32 for .* runs of one pass share it"),
        ({"group": False}, "--no-group turns on the base's dropout"),
        ({"compile": True}, "--compile: layers of several adapters"),
        ({"tracker": "wandb"}, "--tracker wandb"),
        ({"out": "a"}, "two adapters would be written to"),
    ],
)
def test_runs_that_cannot_share_a_pass_are_refused(
    options: dict[str, Any], message: str, base: Path, tmp_path: Path
) -> None:
    options = {key: tmp_path / value if key == "out" else value for key, value in options.items()}
    second = config(base, tmp_path / "b").model_copy(update=options)
    with pytest.raises(InputError, match=message):
        train_together([config(base, tmp_path / "a"), second])


@pytest.mark.parametrize("tune", ["encoder=lora(r=2)", "decoder=attention", "vision=ln,decoder=ia3"])
def test_recipes_that_train_more_than_norms_are_refused(tune: str, base: Path, tmp_path: Path) -> None:
    message = input_error(lambda: train_together([config(base, tmp_path / "a", tune=tune)]))
    assert "only norm adapters can share a pass" in message
    assert "trains nothing" in input_error(lambda: train_together([config(base, tmp_path / "a", tune="frozen")]))
    assert "at least one config" in input_error(lambda: train_together([]))


# --- every family -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["miss", *TINY])
def family(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Family:
    folder = tmp_path_factory.mktemp(request.param)
    return load(str(save_tiny_miss(folder) if request.param == "miss" else make_tiny(request.param, folder)))


def test_gradients_of_a_joint_batch_equal_those_of_each_adapter(family: Any) -> None:
    """All norms are tuned, the image encoder's too; images have several sizes, and adapters share some."""
    tuned = adapt(family.model, "ln")
    starts = []
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        starts.append(
            {
                name: parameter.detach() + 0.2 * torch.randn(parameter.shape, generator=generator)
                for name, parameter in tuned.trained.items()
            }
        )
    collate = Collator(family, ImageCache(family, fake_dataset(EXAMPLES, image)))
    batches = [group_by_image(EXAMPLES, max_group_size=2), group_by_image(EXAMPLES[2:])]
    expected, losses = [], []
    for start, batch in zip(starts, batches, strict=True):
        with torch.no_grad():
            for name, parameter in tuned.trained.items():
                parameter.copy_(start[name])
        family.model.zero_grad()
        loss, tokens = family.loss(collate(batch))
        (loss / tokens).backward()
        losses.append(float(loss.detach() / tokens))
        expected.append({name: p.grad.clone() for name, p in tuned.trained.items() if p.grad is not None})
    norms = {name: norm for name, norm in family.model.named_modules() if isinstance(norm, TunedNorm)}
    bank = build_bank(tuned, 2)
    for adapter, start in enumerate(starts):
        bank.set_adapter(adapter, start)
    runs: list[Any] = [
        SimpleNamespace(
            adapter=adapter,
            config=SimpleNamespace(label_smoothing=0.0),
            collate=collate,
            scale_loss=lambda loss, batch=batch: loss / sum(len(collate.segment(e).answer) for g in batch for e in g),
        )
        for adapter, batch in enumerate(batches)
    ]
    rows = ("pad", "pack") if hasattr(family, "rows") else ("pad",)
    for layout in rows:
        family.rows = layout
        bank.grads.zero_()
        joint_losses = accumulate_gradients(family, bank, list(zip(runs, batches, strict=True)))
        assert joint_losses == approx(losses)
        for adapter in range(2):
            scale = max(float(gradient.norm()) for gradient in expected[adapter].values())
            for name, columns in bank.columns.items():
                gradient = expected[adapter].get(name, torch.zeros(()))
                gap = float((bank.grads[adapter, columns] - gradient.flatten()).norm())
                assert gap < relative_bound() * max(float(gradient.norm()), 0.01 * scale), (layout, name)
    family.rows = "pad"
    assert len(norms) > 5


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("kind", ["miss", "llava"])
def test_answers_of_a_joint_batch_equal_those_of_each_adapter(
    kind: str, beams: int, base: Path, tmp_path: Path
) -> None:
    """Answers have different lengths, so that rows leave the batch."""
    family = load(str(base if kind == "miss" else make_tiny(kind, tmp_path)))
    tuned = adapt(family.model, "ln")
    bank = build_bank(tuned, 3)
    generator = torch.Generator().manual_seed(1)
    bank.values.add_(0.5 * torch.randn(bank.values.shape, generator=generator))
    questions = [Example(e.id, e.images, e.question, "", "open", "train") for e in EXAMPLES]
    groups, pixels, adapters = [], [], []
    from normtune.data.groups import Group

    for members in group_by_image(questions):
        processed = family.preprocess_image(image(members[0].images[0]))
        for adapter in (2, 0, 1):  # several adapters use the same image
            segments = tuple(family.tokenize(e.id, e.question, None) for e in members)
            groups.append(Group(members[0].images, segments))
            pixels.append([dict(processed)])
            adapters.append(adapter)
    family.active_text_rows = bank.text_rows
    rows = [len(group.segments) if kind == "miss" else 1 for group in groups]
    texts = [adapter for adapter, count in zip(adapters, rows, strict=True) for _ in range(count)]
    with bank.use(RowAdapters(adapters), RowAdapters(texts)):
        joint_answers = family.generate_answers(groups, pixels, max_new_tokens=8, beams=beams)
    for adapter in range(3):
        with bank.use(RowAdapters([adapter]), RowAdapters([adapter])):
            family.active_text_rows = None
            for group, images, adapter_of_group, answers in zip(groups, pixels, adapters, joint_answers, strict=True):
                if adapter_of_group == adapter:
                    single = family.generate_answers([group], [images], max_new_tokens=8, beams=beams)[0]
                    assert [a.text for a in single] == [a.text for a in answers]
                    assert [a.score for a in single] == approx([a.score for a in answers])
    assert len({answer.text for answers in joint_answers for answer in answers}) > 3
