"""Training on the letters or texts of right options, and evaluation with the prompt of the training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from normtune.adapters.storage import load_model, use_adapter
from normtune.data.choices import ChoiceFormat
from normtune.data.records import Dataset, Example, Examples
from normtune.evaluation.config import EvaluateConfig
from normtune.evaluation.evaluate import evaluate_config
from normtune.models.image_cache import ImageCache
from normtune.models.loading import load
from normtune.runtime.files import read_json
from normtune.training.collator import Collator
from normtune.training.config import TrainConfig
from normtune.training.train import train

OPTIONS = ("left lung", "right lung")


def choices() -> Dataset:
    examples = [
        Example(f"{split}{n}", (f"{n}",), "Where is it?", OPTIONS[n % 2], "choice", split, options=OPTIONS)
        for split in ("train", "validate", "test")
        for n in range(4)
    ]
    return Dataset("made", Examples(examples), lambda key: Image.new("RGB", (40, 40), (60 * int(key),) * 3))


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("choices") / "ln"
    options: dict[str, Any] = {"choice_prompt": "inline", "choice_target": "text", "validate_every": "epoch"}
    result = train(
        TrainConfig(model=str(base), data="made", out=out, tune="ln", epochs=1, device="cpu", **options),
        dataset=choices(),
    )
    assert "choice_accuracy" in result.curve[0].metrics
    return out


def test_an_adapter_records_how_it_read_choices(base: Path, adapter: Path) -> None:
    assert read_json(adapter / "adapter.json")["data"]["choices"] == {"prompt": "inline", "target": "text"}
    family = load_model(str(base), adapter)
    assert family.choices == ChoiceFormat("inline", "text")
    plain = load(str(base))
    with use_adapter(plain, adapter):
        assert plain.choices.prompt == "inline"
    assert plain.choices == ChoiceFormat()


def test_an_evaluation_uses_the_prompt_of_the_training_or_the_one_that_is_given(base: Path, adapter: Path) -> None:
    config = EvaluateConfig.checked(model=str(base), data="made", out=None, adapter=adapter, device="cpu")
    evaluation = evaluate_config(config, dataset=choices())
    assert evaluation.record["settings"]["choice_prompt"] == "inline"
    given = config.model_copy(update={"choice_prompt": "mmmu", "choice_scoring": "all", "choice_rotations": True})
    evaluation = evaluate_config(given, dataset=choices())
    assert evaluation.record["settings"]["choice_prompt"] == "mmmu"
    assert evaluation.record["choices"]["scoring"].keys() == {"letter", "text", "text_normalized", "generated"}


@pytest.mark.parametrize(("target", "answer"), [("letter", "B"), ("text", "right lung")])
def test_the_target_of_training_is_the_letter_or_the_text(base: Path, target: Any, answer: str) -> None:
    family, dataset = load(str(base)), choices()
    family.choices = ChoiceFormat(target=target)
    example = dataset.train[1]
    segment = Collator(family, ImageCache(family, dataset)).segment(example)
    assert segment == family.tokenize(example.id, ChoiceFormat().question(example), answer)
