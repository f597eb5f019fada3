"""Choices are scored in every way; position bias and models that ignore the image are reported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from normtune.data.examples import Example
from normtune.data.records import ChoiceResult, Prediction
from normtune.errors import InputError
from normtune.evaluation.baselines import ConstantText, QuestionOnly
from normtune.evaluation.choices import choice_report, choice_text
from normtune.evaluation.compare import compare
from normtune.evaluation.config import EvaluateConfig
from normtune.evaluation.evaluate import evaluate
from normtune.evaluation.results import Evaluation, read_evaluation
from normtune.evaluation.review.page import review
from normtune.evaluation.score_files import score_files
from normtune.models.family import Family
from normtune.models.types import Answer
from tests.support.fake_family import FakeFamily, fake_dataset
from tests.support.tolerance import approx

ORGANS = ("lung", "liver", "heart", "brain")


def choices(count: int, answer_at: Callable[[int], int]) -> list[Example]:
    """Choices about `count` images; question n has its right option at the position `answer_at(n)`."""
    return [
        Example(f"q{n}", (str(n),), f"Which organ {n}?", ORGANS[answer_at(n)], "choice", "test", options=ORGANS)
        for n in range(count)
    ]


class LikesLetter(FakeFamily):
    """Chooses a letter whatever the question; texts are less likely the longer they are."""

    def __init__(self, letter: str = "A") -> None:
        super().__init__({}, lambda id, word: 0.0 if word == letter else -float(len(word)))

    def generate_answers(self, groups: Any, *_: Any, **__: Any) -> list[list[Answer]]:
        return [[Answer("The answer is A", -0.5) for _ in group.segments] for group in groups]


class KnowsAnswers(FakeFamily):
    """Chooses the right letter, which it finds in the question."""

    def __init__(self, examples: list[Example]) -> None:
        answers = {example.id: example.answer for example in examples}
        super().__init__({}, lambda id, word: 0.0)
        self.answer_of = lambda id: answers[id.split("~")[0].split("=")[0]]

    def collate(self, groups: Any, pixels: Any) -> dict[str, Any]:
        rows = [(s.id, bytes(s.prompt).decode(), bytes(s.answer).decode()) for g in groups for s in g.segments]
        return {
            "ids": [
                (f"{id}={self.answer_of(id)}", int(f"\n{word}. {self.answer_of(id)}\n" in prompt))
                for id, prompt, word in rows
            ]
        }

    def log_probs(self, batch: dict[str, Any]) -> Any:
        import torch

        return torch.tensor([float(right) for _, right in batch["ids"]])


def run(family: Any, examples: list[Example], out: Path | None = None, **options: Any) -> Evaluation:
    dataset = fake_dataset(examples)
    config = EvaluateConfig.checked(model="fake", data="fake", out=out, **options)
    return evaluate(cast(Family, family), dataset.split("test"), config)


def test_every_way_at_once_is_written_and_read_again(tmp_path: Path) -> None:
    examples = choices(6, lambda n: n % 2)
    evaluation = run(LikesLetter(), examples, tmp_path, choice_scoring="all", choice_prompt="mmmu")
    metrics = {name: metric.value for name, metric in evaluation.metrics.items()}
    assert (
        metrics["choice_accuracy"] == metrics["choice_accuracy_letter"] == metrics["choice_accuracy_generated"] == 0.5
    )
    assert metrics["choice_accuracy_text"] == 0.5  # "lung", the first of the shortest texts
    assert metrics["choice_accuracy_text_normalized"] == 0.5
    row = json.loads((tmp_path / "predictions.jsonl").read_text().splitlines()[1])
    assert row["options"] == list(ORGANS) and row["prediction"] == "lung" and row["reference"] == "liver"
    assert row["choice"]["selected"]["generated"] == ["A"] and row["choice"]["generated"] == "The answer is A"
    assert row["choice"]["scores"]["text"] == [-4.0, -5.0, -5.0, -5.0]
    assert row["choice"]["scores"]["text_normalized"] == [-1.0] * 4
    settings = evaluation.record["settings"]
    assert (settings["choice_prompt"], settings["choice_rotations"]) == ("mmmu", False)
    assert settings["choice_scoring"] == ["letter", "text", "text_normalized", "generated"]
    stored = read_evaluation(tmp_path)
    assert stored.predictions == evaluation.predictions
    assert [example.options for example in stored.examples] == [ORGANS] * 6
    assert (
        score_files(tmp_path / "predictions.jsonl", tmp_path / "predictions.jsonl", task="vqa")["metrics"][
            "choice_accuracy"
        ]["value"]
        == 0.5
    )


def test_position_bias_is_reported_where_the_answer_is_always_a() -> None:
    """In the order of the data such a model is always right; rotations show that it only likes the letter."""
    examples = choices(12, lambda n: 0)
    plain = run(LikesLetter(), examples)
    assert plain.metrics["choice_accuracy"].value == 1.0
    assert plain.record["choices"]["constant_letter"] == {"letter": "A", "accuracy": 1.0}
    assert "chance 25.0, always A 100.0" in str(plain)
    rotated = run(LikesLetter(), examples, choice_rotations=True)
    assert rotated.metrics["choice_accuracy"].value == 1.0  # that of the data's own order
    result = rotated.record["choices"]["scoring"]["letter"]
    assert {letter: row["accuracy"]["value"] for letter, row in result["positions"].items()} == {
        "A": 1,
        "B": 0,
        "C": 0,
        "D": 0,
    }
    first = result["positions"]["A"]
    assert (first["right"], first["selected"], first["difference"]["value"]) == (0.25, 1.0, 0.75)
    assert first["difference"]["low"] > 0 and first["difference"]["p_holm"] < 0.01
    assert result["spread"] == 1.0 and result["rotated"]["accuracy"]["value"] == 0.25
    assert result["rotated"]["all_right"]["value"] == result["rotated"]["same_option"]["value"] == 0.0
    assert "accuracy differs by up to 100.0 points between positions" in choice_text(rotated.record["choices"])


def test_a_model_that_follows_the_options_has_no_position_bias() -> None:
    examples = choices(8, lambda n: n % 3)
    result = run(KnowsAnswers(examples), examples, choice_rotations=True, batch=5).record["choices"]["scoring"][
        "letter"
    ]
    assert result["spread"] == 0.0 and result["rotated"]["same_option"]["value"] == 1.0
    assert all(row["difference"]["value"] == 0 for row in result["positions"].values())


def test_the_reliance_check_says_that_a_model_ignores_the_image() -> None:
    evaluation = run(LikesLetter("B"), choices(9, lambda n: n % 2), controls="blank,other", choice_rotations=True)
    for control in ("blank", "other"):
        metric = evaluation.record["reliance"][control]["metrics"]["choice_accuracy"]
        assert metric["difference"]["value"] == 0 and metric["earned"]["value"] == 0
    assert "global_exact" not in evaluation.record["reliance"]["blank"]["metrics"]  # it is the same for choices


def test_answers_without_an_option_are_counted_and_wrong() -> None:
    family = FakeFamily({f"q{n}": text for n, text in enumerate(("(B)", "a tumour", "no idea"))})
    evaluation = run(family, choices(3, lambda n: 1), choice_scoring="generate")
    assert evaluation.metrics["choice_accuracy_generated"].value == approx(1 / 3)
    assert evaluation.record["choices"]["unparsed"] == 2
    assert [prediction.text for prediction in evaluation.predictions] == ["liver", "a tumour", "no idea"]
    assert "2 generated answers name no option" in str(evaluation)


def test_no_option_in_any_rotation_is_not_the_same_option() -> None:
    (example,) = choices(1, lambda n: 0)
    unread = ChoiceResult({"letter": (0, 1, 2, 3), "generated": (None,) * 4}, generated="?")
    report = choice_report([example], [Prediction("q0", "?", choice=unread)])
    rotated = {scoring: result["rotated"] for scoring, result in report["scoring"].items()}
    assert rotated["letter"]["same_option"]["value"] == rotated["letter"]["all_right"]["value"] == 1.0
    assert rotated["generated"]["same_option"]["value"] == rotated["generated"]["accuracy"]["value"] == 0.0


def test_strata_by_number_of_options() -> None:
    two = Example("two", ("9",), "Which?", "lung", "choice", "test", options=("lung", "liver"))
    strata = run(LikesLetter(), [*choices(4, lambda n: 1), two]).record["strata"]["options"]
    values = {name: stratum["metrics"]["choice_accuracy"]["value"] for name, stratum in strata.items()}
    assert values == {"4 options": 0.0, "2 options": 1.0}


def test_the_review_page_shows_the_options(tmp_path: Path) -> None:
    run(LikesLetter(), choices(3, lambda n: 1), tmp_path / "run")
    review([tmp_path / "run"], tmp_path / "page.html", images=False)
    page = (tmp_path / "page.html").read_text()
    assert page.count('<ol class="options" type="A"><li>lung</li><li class="answer">liver</li>') == 3


def test_baselines_choose_an_option() -> None:
    train = [
        Example("1", ("1",), "Which organ?", "liver", "choice", "train", options=("lung", "liver")),
        Example("2", ("2",), "Which organ?", "Liver", "choice", "train", options=("heart", "Liver", "lung")),
        Example("3", ("3",), "Is it?", "lung", "choice", "train", options=("brain", "lung")),
    ]
    tests = [
        Example("a", ("4",), "Which organ?", "lung", "choice", "test", options=("lung", "liver", "heart")),
        Example("b", ("5",), "What?", "x", "choice", "test", options=("x", "lung")),
        Example("c", ("6",), "What?", "x", "choice", "test", options=("x", "y", "z")),
    ]
    assert [row.text for row in QuestionOnly.fit(train).predict(tests)] == ["liver", "lung", "y"]
    assert [row.text for row in ConstantText.most_frequent(train).predict(tests)] == ["liver", "lung", "y"]
    dataset = fake_dataset([*train, *tests])
    config = EvaluateConfig.checked(model="fake", data="fake", out=None, baseline="question-only")
    evaluation = evaluate(None, dataset.split("test"), config)
    assert evaluation.metrics["choice_accuracy"].value == 0.0
    assert evaluation.record["choices"]["scoring"].keys() == {"prediction"}
    assert evaluation.record["choices"]["chance"] == approx((1 / 3 + 1 / 2 + 1 / 3) / 3)


def test_runs_are_compared_by_the_metrics_that_both_have(tmp_path: Path) -> None:
    examples = choices(6, lambda n: n % 2)
    run(LikesLetter(), examples, tmp_path / "biased", choice_scoring="letter,text")
    run(KnowsAnswers(examples), examples, tmp_path / "right")
    comparison = compare([tmp_path / "biased", tmp_path / "right"])
    assert comparison.to_dict()["not_compared"] == ["choice_accuracy_text"]
    assert "only some of the runs have them: choice_accuracy_text." in str(comparison)
    assert "differently" not in str(comparison)
    run(KnowsAnswers(examples), examples, tmp_path / "mmmu", choice_prompt="mmmu")
    text = "biased: prompt llava, by letter; mmmu: prompt mmmu, by letter"
    assert text in str(compare([tmp_path / "biased", tmp_path / "mmmu"]))
    (differences,) = comparison.differences.values()
    assert differences["choice_accuracy"].difference == 0.5 and "choice_accuracy_text" not in differences


def test_an_unknown_way_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(InputError, match="'letters' is unknown; give one or several of letter, text"):
        EvaluateConfig.checked(model="fake", data="fake", out=None, choice_scoring="letters")
