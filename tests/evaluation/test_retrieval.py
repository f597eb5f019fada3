"""Baselines that train nothing: the nearest image's text, and one text for every image."""

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
from normtune.evaluation.baselines import OneText
from normtune.evaluation.config import EvaluateConfig
from normtune.evaluation.evaluate import evaluate, evaluate_config
from normtune.evaluation.retrieval import Retrieval, fitted, pooled_features
from normtune.models.types import Pixels
from tests.support.fake_family import CountingImages, FakeFamily, fake_dataset
from tests.support.tiny_miss import save_tiny_miss


class Seeing(FakeFamily):
    """Sees (level, 255 - level) in an image: grey levels near each other point the same way."""

    def __init__(self) -> None:
        super().__init__({})

    def encode_image(self, pixels: Pixels) -> Pixels:
        level = pixels["mean"]
        return {"states": torch.stack((level, 255 - level)).repeat(3, 1)}


def report(id: str, images: Sequence[str], text: str, split: str = "train", **meta: str) -> Example:
    return Example(id, tuple(images), "", text, "report", split, meta)


def question(id: str, image: str, asked: str, answer: str) -> Example:
    return Example(id, (image,), asked, answer, "open", "train")


def retrieved(train: list[Example], asked: list[Example], family: Any = None) -> list[str]:
    dataset = fake_dataset(train + asked)
    predict = Retrieval.fit(family or Seeing(), dataset, train).predict
    found = predict(dataset, asked)
    assert [one.id for one in found] == [one.id for one in asked]
    return [one.text for one in found]


def test_a_report_is_that_of_the_nearest_training_image() -> None:
    train = [report("a", ["10"], "dark"), report("b", ["120"], "grey"), report("c", ["250"], "bright")]
    asked = [report("x", ["240"], "?", "test"), report("y", ["12"], "?", "test")]
    assert retrieved(train, asked) == ["bright", "dark"]


def test_the_reference_of_a_row_is_not_looked_at() -> None:
    train = [report("a", ["10"], "dark"), report("b", ["250"], "bright")]
    assert retrieved(train, [report("x", ["20"], "bright", "test")]) == ["dark"]


def test_views_of_a_study_count_alike() -> None:
    train = [report("a", ["10", "250"], "mixed"), report("b", ["250"], "bright"), report("c", ["10"], "dark")]
    assert retrieved(train, [report("x", ["250", "10"], "?", "test")]) == ["mixed"]


def test_of_equally_near_images_the_first_counts() -> None:
    train = [report("z", ["9"], "dark"), report("b", ["10"], "first"), report("a", ["10"], "second")]
    assert retrieved(train, [report("x", ["10"], "?", "test")])[0] in ("dark", "first")


def test_a_question_is_answered_from_images_that_were_asked_it() -> None:
    train = [
        question("a", "10", "Which organ?", "lung"),
        question("b", "250", "Which organ?", "liver"),
        question("c", "250", "Is it normal?", "yes"),
    ]
    asked = [question("x", "240", "which organ", ""), question("y", "12", "IS IT NORMAL?", "")]
    assert retrieved(train, asked) == ["liver", "yes"]


def test_a_question_that_training_did_not_ask_gets_the_answer_of_questions_alone() -> None:
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
    with pytest.raises(InputError, match="Blind gives no image features"):
        pooled_features(Blind({}), pixels)  # type: ignore[arg-type]


def test_the_most_frequent_report_counts_once_for_each_case() -> None:
    slices = [report(f"s{i}", [str(i)], "Mass.", case="one") for i in range(5)]
    two = [report("t", ["7"], "Normal.", case="two"), report("u", ["8"], "normal", case="three")]
    assert OneText.most_frequent(slices + two).text == "Normal."


def test_of_equally_frequent_reports_the_one_in_the_middle_is_taken() -> None:
    texts = ["fracture left rib", "heart lungs clear normal", "heart normal", "lungs clear normal"]
    train = [report(str(i), [str(i)], text) for i, text in enumerate(texts)]
    assert OneText.most_frequent(train).text == OneText.medoid(train).text == "heart lungs clear normal"


def test_the_medoid_may_be_another_than_the_most_frequent() -> None:
    texts = ["odd", "odd", "heart normal", "heart normal size", "heart normal lungs"]
    train = [report(str(i), [str(i)], text) for i, text in enumerate(texts)]
    assert OneText.most_frequent(train).text == "odd"
    assert OneText.medoid(train).text == "heart normal"


@pytest.mark.parametrize("name", ["question-only", "most-frequent", "medoid", "retrieval"])
def test_no_training_rows_is_an_input_error(name: str) -> None:
    with pytest.raises(InputError, match="needs training rows and got none"):
        fitted(name, Seeing(), fake_dataset([]), [])  # type: ignore[arg-type]


def test_a_baseline_is_evaluated_as_a_model_is(tmp_path: Path) -> None:
    train = [report("a", ["10"], "The heart is normal.")]
    test = [report("x", ["20"], "The heart is normal.", "test"), report("y", ["30"], "A mass.", "test")]
    dataset = fake_dataset(train + test)
    answers = fitted("medoid", None, dataset, train)
    found = evaluate(None, dataset, test, tmp_path, baseline=answers)
    assert [one.text for one in found.predictions] == ["The heart is normal."] * 2
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert {row["id"]: row["prediction"] for row in rows} == dict.fromkeys("xy", "The heart is normal.")


def test_the_command_s_baseline_retrieves_by_the_model_s_own_features(tmp_path: Path) -> None:
    model = save_tiny_miss(tmp_path / "model")
    named: dict[str, Any] = {"model": str(model), "data": "phantom-b:6/0/4", "task": "report"}
    config = EvaluateConfig(baseline="retrieval", split="train", out=tmp_path / "out", device="cpu", **named)
    found = evaluate_config(config)
    assert found["baseline"] == "retrieval" and found["base"] == str(model)
    assert found["metrics"]["rouge_l/none"]["value"] == 1.0  # a training image is the nearest to itself


@pytest.mark.parametrize(
    ("options", "told"), [({"candidates": "yes/no"}, "candidates"), ({"adapter": Path("x")}, "adapter")]
)
def test_options_of_models_are_refused_with_a_baseline(
    options: dict[str, Any], told: str, tmp_path: Path
) -> None:
    config = EvaluateConfig(model="nano", data="phantom-b:4", baseline="medoid", out=tmp_path, **options)
    with pytest.raises(InputError, match=f"--baseline medoid takes no {told}"):
        evaluate_config(config)
