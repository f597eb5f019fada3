"""Validation during training: it changes nothing, the adapter is the best step's, early stopping, exact resuming."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from normtune.adapters.storage import load_model
from normtune.data.registry import open_dataset
from normtune.errors import InputError
from normtune.evaluation.config import EvaluateConfig
from normtune.evaluation.evaluate import evaluate_config
from normtune.models.image_cache import ImageCache
from normtune.runtime.files import read_json
from normtune.training.collator import Collator
from normtune.training.config import TrainConfig
from normtune.training.result import TrainResult, read_result
from normtune.training.train import train
from normtune.training.validation import CurvePoint, best_point, is_stopped, read_validation
from tests.support.kill import StopAfterStep
from tests.support.tolerance import assert_close

DATA = "phantom-b:12/6/2"
VALIDATES: dict[str, Any] = {"validate_every": "epoch", "metric_for_best": "loss"}
# a few pairs at a high rate: the validation loss rises after a few steps
OVERFITS: dict[str, Any] = {"limit": 6, "batch": 3, "lr": 1.0, "schedule": "constant", "warmup": 0.0} | {
    "validate_every": "1", "metric_for_best": "loss", "max_steps": 24,
}  # fmt: skip


def config(base: Path, out: Path, **options: Any) -> TrainConfig:
    values: dict[str, Any] = {"tune": "ln", "epochs": 3, "batch": 16, "device": "cpu", "lr": 0.01} | options
    return TrainConfig.checked(model=str(base), data=DATA, out=out, **values)


def adapter_bytes(out: Path) -> bytes:
    return (out / "adapter.safetensors").read_bytes()


def scores(result: TrainResult) -> list[dict[str, Any]]:
    """The curve without its times."""
    return [asdict(point) | {"seconds": None} for point in result.curve]


def point(step: int, score: float) -> CurvePoint:
    return CurvePoint(step, step, step, 0.0, 1.0, 1 - score, {"global_exact": score})


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainResult, Path]:
    out = tmp_path_factory.mktemp("validated") / "ln"
    return train(config(base, out, **VALIDATES)), out


@pytest.mark.parametrize("options", [{}, {"tune": "lora-4"}, {"tune": "ln-vision"}, {"memory": "tight"}])
def test_validation_does_not_change_the_training(base: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    """The last step's values, and the loss log, are those of a run without validation."""
    options = {"epochs": 2} | options
    train(config(base, tmp_path / "plain", **options))
    train(config(base, tmp_path / "validated", validate_every="2", keep="last", validation_limit=5, **options))
    assert adapter_bytes(tmp_path / "plain") == adapter_bytes(tmp_path / "validated")
    losses = [
        read_json(tmp_path / name / "adapter.json")["metrics"]["training"]["loss"] for name in ("plain", "validated")
    ]
    assert losses[0] == losses[1]


