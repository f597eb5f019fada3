"""LLaVA in complete runs: train, save, load, evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from normtune.adapters.storage import load_model
from normtune.data import tasks
from normtune.data.groups import Group
from normtune.data.registry import open_dataset
from normtune.errors import InputError
from normtune.evaluation.config import EvaluateConfig
from normtune.evaluation.evaluate import evaluate
from normtune.models.causal.family import CausalFamily
from normtune.models.families.llava import LlavaFamily
from normtune.models.loading import load
from normtune.training.config import TrainConfig
from normtune.training.train import train
from tests.support.tiny_models import make_tiny
from tests.support.tolerance import MODEL_TERMS, assert_close, differ

DATA = "phantom-b:2"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llava", tmp_path_factory.mktemp("llava"))


def scores(family: CausalFamily, limit: int = 8) -> torch.Tensor:
    """Log-probabilities of the references of the first training examples, each in a group of its own."""
    dataset = open_dataset(DATA)
    examples = dataset.split("train")[:limit]
    groups = [Group(e.images, (family.tokenize(e.id, e.question, e.answer),)) for e in examples]
    pixels = [[family.preprocess_image(dataset.open_image(key)) for key in e.images] for e in examples]
    with torch.inference_mode():
        return family.log_probs(family.collate(groups, pixels))


@pytest.mark.parametrize("recipe", ["language=lora(r=2)", "language=prefix(n=2)"])
def test_a_recipe_is_trained_written_loaded_and_evaluated(tiny: Path, tmp_path: Path, recipe: str) -> None:
    out = tmp_path / "out"
    config = TrainConfig(model=str(tiny), data=DATA, out=out, tune=recipe, max_steps=2, batch=8, lr=0.05, device="cpu")
    result = train(config)
    assert result.steps == 2 and result.changed > 0.4 and result.warning is None
    base, tuned = load(str(tiny)), load_model(str(tiny), out, device="cpu")
    assert isinstance(base, CausalFamily) and isinstance(tuned, CausalFamily)
    assert differ(scores(tuned), scores(base))
    options = EvaluateConfig(model=str(tiny), data=DATA, out=None, batch=6, max_new_tokens=4, candidates="yes/no")
    run = evaluate(tuned, open_dataset(DATA).test[:9], options)
    assert len(run.predictions) == 9 and all(row.score is not None for row in run.predictions)


def test_grouping_changes_no_step(tiny: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    options: dict[str, Any] = {"tune": "ln", "epochs": 1, "batch": 10_000, "schedule": "constant"}
    for name, cap in (("whole", None), ("single", 1)):
        config = TrainConfig(
            model=str(tiny), data=DATA, out=tmp_path / name, cap=cap, device="cpu", warmup=0.0, **options
        )
        train(config)
    whole, single = (load_file(tmp_path / name / "adapter.safetensors") for name in ("whole", "single"))
    for name in whole:
        assert_close(single[name], whole[name], terms=10 * MODEL_TERMS, msg=name)


def test_what_is_saved_is_loaded(tiny: Path, tmp_path: Path) -> None:
    family = load(str(make_tiny("llava_med", tmp_path / "med")))
    family.save(tmp_path / "saved")
    again = load(str(tmp_path / "saved"))
    assert isinstance(family, CausalFamily) and isinstance(again, CausalFamily)
    assert torch.equal(scores(family), scores(again))


def test_answers_that_are_cut_lose_their_end_token(tiny: Path) -> None:
    family = load(str(tiny))
    assert isinstance(family, CausalFamily)
    long = "lung " * 600
    answer, report = (family.tokenize("1", "", long, report=report).answer for report in (False, True))
    assert len(answer) == tasks.MAX_ANSWER_REFERENCE_TOKENS and len(report) == tasks.MAX_REPORT_REFERENCE_TOKENS
    assert family.end_tokens[0] not in report and answer == report[: tasks.MAX_ANSWER_REFERENCE_TOKENS]


def test_a_frozen_tower_saves_nothing_for_the_backward_pass(tiny: Path) -> None:
    family = load(str(tiny))
    assert isinstance(family, CausalFamily)
    for name, parameter in family.model.named_parameters():
        parameter.requires_grad_(name.startswith("model.language_model") and "norm" in name)
    images = {"pixel_values": torch.randn(1, 3, 32, 32)}
    assert not family.features(images)["features"].requires_grad


def test_a_language_model_with_other_layers_is_refused(tiny: Path) -> None:
    family = load(str(tiny))
    family.model.config.text_config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(InputError, match="linear_attention"):
        type(family)(family.model, family.processor)


def test_the_error_of_a_base_that_does_not_fit_advises_quantisation(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 14.00 GiB.\nmore")

    monkeypatch.setattr(LlavaFamily, "load", full)
    with pytest.raises(InputError, match=r"does not fit into the device's memory\. .* --quantize int8\.$"):
        load(str(tiny))
