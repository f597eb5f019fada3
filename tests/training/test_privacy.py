"""Private training: sampling, clipping, noise, accounting, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from normtune.data.batches import EpochBatches
from normtune.data.examples import Example, Examples
from normtune.data.registry import open_dataset
from normtune.methods.adapt import adapt
from normtune.models.loading import load
from normtune.runtime.files import read_json
from normtune.training import privacy as module
from normtune.training.collator import build_collator
from normtune.training.config import TrainConfig
from normtune.training.dry_run import plan_run
from normtune.training.privacy import PoissonBatches, Privacy, PrivateGradients, plan_privacy, spent
from normtune.training.result import TrainResult
from normtune.training.train import train
from tests.support.base_models import input_error
from tests.support.kill import StopAfterStep
from tests.support.tolerance import MODEL_TERMS, approx, assert_close, differ, relative_bound, sampling_error

STEPS = 6  # their rounding errors add up
DATA = "phantom-b:20"  # 20 images with about 10 questions each


def config(base: Path | str, out: Path, **options: Any) -> TrainConfig:
    values: dict[str, Any] = {"tune": "ln", "max_steps": STEPS, "batch": 40, "device": "cpu", "dp_epsilon": math.inf}
    return TrainConfig(model=str(base), data=DATA, out=out, **values | options)


def rows() -> Examples:
    return open_dataset(DATA).train


def private(base: Path, options: TrainConfig, noise: float = 0.0, clip: float | None = 0.01) -> PrivateGradients:
    """The gradients of a run with this mechanism; no accountant is needed. Norms share their passes, as on a GPU."""
    family, examples = load(str(base), dtype="float32"), rows()
    tuned = adapt(family.model, options.tune)
    collator = build_collator(options, family, tuned, open_dataset(DATA), examples)
    batches = PoissonBatches(examples, options.batch, options.cap, options.accumulate)
    family.model.eval()
    mechanism = Privacy(None, 1e-3, batches.unit, len(batches.unit_groups), clip, noise, batches.rate, 1, None)
    gradients = PrivateGradients(options, family, tuned.trained, collator, batches, mechanism)
    assert not gradients.shares_passes
    gradients.shares_passes = gradients.gradients.many
    return gradients


def clipped_sum(gradients: PrivateGradients, units: list[int]) -> torch.Tensor:
    groups = [group for unit in units for group in gradients.batches.unit_groups[unit]]
    gradients.add(groups, 100, last=False)
    result = gradients._sum
    gradients._sum = torch.zeros_like(result)
    return result


@pytest.mark.parametrize("options", [{"cap": 3}, {"batch": 4}, {"tune": "lora-4"}, {"tune": "decoder=ln"}])
def test_adding_or_replacing_a_unit_changes_the_sum_by_at_most_the_clip(
    base: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    clip = 0.01
    gradients = private(base, config(base, tmp_path, **options), clip=clip)
    assert gradients.shares_passes == (options.get("tune") != "lora-4")
    both, first = clipped_sum(gradients, [3, 5]), clipped_sum(gradients, [3])
    second, third = clipped_sum(gradients, [5]), clipped_sum(gradients, [7])
    # these gradients are larger than the clip, so that the bound is reached
    assert float(second.norm()) == approx(clip) and float(third.norm()) == approx(clip)
    assert float((both - first).norm()) == approx(clip, magnitude=2 * clip)
    assert_close(both - first, second, magnitude=clip)
    replaced = clipped_sum(gradients, [3, 7])
    assert float((both - replaced).norm()) <= 2 * clip * (1 + relative_bound())
    assert differ(both, replaced)


def test_a_large_unit_is_computed_in_parts(base: Path, tmp_path: Path) -> None:
    whole = private(base, config(base, tmp_path), clip=None)
    parts = private(base, config(base, tmp_path, batch=4, cap=3), clip=None)
    assert_close(clipped_sum(parts, [4]), clipped_sum(whole, [4]))


def test_gradients_that_are_not_finite_count_as_zero(base: Path, tmp_path: Path) -> None:
    gradients = private(base, config(base, tmp_path))
    expected = clipped_sum(gradients, [3])
    original = gradients._chunk_gradients

    def broken(*arguments: Any) -> Any:
        matrix, loss = original(*arguments)
        matrix[-1, 0] = math.nan
        return matrix, loss

    gradients._chunk_gradients = broken  # type: ignore[method-assign]
    assert_close(clipped_sum(gradients, [3, 5]), expected)
    assert gradients.dropped == 1


def test_the_noise_has_the_stated_deviation(base: Path, tmp_path: Path) -> None:
    gradients = private(base, config(base, tmp_path), noise=3.0)
    expected_units = gradients.privacy.sampling_rate * gradients.privacy.units
    gradients.add([], 0, last=True)  # a step without any unit has noise only
    noise = torch.cat([parameter.grad.flatten() for parameter in gradients.gradients.parameters]) * expected_units
    deviation = 3.0 * 0.01
    assert float(noise.std()) == pytest.approx(deviation, abs=sampling_error(deviation, len(noise)))
    again = private(base, config(base, tmp_path), noise=3.0)
    again.add([], 0, last=True)
    assert differ(again.gradients.parameters[0].grad, gradients.gradients.parameters[0].grad)  # whatever the seed


def test_every_step_takes_each_unit_with_the_sampling_rate() -> None:
    batches = PoissonBatches(rows(), 40, 3, accumulate=2)
    assert batches.rate == 80 / len(rows()) and len(batches.unit_groups) == 20
    assert batches.steps == len(batches) == 2 * math.ceil(1 / batches.rate)
    epochs = 400
    counts, sizes = dict.fromkeys(range(20), 0), []
    key = [unit[0][0].images[0] for unit in batches.unit_groups]
    for _ in range(epochs):
        steps = list(batches)
        for first, second in zip(steps[::2], steps[1::2], strict=True):
            taken = [group[0].images[0] for group in [*first, *second]]
            of_step = {key.index(image) for image in taken}
            # all groups of a unit are in one batch
            assert len(taken) == sum(len(batches.unit_groups[unit]) for unit in of_step)
            assert not {group[0].images[0] for group in first} & {group[0].images[0] for group in second}
            sizes.append(len(of_step))
            for unit in of_step:
                counts[unit] += 1
    draws = len(sizes)
    deviation = math.sqrt(batches.rate * (1 - batches.rate))
    for count in counts.values():
        assert count / draws == pytest.approx(batches.rate, abs=sampling_error(deviation, draws))
    # independent draws: the number of units of a step is binomial
    variance = torch.tensor(sizes, dtype=torch.float64).var().item()
    assert variance == pytest.approx(20 * deviation**2, abs=sampling_error(math.sqrt(2) * 20 * deviation**2, draws))


def test_the_unit_is_the_patient() -> None:
    def row(number: int, image: str, patient: str) -> Example:
        return Example(str(number), (image,), "Is it?", "yes", "closed", "train", {"patient_id": patient})

    examples = [row(0, "a", "1"), row(1, "b", "1"), row(2, "c", "2"), row(3, "d", "3"), row(4, "a", "1")]
    batches = PoissonBatches(Examples(examples), 2, None, 1)
    assert batches.unit == "patient (patient_id)"
    images = [sorted({group[0].images[0] for group in unit}) for unit in batches.unit_groups]
    assert images == [["a", "b"], ["c"], ["d"]]
    assert "takes every patient" in input_error(lambda: PoissonBatches(Examples(examples), 5, None, 1))


def same_generators(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(module, "seeded_generator", lambda device: torch.Generator(device).manual_seed(4))


class Recorded(EpochBatches):
    """The batches of a private run, for an ordinary one."""

    def __init__(self, batches: PoissonBatches) -> None:
        super().__init__(batches.examples, batches.pairs, batches.max_group_size, 0)
        self.steps, self.recorded = batches.steps, [list(batches) for _ in range(STEPS)]
        assert all(all(epoch) for epoch in self.recorded), "no batch is empty"

    def __iter__(self) -> Any:
        yield from self.recorded[self.epoch]


@pytest.mark.parametrize(
    ("shared", "options"),
    [(False, {}), (True, {"accumulate": 2, "batch": 30}), (True, {"tune": "decoder=ln", "memory": "tight"})],
)
def test_without_noise_and_clip_training_is_the_ordinary_one(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: bool, options: dict[str, Any]
) -> None:
    same_generators(monkeypatch)
    monkeypatch.setattr(module, "ONE_BY_ONE", () if shared else ("cpu",))
    run = config(base, tmp_path / "private", dp_clip=math.inf, lr=1e-3, **options)
    result = train(run)
    assert result.privacy is not None and result.privacy["epsilon"] is None and result.privacy["clip"] is None
    recorded = Recorded(PoissonBatches(rows(), run.batch, run.cap, run.accumulate))
    monkeypatch.setattr("normtune.training.train.build_batches", lambda *arguments: recorded)
    ordinary = train(run.model_copy(update={"dp_epsilon": None, "dp_clip": None, "out": tmp_path / "ordinary"}))
    assert (ordinary.privacy, ordinary.pairs) == (None, result.pairs)
    actual, expected = (load_file(tmp_path / name / "adapter.safetensors") for name in ("private", "ordinary"))
    for name, value in expected.items():
        # AdamW divides by the root of the mean square, so that an error of a gradient is one of the rate
        assert_close(actual[name], value, terms=STEPS**2 * MODEL_TERMS, msg=name)


@pytest.mark.parametrize("recipe", ["ln", "lora-4", "full", "bias+ln"])
def test_without_noise_and_clip_gradients_are_those_of_a_batch(base: Path, tmp_path: Path, recipe: str) -> None:
    gradients = private(base, config(base, tmp_path, tune=recipe), clip=None)
    groups = [group for unit in (2, 3, 11) for group in gradients.batches.unit_groups[unit]]
    tokens = len(gradients.collate(groups)["labels"])
    loss = gradients.add(groups, tokens, last=True)
    actual = [parameter.grad for parameter in gradients.gradients.parameters]
    total, count = gradients.family.loss(gradients.collator(groups))
    assert count == tokens
    assert_close(loss, total.detach() / count)
    expected = torch.autograd.grad(total / count, gradients.gradients.parameters, allow_unused=True)
    # the largest gradient sets the scale: those of the keys' biases are zero except for rounding
    magnitude = max(float(gradient.abs().max()) for gradient in expected if gradient is not None)
    for gradient, reference in zip(actual, expected, strict=True):
        assert gradient is not None
        assert_close(gradient, torch.zeros_like(gradient) if reference is None else reference, magnitude=magnitude)


@pytest.fixture
def opacus() -> Any:
    return pytest.importorskip("opacus.accountants", exc_type=ImportError)


pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of opacus and its optimisers
    pytest.mark.filterwarnings("ignore:Optimal order is the largest alpha:UserWarning"),
]


def test_the_accountant_is_that_of_opacus(opacus: Any, tmp_path: Path) -> None:
    batches = PoissonBatches(rows(), 20, None, 1)
    for epsilon, steps in ((1.0, 40), (8.0, 60)):
        options = config("nano", tmp_path, dp_epsilon=epsilon, dp_delta=1e-3)
        mechanism = plan_privacy(options, batches, steps)
        assert mechanism.noise_multiplier == opacus.utils.get_noise_multiplier(
            target_epsilon=epsilon, target_delta=1e-3, sample_rate=batches.rate, steps=steps, accountant="prv"
        )
        accountant = opacus.PRVAccountant()
        for done in range(steps):
            accountant.step(noise_multiplier=mechanism.noise_multiplier, sample_rate=batches.rate)
            if done in (0, steps - 1):
                assert spent(mechanism, done + 1).epsilon == accountant.get_epsilon(1e-3)
        whole = spent(mechanism, steps).epsilon
        assert whole is not None and 0.9 * epsilon < whole <= epsilon


def test_a_private_run_and_its_files(opacus: Any, base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result: TrainResult = train(config(base, out, dp_epsilon=8.0, dp_clip=0.5))
    info, card = read_json(out / "adapter.json"), (out / "README.md").read_text()
    recorded = info["data"]["privacy"]
    assert recorded == result.privacy and recorded["units"] == 20 and recorded["steps"] == STEPS
    assert recorded["delta"] == 1 / 200 and recorded["clip"] == 0.5 and recorded["noise_multiplier"] > 0
    assert recorded["accountant"].startswith("PRV (opacus ")
    assert f"epsilon {recorded['epsilon']:.2f}, delta 5.0e-03 for each image (the data name no patients)" in card
    assert "privacy: epsilon " in str(result) and "final loss" not in str(result)
    # nothing that training rows decide without noise is beside the weights
    assert not (out / "training_rows.json").exists() and "rows_digest" not in info["data"]
    assert info["metrics"]["training"]["loss"] == [] and result.final_loss is None
    assert {"losses", "rows", "score_ceiling"}.isdisjoint(info["data"])
    again = train(config(base, out, dp_epsilon=8.0, dp_clip=0.5))
    assert again.already_finished and again.privacy == result.privacy


def test_a_resumed_run_draws_new_noise_and_counts_all_steps(opacus: Any, base: Path, tmp_path: Path) -> None:
    run = config(base, tmp_path / "out", dp_epsilon=8.0, save_every=2)
    with pytest.raises(KeyboardInterrupt):
        train(run, progress=StopAfterStep(4))
    stored = read_json(tmp_path / "out" / "checkpoints" / "checkpoint-2" / "run.json")
    result = train(run)
    assert result.resumed_from_step == 2 and result.privacy is not None
    assert result.privacy["steps"] == STEPS and result.privacy["noise_multiplier"] == stored["noise_multiplier"]
    whole = train(run.model_copy(update={"out": tmp_path / "whole"}))
    assert whole.privacy is not None and whole.privacy["epsilon"] == result.privacy["epsilon"]
    first, second = (load_file(tmp_path / name / "adapter.safetensors") for name in ("out", "whole"))
    assert any(differ(first[name], second[name]) for name in first)


def test_a_dry_run_states_the_guarantee(opacus: Any, base: Path, tmp_path: Path) -> None:
    report, text = plan_run(config("nano", tmp_path / "out", dp_epsilon=3.0))
    assert report["run"]["privacy"]["target_epsilon"] == 3.0 and report["run"]["steps"] == STEPS
    assert "privacy: epsilon " in text and "for each image (the data name no patients) of 20" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sample": "balanced"}, "does not allow --sample"),
        ({"balance": "tokens"}, "does not allow --balance tokens"),
        ({"validate_every": "epoch"}, "does not allow --validate-every"),
        ({"compile": True}, "does not allow --compile"),
        ({"dp_epsilon": 1.0, "dp_clip": math.inf}, "does not allow --dp-clip inf"),
        ({"dp_epsilon": None, "dp_clip": 1.0}, "--dp-clip has no effect without --dp-epsilon"),
    ],
)
def test_what_cannot_be_private_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    assert message in input_error(lambda: train(config("nano", tmp_path / "out", **options)))
    assert not (tmp_path / "out").exists()


def test_options_are_checked_and_written(tmp_path: Path) -> None:
    run = TrainConfig.checked(model="nano", data=DATA, out=tmp_path, dp_epsilon="inf", dp_clip="inf")
    assert run.model_dump(mode="json")["dp_epsilon"] == "inf" and run.dp_clip == math.inf
    assert "--dp-delta" in input_error(lambda: TrainConfig.checked(model="nano", data=DATA, out=tmp_path, dp_delta=2))
