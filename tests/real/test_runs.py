"""Trains for a few steps on real data and evaluates the first rows of the test split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from normtune.data.registry import open_configured
from normtune.evaluation.config import EvaluateConfig
from normtune.evaluation.evaluate import evaluate_config
from normtune.evaluation.results import read_evaluation
from normtune.training.config import TrainConfig
from normtune.training.train import train


def check(tmp_path: Path, **data: Any) -> None:
    config = TrainConfig(model="nano", tune="ln", out=tmp_path / "ln", limit=60, epochs=1, device="cpu", **data)
    result = train(config)
    assert result.pairs == 60 and result.changed > 0.99 and result.warning is None
    evaluate_options = EvaluateConfig(
        model="nano", adapter=tmp_path / "ln", out=tmp_path / "scores", limit=30, device="cpu", **data
    )
    metrics = evaluate_config(evaluate_options).record
    test = open_configured(evaluate_options).split("test")[:30]
    examples = read_evaluation(tmp_path / "scores").examples
    assert [example.id for example in examples] == [example.id for example in test]
    assert metrics["rows"] == 30 and metrics["metrics"]["global_exact"]["rows"] == 30


def test_slake(slake_root: Path, tmp_path: Path) -> None:
    check(tmp_path, data="slake", root=slake_root)


def test_vqa_rad_split_by_image(vqa_rad_root: Path, tmp_path: Path) -> None:
    check(tmp_path, data="vqa-rad", root=vqa_rad_root, image_disjoint=True)