def test_curve_is_in_the_result_and_drawn(run: tuple[TrainResult, Path]) -> None:
    result, out = run
    assert [point.step for point in result.curve] == [result.steps // 3 * n for n in (1, 2, 3)]
    assert [point.passes for point in result.curve] == [1, 2, 3] and result.passes == 3
    assert result.curve[-1].pairs == result.pairs
    assert all({"global_exact", "closed_label"} <= set(point.metrics) for point in result.curve)
    assert read_result(out) == result and read_json(out / "train_result.json")["curve"][0]["metrics"]
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert result.validation_seconds > 0 and "validation: best loss" in str(result)
    assert not (out / "checkpoints").exists()


def test_scores_are_those_of_an_evaluation(base: Path, run: tuple[TrainResult, Path]) -> None:
    """Of the adapter, which has the values of the best step."""
    result, out = run
    best = next(point for point in result.curve if point.step == result.best_step)
    evaluation = evaluate_config(
        EvaluateConfig(model=str(base), adapter=out, data=DATA, split="validate", device="cpu", batch=64, out=None)
    )
    for name in ("global_exact", "closed_label"):
        assert evaluation.metrics[name].value == best.metrics[name]
    # the loss of each row alone, weighted by its tokens
    family, dataset = load_model(str(base), out, device="cpu"), open_dataset(DATA)
    collate = Collator(family, ImageCache(family, dataset))
    with torch.no_grad():
        sums = [family.loss(collate([[example]])) for example in dataset.split("validate")]
    tokens = sum(int(count) for _, count in sums)
    mean = torch.stack([loss for loss, _ in sums]).sum() / tokens
    assert_close(torch.tensor(best.validation_loss), mean)


def test_adapter_has_the_values_of_the_best_step(base: Path, tmp_path: Path) -> None:
    """With a rate so high that a later step is worse; a run that ends at the best step has the same values."""
    result = train(config(base, tmp_path / "best", **OVERFITS))
    losses = {point.step: point.validation_loss for point in result.curve}
    assert losses[result.best_step or 0] == min(losses.values()) == result.best_score
    assert 1 < (result.best_step or 0) < result.steps and result.adapter_step == result.best_step
    short = OVERFITS | {"validate_every": None, "metric_for_best": None, "max_steps": result.best_step}
    train(config(base, tmp_path / "short", **short))
    assert adapter_bytes(tmp_path / "best") == adapter_bytes(tmp_path / "short")
    last = train(config(base, tmp_path / "last", **OVERFITS, keep="last"))
    assert last.adapter_step == last.steps and adapter_bytes(tmp_path / "last") != adapter_bytes(tmp_path / "best")


STOPS_EARLY = {**OVERFITS, "patience": 3, "save_every": 2}


@pytest.fixture(scope="module")
def early_stopped(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainResult, Path]:
    out = tmp_path_factory.mktemp("early") / "whole"
    return train(config(base, out, **STOPS_EARLY)), out


@pytest.mark.parametrize("step", [1, 2, 3])
def test_stopped_run_resumes_to_the_same_curve_and_adapter(
    base: Path, early_stopped: tuple[TrainResult, Path], tmp_path: Path, step: int
) -> None:
    whole, out = early_stopped
    assert whole.stopped_early and whole.steps < 24 and step < whole.steps
    with pytest.raises(KeyboardInterrupt):
        train(config(base, tmp_path / "resumed", **STOPS_EARLY), progress=StopAfterStep(step))
    resumed = train(config(base, tmp_path / "resumed", **STOPS_EARLY))
    assert scores(resumed) == scores(whole)
    assert (resumed.best_step, resumed.steps, resumed.stopped_early) == (whole.best_step, whole.steps, True)
    assert adapter_bytes(tmp_path / "resumed") == adapter_bytes(out)
    assert resumed.total_seconds is not None
    assert (resumed.total_seconds > resumed.seconds) == (resumed.resumed_from_step is not None)


def test_run_killed_after_its_early_stop_only_writes_its_files(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**OVERFITS, "patience": 2}

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("normtune.training.train.save_run", killed)
        train(config(base, tmp_path / "killed", **options))
    resumed = train(config(base, tmp_path / "killed", **options))
    whole = train(config(base, tmp_path / "whole", **options))
    assert resumed.steps == resumed.resumed_from_step == whole.steps and scores(resumed) == scores(whole)
    assert adapter_bytes(tmp_path / "killed") == adapter_bytes(tmp_path / "whole")


def test_report_runs_are_chosen_by_rouge_l(base: Path, tmp_path: Path) -> None:
    result = train(config(base, tmp_path / "reports", task="report", epochs=1, validate_every="epoch", limit=8))
    assert result.validation_metric == "rouge_l"
    assert set(result.curve[0].metrics) == {"rouge_l", "bleu_1", "bleu_4"}


def test_patience_counts_validations_since_the_best() -> None:
    points = [point(step, score) for step, score in enumerate((0.1, 0.4, 0.4, 0.3), 1)]
    assert best_point(points, "global_exact").step == 2  # the first of equal ones
    assert best_point(points, "loss").step == 2
    assert is_stopped(points, "global_exact", 2) and not is_stopped(points[:3], "global_exact", 2)
    assert not is_stopped(points, "global_exact", 3) and not is_stopped(points, "global_exact", None)


def test_validation_rows_are_a_sample_of_images_the_same_in_every_run(tmp_path: Path) -> None:
    dataset = open_dataset("phantom-b:4/40/2")
    rows = read_validation(config(Path("nano"), tmp_path, validate_every="epoch", validation_limit=20), dataset)
    assert rows is not None and len(rows) == 20
    again = read_validation(config(Path("nano"), tmp_path, validate_every="5", validation_limit=20, seed=3), dataset)
    assert rows == again
    assert {e.images for e in rows} != {e.images for e in dataset.split("validate")[:20]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patience": 2}, "--patience: the run does not validate. Add --validate-every"),
        ({"validate_every": "epoch", "validation_split": "held-out"}, "held-out"),
        ({"validate_every": "epoch", "metric_for_best": "global_exakt"}, "did you mean 'global_exact'"),
        ({"validate_every": "never"}, "--validate-every: Value error, give a number of steps, or epoch"),
        ({"validate_every": 0}, "--validate-every"),
    ],
)
def test_bad_options_are_input_errors(base: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        train(config(base, tmp_path / "out", **options))


def test_other_validation_rows_are_another_run(base: Path, tmp_path: Path) -> None:
    for split in ("train", "validate", "other"):
        row = {"image": "a.png", "question": "Is there a mass?", "answer": "no" if split == "other" else "yes"}
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(row))
    from PIL import Image

    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    options: dict[str, Any] = {"data": "jsonl", "root": tmp_path, "epochs": 1, **VALIDATES}
    first = config(base, tmp_path / "out").model_copy(update=options)
    train(first)
    assert train(first).already_finished
    (tmp_path / "validate.jsonl").write_text((tmp_path / "other.jsonl").read_text())
    with pytest.raises(InputError, match="differs in the rows or pictures of the validation split"):
        train(first)
