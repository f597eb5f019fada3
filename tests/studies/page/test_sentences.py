from __future__ import annotations

import re
from typing import Any

import pytest

from normtune.studies.page.results import Results
from normtune.studies.page.sentences import findings
from tests.support.study_results import FakeStudy


def make_results(
    gains: dict[str, float],
    p: dict[str, float] | None = None,
    *,
    question: str = "recipes",
    margin: float | None = None,
) -> dict[str, Any]:
    """Results of one seed: each recipe's gain over the base, and the p-values of its test."""
    base = 0.4
    made = FakeStudy(losses=2)
    made.add_cell("nano", "frozen", None, {"slake": "zero-shot"}, grids=["methods"], seed=None)
    for recipe in gains:
        made.add_cell("nano", recipe, "slake", {"slake": "in"}, grids=["methods"])
    names = {cell["key"]: cell["recipe"] for cell in made.tables["cells"]}
    for row in made.tables["metrics"]:
        value = base + gains.get(names[row["key"]], 0.0)
        row |= {"value": value, "low": value - 0.03, "high": value + 0.03}
    results = made.build_results(margin=margin)
    for row in results["tests"]:
        row |= {"p_holm": (p or {}).get(row["recipe"], 1.0), "question": question}
    return results


def sentences(results: dict[str, Any]) -> str:
    return " ".join(
        sentence for _, sentences_of_setting in findings(Results(results)) for sentence in sentences_of_setting
    )


def test_the_scores_of_the_reference_have_intervals() -> None:
    text = sentences(make_results({"ln": 0.15, "full": 0.20}))
    assert "`ln` trains 0.29% of the parameters; all answers exact on slake: `ln` 55.0 [52.0, 58.0], " in text
    assert "`full` 60.0 [57.0, 63.0] and the frozen base 40.0 [37.0, 43.0]." in text


def test_higher_and_lower_need_a_significant_test() -> None:
    gains = {"ln": 0.10, "full": 0.20, "prefix": 0.0, "ia3": 0.05}
    text = sentences(make_results(gains, {"full": 0.01, "prefix": 0.02}))
    assert "On slake, compared with `ln` (96 images, 1 seed): `full` (+10.0 points) scores higher" in text
    assert "`prefix` (\u221210.0 points) scores lower" in text
    assert "no difference is shown for `ia3` (80% of such comparisons would find one of 4.0 points)" in text
    nothing = sentences(make_results(gains))
    assert "scores" not in nothing and "no difference is shown for `full`, `prefix` and `ia3`" in nothing


def test_with_few_seeds_only_the_trained_models_are_compared() -> None:
    text = sentences(make_results({"ln": 0.10, "full": 0.20}, {"full": 0.01}, question="trained models"))
    assert "these trained models compared with `ln` (96 images, 1 seed; no test of their recipes)" in text
    assert "On slake, compared with" not in text


def test_equivalence_needs_a_margin_and_its_test() -> None:
    gains = {"ln": 0.10, "full": 0.101, "prefix": 0.10 - 0.03, "ffn": 0.14}
    text = sentences(make_results(gains, margin=0.02))
    assert "`full` is equivalent within 2 points" in text and "`ffn` is no worse by more than 2 points" in text
    assert "no difference is shown for `prefix`" in text
    assert "equivalent" not in sentences(make_results(gains))


def test_each_share_of_the_data_has_its_own_test() -> None:
    made = FakeStudy(losses=2)
    for recipe, scores in (("ln", (0.3, 0.5)), ("full", (0.2, 0.6))):
        for share, value in zip((0.1, 1.0), scores, strict=True):
            made.add_cell("nano", recipe, "slake", {"slake": "in"}, grids=["curves"], share=share)
            for row in made.tables["metrics"][-4:]:
                row |= {"value": value, "low": value, "high": value}
    text = sentences(made.build_results())
    assert re.search(r"On slake, 10% of the training images, [^:]*: `full` \(\u221210.0 points\) scores lower\.", text)
    assert re.search(r"On slake, 100% of the training images, [^:]*: `full` \(\+10.0 points\) scores higher\.", text)


@pytest.mark.parametrize("recipes", [["ln"], ["full"], ["lora-8", "prefix"]])
def test_sentences_exist_for_any_set_of_recipes(recipes: list[str]) -> None:
    assert sentences(make_results(dict.fromkeys(recipes, 0.1))) or recipes != ["ln"]


def test_other_data_sets_are_named_as_such() -> None:
    made = FakeStudy(losses=2)
    for recipe in ("ln", "full"):
        for seed in range(3):
            tested = {"slake": "in", "vqa-rad": "out", "phantom-a": "home"}
            made.add_cell("nano", recipe, "slake", tested, grids=["methods"], seed=seed)
    text = sentences(made.build_results())
    assert "On vqa-rad, not trained on it, compared with `ln` (96 images, 3 seeds): " in text
    assert "On phantom-a, the base's own task, compared with `ln`" in text
