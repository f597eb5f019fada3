"""The rounds of a budget, what they take, and which trials are promoted."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from normtune.advice.rounds import STEPS, Round, Speed, estimate_seconds, plan_rounds, promote, rates_of
from normtune.advice.trials import Trial
from normtune.errors import InputError
from normtune.methods.registry import LEARNING_RATES
from tests.support.tolerance import approx


def trained_pairs(rounds: tuple[Round, ...], pairs_per_pass: int) -> float:
    return sum(item.trials * item.epochs * pairs_per_pass for item in rounds)


def test_three_rates_for_each_recipe_then_each_recipe_then_the_best() -> None:
    rounds = plan_rounds(60_000, recipes=6, pairs_per_pass=1000, epochs=10, batch=24)
    assert [item.trials for item in rounds] == [18, 6, 3]
    assert [item.epochs for item in rounds] == [0.952, 2.86, 8.57]  # a third of the next one; 60 passes in all


@given(st.integers(1, 12), st.integers(500, 20_000), st.floats(0.5, 20), st.integers(10_000, 10_000_000))
def test_rounds_stay_in_the_budget_and_below_the_longest_training(
    recipes: int, pairs_per_pass: int, epochs: float, pairs: int
) -> None:
    try:
        rounds = plan_rounds(pairs, recipes, pairs_per_pass, epochs, batch=1)
    except InputError:
        return
    # lengths are rounded to three digits
    assert trained_pairs(rounds, pairs_per_pass) <= 1.005 * pairs
    assert rounds[-1].epochs <= 1.005 * epochs
    assert [item.trials for item in rounds] == sorted((item.trials for item in rounds), reverse=True)
    assert rounds[1].trials >= recipes


def test_more_pairs_make_trials_longer_and_then_more_numerous() -> None:
    plans = [plan_rounds(pairs, 4, 1000, 10, 24) for pairs in (30_000, 60_000, 600_000)]
    assert [plan[-1].epochs for plan in plans] == [approx(plan[-1].epochs) for plan in plans]
    assert plans[0][-1].epochs < plans[1][-1].epochs == plans[2][-1].epochs == 10
    assert plans[0][0].trials == plans[1][0].trials == 12 < plans[2][0].trials == 36


def test_a_budget_of_a_few_steps_is_an_error_that_names_a_sufficient_one() -> None:
    with pytest.raises(InputError, match="too small for 6 recipes") as error:
        plan_rounds(5_000, 6, 1000, 10, 24)
    needed = int(str(error.value).partition("It takes ")[2].partition(" ")[0].replace(",", ""))
    assert plan_rounds(round(1.02 * needed), 6, 1000, 10, 24)


def speed(pairs_per_second: float) -> Speed:
    return Speed("all=ln", 1, 100, pairs_per_second, overhead_seconds=1, memory={}, memory_bytes=0)


def test_the_time_of_rounds_is_that_of_their_steps_overheads_and_answers() -> None:
    rounds = (Round(4, 1), Round(2, 3), Round(1, 9))
    seconds = estimate_seconds(rounds, {"ln": speed(100), "full": speed(50)}, 100, answer_seconds=2)
    steps = 4 * 1.5 + 2 * 3 * 1.5 + 9 * 2  # the last one may be the slower recipe
    assert seconds == approx(steps + 7 * (1 + 2) + 2)


def trial(number: int, recipe: str, score: float, trainable: int) -> Trial:
    return Trial(1, number, recipe, 0.1, 1, trainable, 10, 1.0, {"value": score, "low": 0, "high": 1})


TRIALS = [
    trial(1, "ln", 0.3, 10),
    trial(2, "full", 0.6, 1000),
    trial(3, "ln", 0.4, 10),
    trial(4, "full", 0.7, 1000),
    trial(5, "lora", 0.5, 100),
    trial(6, "ia3", 0.1, 5),
]


def test_the_best_rate_of_each_recipe_is_promoted_first() -> None:
    assert [item.number for item in promote(TRIALS, 4, 0.2, last=False)] == [4, 5, 3, 6]
    assert [item.number for item in promote(TRIALS, 6, 0.2, last=False)] == [4, 5, 3, 6, 2, 1]


def test_the_last_round_has_a_place_for_the_smallest_recipe_above_the_base() -> None:
    assert [item.number for item in promote(TRIALS, 2, 0.2, last=True)] == [4, 3]
    assert [item.number for item in promote(TRIALS, 2, 0.9, last=True)] == [4, 5]  # none is above


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
