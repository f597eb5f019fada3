from __future__ import annotations

from typing import Any

import pytest

from normtune.studies.page.results import Results
from normtune.studies.page.sentences import findings
from tests.support.study_results import FakeStudy


def make_results(gains: dict[str, float], p: dict[str, float] | None = None, base: float = 0.4) -> dict[str, Any]:
    """Results of one seed: each recipe's gain over the base, and the p-values of its test."""
    made = FakeStudy(losses=2)
    made.add_cell("nano", "frozen", None, {"slake": "zero-shot"}, grids=["methods"], seed=None)
    for recipe in gains:
        made.add_cell("nano", recipe, "slake", {"slake": "in"}, grids=["methods"])
    names = {cell["key"]: cell["recipe"] for cell in made.tables["cells"]}
    for row in made.tables["metrics"]:
        value = base + gains.get(names[row["key"]], 0.0)
        row |= {"value": value, "low": value - 0.03, "high": value + 0.03}
    results = made.build_results()
    for row in results["tests"]:
        row["p_holm"] = (p or {}).get(row["recipe"], 1.0)
    return results


def sentences(results: dict[str, Any]) -> str:
    return " ".join(
        sentence for _, sentences_of_setting in findings(Results(results)) for sentence in sentences_of_setting
    )


def test_the_share_of_the_full_gain_is_computed_from_the_means() -> None:
    text = sentences(make_results({"ln": 0.15, "full": 0.20}))
    assert "ln trains 0.29% of the parameters; all answers exact: 55.0 [52.0, 58.0]" in text
    assert "the frozen base 40.0 [37.0, 43.0], full tuning 60.0 [57.0, 63.0]" in text
    assert "That is 75% of full tuning's gain" in text


def test_a_score_below_the_base_has_no_share_of_the_gain() -> None:
    text = sentences(make_results({"ln": -0.1, "full": 0.2}))
    assert "That is below the frozen base." in text and "% of full tuning's gain" not in text


def test_no_share_is_given_of_a_gain_that_may_be_zero() -> None:
    text = sentences(make_results({"ln": 0.15, "full": 0.02}))
    assert "not clearly above 0" in text and "That is" not in text


def test_above_and_below_need_a_significant_test() -> None:
    text = sentences(
        make_results({"ln": 0.10, "full": 0.20, "prefix": 0.0, "ia3": 0.05}, {"full": 0.01, "prefix": 0.02})
    )
    assert "full (+10.0 points) is above ln" in text
    assert "prefix (\u221210.0 points) is below ln" in text
    assert "ia3 does not differ significantly from ln" in text


def test_no_recipe_is_above_if_none_differs() -> None:
    text = sentences(make_results({"ln": 0.10, "full": 0.20}))
    assert "full does not differ significantly from ln" in text
    assert " above ln" not in text and " below ln" not in text


def test_shares_at_which_the_reference_leads_are_listed() -> None:
    made = FakeStudy(losses=2)
    for recipe, scores in (("ln", (0.3, 0.5)), ("full", (0.2, 0.6))):
        for share, value in zip((0.1, 1.0), scores, strict=True):
            made.add_cell("nano", recipe, "slake", {"slake": "in"}, grids=["curves"], share=share)
            for row in made.tables["metrics"][-4:]:
                row |= {"value": value, "low": value, "high": value}
    text = sentences(made.build_results())
    assert text == "On slake ln's mean is higher than full's with 10% of the training images (tried: 10% and 100%)."


@pytest.mark.parametrize("recipes", [["ln"], ["full"], ["lora-8", "prefix"]])
def test_sentences_exist_for_any_set_of_recipes(recipes: list[str]) -> None:
    assert sentences(make_results(dict.fromkeys(recipes, 0.1))) or recipes != ["ln"]
