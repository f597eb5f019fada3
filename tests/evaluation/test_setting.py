"""What an evaluation is told to be: of the adapter's own data, of others, or of no adapter at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from normtune.adapters.storage import save_adapter
from normtune.evaluation.config import EvaluateConfig
from normtune.evaluation.evaluate import _setting, evaluate_config, metrics_text
from normtune.methods.adapt import adapt
from normtune.runtime.files import read_json
from normtune.training.config import TrainConfig
from normtune.training.train import train
from tests.support.base_models import base
from tests.support.dataset_samples import slake_row, vqa_rad_row, write_slake, write_vqa_rad
from tests.support.tiny_miss import save_tiny_miss


def test_results_say_what_was_trained_on_and_what_an_evaluation_elsewhere_is(tmp_path: Path) -> None:
    """A delta of SLAKE on SLAKE, VQA-RAD and phantoms, and the base without one."""
    (tmp_path / "slake").mkdir()
    slake = write_slake(tmp_path / "slake", train=[slake_row(1, 1), slake_row(2, 1)], test=[slake_row(3, 2)])
    rad = write_vqa_rad(tmp_path / "rad", [vqa_rad_row(1, "a.jpg", phrase_type="test_freeform")])
    model: dict[str, Any] = {"model": str(save_tiny_miss(tmp_path / "base")), "device": "cpu"}
    delta = tmp_path / "delta"
    train(TrainConfig(**model, data="slake", root=slake, out=delta, max_steps=1))

    def told(data: str, root: Path | None, adapter: Path | None) -> tuple[Any, ...]:
        where: dict[str, Any] = {"data": data, "root": root, "adapter": adapter, "out": tmp_path / "run"}
        found = evaluate_config(EvaluateConfig(**model, **where, max_new_tokens=2, limit=2))
        assert found == {**read_json(tmp_path / "run/metrics.json"), "out": str(tmp_path / "run")}
        assert found["setting"] in metrics_text(found)
        return found["trained_on"], found["dataset"], found["setting"]

    assert told("slake", slake, delta) == ("slake", "slake", "in-distribution")
    assert told("vqa-rad", rad, delta) == ("slake", "vqa-rad", "out-of-distribution")
    assert told("phantom-b:2", None, delta) == ("slake", "phantom-b", "out-of-distribution")
    assert told("vqa-rad", rad, None) == (None, "vqa-rad", "zero-shot")


@pytest.mark.parametrize(
    ("data", "dataset", "setting"),
    [
        (None, "slake", "unknown"),
        ({"name": "jsonl"}, "jsonl", "unknown"),
        ({"name": "jsonl"}, "slake", "out-of-distribution"),
    ],
)
def test_a_name_that_does_not_say_whose_data_it_is_decides_nothing(
    data: dict[str, Any] | None, dataset: str, setting: str, tmp_path: Path
) -> None:
    tuned = adapt(base("miss"), "ln")
    mark = "-".join(["0" * 32] * 2)
    save_adapter(tuned, tmp_path, base_name="tiny", base_fingerprint=mark, data=data)
    assert _setting(tmp_path, dataset)["setting"] == setting
