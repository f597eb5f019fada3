"""Baselines without training: the text of the nearest image, and the same text for every image."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from normtune.data.records import Example
from normtune.errors import InputError
from normtune.evaluation.baselines import ConstantText
from normtune.evaluation.config import EvaluateConfig
from normtune.evaluation.evaluate import evaluate, evaluate_config
from normtune.evaluation.retrieval import Retrieval, fit_baseline, pooled_features
from normtune.models.types import Pixels
from tests.support.fake_family import CountingImages, FakeFamily, fake_dataset
from tests.support.tiny_miss import save_tiny_miss


class Seeing(FakeFamily):
    """Encodes an image as (level, 255 - level), so that similar grey levels have similar directions."""

    def __init__(self) -> None:
        super().__init__({})

    def encode_image(self, pixels: Pixels) -> Pixels:
        level = pixels["mean"]
        return {"states": torch.stack((level, 255 - level)).repeat(3, 1)}


def report(id: str, images: Sequence[str], text: str, split: str = "train", **meta: str) -> Example:
    return Example(id, tuple(images), "", text, "report", split, meta)


def question(id: str, image: str, text: str, answer: str) -> Example:
    return Example(id, (image,), text, answer, "open", "train")


def retrieved(train: list[Example], test: list[Example], family: Any = None) -> list[str]:
    dataset = fake_dataset(train + test)
    predict = Retrieval.fit(family or Seeing(), dataset, train).predict
    predictions = predict(dataset, test)
    assert [row.id for row in predictions] == [row.id for row in test]
    return [row.text for row in predictions]


def test_the_report_of_the_nearest_training_image_is_predicted() -> None:
    train = [report("a", ["10"], "dark"), report("b", ["120"], "grey"), report("c", ["250"], "bright")]
    test = [report("x", ["240"], "?", "test"), report("y", ["12"], "?", "test")]
    assert retrieved(train, test) == ["bright", "dark"]


def test_references_are_not_used() -> None:
    train = [report("a", ["10"], "dark"), report("b", ["250"], "bright")]
    assert retrieved(train, [report("x", ["20"], "bright", "test")]) == ["dark"]


def test_views_of_a_study_are_averaged() -> None:
    train = [report("a", ["10", "250"], "both"), report("b", ["250"], "bright"), report("c", ["10"], "dark")]
    assert retrieved(train, [report("x", ["250", "10"], "?", "test")]) == ["both"]


def test_of_equally_near_images_the_first_is_taken() -> None:
    train = [report("z", ["9"], "dark"), report("b", ["10"], "first"), report("a", ["10"], "second")]
    assert retrieved(train, [report("x", ["10"], "?", "test")])[0] in ("dark", "first")


def test_a_question_is_answered_from_images_with_the_same_question() -> None:
    train = [
        question("a", "10", "Which organ?", "lung"),
        question("b", "250", "Which organ?", "liver"),
        question("c", "250", "Is it normal?", "yes"),
    ]
    test = [question("x", "240", "which organ", ""), question("y", "12", "IS IT NORMAL?", "")]
    assert retrieved(train, test) == ["liver", "yes"]


def test_a_question_that_training_does_not_have_gets_the_question_only_answer() -> None:
    train = [question("a", "10", "Which organ?", "lung"), question("b", "250", "Which organ?", "lung")]
    assert retrieved(train, [question("x", "10", "Which organ is it?", "")]) == ["lung"]


def test_every_image_is_opened_once() -> None:
    images = CountingImages()
    train = [report("a", ["1", "2"], "dark"), report("b", ["2"], "grey")]
    dataset = fake_dataset(train, images)
    Retrieval.fit(Seeing(), dataset, train)  # type: ignore[arg-type]
    assert sorted(images.opened) == ["1", "2"]


def test_a_family_without_image_features_is_refused() -> None:
    class Blind(FakeFamily):
        def encode_image(self, pixels: Pixels) -> Pixels:
            return pixels

    pixels = Blind({}).preprocess_image(Image.new("RGB", (2, 2)))
    with pytest.raises(InputError, match="Blind provides no image features"):
        pooled_features(Blind({}), pixels)  # type: ignore[arg-type]


def test_the_most_frequent_report_counts_cases() -> None:
    slices = [report(f"s{i}", [str(i)], "Mass.", case="one") for i in range(5)]
    others = [report("t", ["7"], "Normal.", case="two"), report("u", ["8"], "normal", case="three")]
    assert ConstantText.most_frequent(slices + others).text == "Normal."


def test_of_equally_frequent_reports_the_medoid_is_taken() -> None:
    texts = ["fracture left rib", "heart lungs clear normal", "heart normal", "lungs clear normal"]
    train = [report(str(i), [str(i)], text) for i, text in enumerate(texts)]
    assert ConstantText.most_frequent(train).text == ConstantText.medoid(train).text == "heart lungs clear normal"


def test_the_medoid_may_differ_from_the_most_frequent_report() -> None:
    texts = ["odd", "odd", "heart normal", "heart normal size", "heart normal lungs"]
    train = [report(str(i), [str(i)], text) for i, text in enumerate(texts)]
    assert ConstantText.most_frequent(train).text == "odd"
    assert ConstantText.medoid(train).text == "heart normal"


@pytest.mark.parametrize("name", ["question-only", "most-frequent", "medoid", "retrieval"])
def test_no_training_rows_is_an_input_error(name: str) -> None:
    with pytest.raises(InputError, match="needs training rows and got none"):
        fit_baseline(name, Seeing(), fake_dataset([]), [])  # type: ignore[arg-type]


def test_a_baseline_is_evaluated_like_a_model(tmp_path: Path) -> None:
    train = [report("a", ["10"], "The heart is normal.")]
    test = [report("x", ["20"], "The heart is normal.", "test"), report("y", ["30"], "A mass.", "test")]
    dataset = fake_dataset(train + test)
    config = EvaluateConfig(model="none", data="fake", out=tmp_path, baseline="medoid")
    evaluation = evaluate(None, dataset.test, config)
    assert [prediction.text for prediction in evaluation.predictions] == ["The heart is normal."] * 2
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert {row["id"]: row["prediction"] for row in rows} == dict.fromkeys("xy", "The heart is normal.")


def test_the_baseline_retrieval_uses_the_features_of_the_model(tmp_path: Path) -> None:
    model = save_tiny_miss(tmp_path / "model")
    common: dict[str, Any] = {"model": str(model), "data": "phantom-b:6/0/4", "task": "report"}
    config = EvaluateConfig(baseline="retrieval", split="train", out=tmp_path / "out", device="cpu", **common)
    result = evaluate_config(config).record
    assert result["baseline"] == "retrieval" and result["base"] == str(model)
    assert result["metrics"]["rouge_l/none"]["value"] == 1.0  # a training image is the nearest to itself


@pytest.mark.parametrize(
    ("options", "option"), [({"candidates": "yes/no"}, "candidates"), ({"adapter": Path("x")}, "adapter")]
)
def test_options_of_models_are_refused_with_a_baseline(options: dict[str, Any], option: str, tmp_path: Path) -> None:
    config = EvaluateConfig(model="nano", data="phantom-b:4", baseline="medoid", out=tmp_path, **options)
    with pytest.raises(InputError, match=f"--baseline medoid .* does not use --{option}"):
        evaluate_config(config)
