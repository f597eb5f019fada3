"""The rates that a recipe tries."""

from __future__ import annotations

import pytest

from normtune.advice.rates import STEPS, rates_of
from normtune.methods.registry import LEARNING_RATES
from tests.support.tolerance import approx


def test_the_first_rates_are_the_default_and_three_times_above_and_below() -> None:
    assert rates_of("ln")[:3] == [LEARNING_RATES["ln"], 0.095, 0.0095]


@pytest.mark.parametrize("recipe", ["full", "lora-8", "all=ln+bias"])
def test_rates_differ_and_reach_ten_times_above_and_below(recipe: str) -> None:
    rates = rates_of(recipe)
    assert len({*rates}) == len(STEPS)
    assert sorted(rates)[0] < rates[0] < sorted(rates)[-1]
    assert float(f"{100 * min(rates):.1e}") == approx(max(rates))


def test_a_recipe_of_several_methods_has_one_rate_between_theirs() -> None:
    low, high = sorted([LEARNING_RATES["ln"], LEARNING_RATES["bias"]])
    assert low < rates_of("all=ln+bias")[0] < high
