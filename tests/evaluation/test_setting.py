"""The recorded setting of an evaluation: on the adapter's training dataset, on another one, or zero-shot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from normtune.adapters.storage import save_adapter
from normtune.evaluation.config import EvaluateConfig
from normtune.evaluation.evaluate import _setting, evaluate_config
from normtune.methods.adapt import adapt
from normtune.runtime.files import read_json
from normtune.training.config import TrainConfig
from normtune.training.train import train
from tests.support.base_models import tiny_base
from tests.support.dataset_samples import slake_row, vqa_rad_row, write_slake, write_vqa_rad
from tests.support.tiny_miss import save_tiny_miss


def test_results_record_the_training_dataset_and_the_setting(tmp_path: Path) -> None:
    """An adapter trained on SLAKE is evaluated on SLAKE, VQA-RAD and phantoms, and the base on VQA-RAD."""
    (tmp_path / "slake").mkdir()
    slake = write_slake(tmp_path / "slake", train=[slake_row(1, 1), slake_row(2, 1)], test=[slake_row(3, 2)])
    rad = write_vqa_rad(tmp_path / "rad", [vqa_rad_row(1, "a.jpg", phrase_type="test_freeform")])
    model: dict[str, Any] = {"model": str(save_tiny_miss(tmp_path / "base")), "device": "cpu"}
    adapter_folder = tmp_path / "adapter"
    train(TrainConfig(**model, data="slake", root=slake, out=adapter_folder, max_steps=1))

    def evaluate(data: str, root: Path | None, adapter: Path | None) -> tuple[Any, ...]:
        options: dict[str, Any] = {"data": data, "root": root, "adapter": adapter, "out": tmp_path / "run"}
        evaluation = evaluate_config(EvaluateConfig(**model, **options, max_new_tokens=2, limit=2))
        result = evaluation.to_dict()
        assert result == {**read_json(tmp_path / "run/metrics.json"), "out": str(tmp_path / "run")}
        assert result["setting"] in str(evaluation)
        return result["trained_on"], result["dataset"], result["setting"]

    assert evaluate("slake", slake, adapter_folder) == ("slake", "slake", "in-distribution")
    assert evaluate("vqa-rad", rad, adapter_folder) == ("slake", "vqa-rad", "out-of-distribution")
    assert evaluate("phantom-b:2", None, adapter_folder) == ("slake", "phantom-b", "out-of-distribution")
    assert evaluate("vqa-rad", rad, None) == (None, "vqa-rad", "zero-shot")


@pytest.mark.parametrize(
    ("data", "dataset", "setting"),
    [
        (None, "slake", "unknown"),
        ({"name": "jsonl"}, "jsonl", "unknown"),
        ({"name": "jsonl"}, "slake", "out-of-distribution"),
        ({"name": "mixture of slake, rows", "mixture": {"slake": {"name": "slake"}}}, "slake", "in-distribution"),
        ({"name": "mixture of slake, rows", "mixture": {"rows": {"name": "jsonl"}}}, "jsonl", "unknown"),
    ],
)
def test_a_dataset_named_by_its_file_format_has_an_unknown_setting(
    data: dict[str, Any] | None, dataset: str, setting: str, tmp_path: Path
) -> None:
    tuned = adapt(tiny_base("miss"), "ln")
    fingerprint = "-".join(["0" * 32] * 2)
    save_adapter(tuned, tmp_path, base_name="tiny", base_fingerprint=fingerprint, data=data)
    assert _setting(tmp_path, dataset)["setting"] == setting
