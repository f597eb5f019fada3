from __future__ import annotations

from typing import Any

import pytest

from normtune.studies.page.results import Results
from normtune.studies.page.sentences import findings
from tests.support.study_results import Made


def study(gains: dict[str, float], p: dict[str, float] | None = None, base: float = 0.4) -> dict[str, Any]:
    """A grid of one seed in which each recipe scores what it is given; p-values after Holm too."""
    made = Made(losses=2)
    made.cell("nano", "frozen", None, {"slake": "zero-shot"}, grids=["methods"], seed=None)
    for recipe in gains:
        made.cell("nano", recipe, "slake", {"slake": "in"}, grids=["methods"])
    names = {cell["key"]: cell["recipe"] for cell in made.tables["cells"]}
    for row in made.tables["metrics"]:
        value = base + gains.get(names[row["key"]], 0.0)
        row |= {"value": value, "low": value - 0.03, "high": value + 0.03}
    results = made.results()
    for row in results["tests"]:
        row["p_holm"] = (p or {}).get(row["recipe"], 1.0)
    return results


def sentences(results: dict[str, Any]) -> str:
    return " ".join(sentence for _, found in findings(Results(results)) for sentence in found)


def test_the_share_of_the_full_gain_is_what_the_means_give() -> None:
    said = sentences(study({"ln": 0.15, "full": 0.20}))
    assert "ln trains 0.29% of the parameters; all answers exact: 55.0 [52.0, 58.0]" in said
    assert "the frozen base 40.0 [37.0, 43.0], full tuning 60.0 [57.0, 63.0]" in said
    assert "That is 75% of full tuning's gain" in said


def test_a_loss_is_no_share_of_a_gain() -> None:
    said = sentences(study({"ln": -0.1, "full": 0.2}))
    assert "That is below the frozen base." in said and "% of full tuning's gain" not in said


def test_no_share_is_told_of_a_gain_that_may_be_none() -> None:
    said = sentences(study({"ln": 0.15, "full": 0.02}))
    assert "not clear of 0" in said and "That is" not in said


def test_above_and_below_are_said_only_of_what_the_corrected_test_says() -> None:
    said = sentences(
        study({"ln": 0.10, "full": 0.20, "prefix": 0.0, "ia3": 0.05}, {"full": 0.01, "prefix": 0.02})
    )
    assert "full (+10.0 points) lies above ln" in said
    assert "prefix (\u221210.0 points) lies below ln" in said
    assert "ia3 cannot be told from ln" in said


def test_nothing_is_praised_where_nothing_differs() -> None:
    said = sentences(study({"ln": 0.10, "full": 0.20}))
    assert "full cannot be told from ln" in said
    assert " lies " not in said and " lie " not in said


def test_shares_at_which_the_reference_leads_are_listed() -> None:
    made = Made(losses=2)
    for recipe, scores in (("ln", (0.3, 0.5)), ("full", (0.2, 0.6))):
        for share, value in zip((0.1, 1.0), scores, strict=True):
            made.cell("nano", recipe, "slake", {"slake": "in"}, grids=["curves"], share=share)
            for row in made.tables["metrics"][-4:]:
                row |= {"value": value, "low": value, "high": value}
    said = sentences(made.results())
    assert (
        said
        == "On slake ln's mean is higher than full's with 10% of the training images (tried: 10% and 100%)."
    )


@pytest.mark.parametrize("recipes", [["ln"], ["full"], ["lora-8", "prefix"]])
def test_any_choice_of_recipes_can_be_told(recipes: list[str]) -> None:
    assert sentences(study(dict.fromkeys(recipes, 0.1))) or recipes != ["ln"]
