"""How a budget is divided into three rounds of trials, and the learning rates that the first round tries.

    round 1    many short trials: several rates for each recipe
    round 2    a third as many, three times as long: each recipe at its best rate
    round 3    again a third as many, three times as long: the best recipes

This is successive halving with a factor of three, the bracket of Hyperband (Li et al. 2018) that starts with the most
trials. A round starts when the round before it is finished. So the trials of a search follow from its number of pairs
and its seed, never from a clock.

The rates are fixed. Optuna's sampler (TPE) was no closer to the best rate on known curves, with three rates or with
five (`benchmarks/advise.json`), and fixed rates make all recipes' searches alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log10
from statistics import fmean
from typing import Any

from normtune.advice.trials import Trial
from normtune.errors import InputError
from normtune.studies.recipe_names import default_rates

# Quarters of a power of ten from the default, in the order of the trials: 3 times above and below it, 10 times, others.
STEPS = (0, 2, -2, 4, -4, 1, -1, 3, -3)
FACTOR = 3  # a round has a third of the trials of the one before, each of three times its length
MIN_STEPS = 10  # of a trial in the first round; a shorter training says nothing
LAST_TRIALS = 3  # least trials of the last round, so that it has a front


@dataclass(frozen=True)
class Round:
    """The trials of a round. The field names are keys of `plan.json`."""

    trials: int
    epochs: float  # passes over the training pairs of each of them


@dataclass(frozen=True)
class Speed:
    """What a recipe takes, by a training of a few steps. The field names are keys of `plan.json`."""

    resolved: str  # the recipe with a method for each part of the model
    trainable: int
    total: int  # parameters of the adapted model
    pairs_per_second: float
    overhead_seconds: float  # of a training, without its steps
    memory: dict[str, Any]  # the plan of `estimate_memory`
    memory_bytes: int  # planned, without the Python program; measured where planning fails


def rates_of(recipe: str) -> list[float]:
    """The rates to try, in their order: the default of the recipe's methods first, with two significant digits.

    A recipe of several methods has one rate for all of them; its default is the geometric mean of theirs.
    """
    default = fmean(log10(rate) for rate in default_rates(recipe).values())
    return [float(f"{10 ** (default + step / 4):.1e}") for step in STEPS]


def plan_rounds(pairs: int, recipes: int, pairs_per_pass: int, epochs: float, batch: int) -> tuple[Round, ...]:
    """Divide a number of pairs into rounds.

    Every recipe gets three rates in the first round and its best rate in the second. More pairs make the trials
    longer, up to `epochs` passes in the last round, and then more numerous.

    Raises:
        InputError: the pairs are too few for the recipes.
    """
    rates = FACTOR
    while rates < len(STEPS) and _longest(pairs, recipes, rates + 1, pairs_per_pass) >= epochs:
        rates += 1
    longest = min(epochs, _longest(pairs, recipes, rates, pairs_per_pass))
    lengths = [float(f"{longest / FACTOR**power:.3g}") for power in (2, 1, 0)]
    if longest < epochs and lengths[0] * pairs_per_pass < MIN_STEPS * batch:
        needed = pairs * min(MIN_STEPS * batch / (lengths[0] * pairs_per_pass), epochs / longest)
        raise InputError(
            f"the budget of {pairs:,} pairs is too small for {recipes} recipes: trials of the first round would have "
            f"fewer than {MIN_STEPS} steps. It takes {needed:,.0f} pairs: give more --minutes or --pairs, or fewer "
            "--recipes."
        )
    return tuple(Round(*values) for values in zip(_trials(recipes, rates), lengths, strict=True))


def _trials(recipes: int, rates: int) -> tuple[int, int, int]:
    """The trials of each round."""
    first = recipes * rates
    second = max(recipes, first // FACTOR)
    return first, second, min(second, max(LAST_TRIALS, first // FACTOR**2))


def _longest(pairs: int, recipes: int, rates: int, pairs_per_pass: int) -> float:
    """The passes of a trial in the last round."""
    first, second, last = _trials(recipes, rates)
    return pairs / pairs_per_pass / (first / FACTOR**2 + second / FACTOR + last)


def estimate_seconds(
    rounds: Sequence[Round], speeds: Mapping[str, Speed], pairs_per_pass: int, answer_seconds: float
) -> float:
    """The time that rounds take. The recipes of the last round are not known yet: it is taken to be of the slowest.

    Args:
        answer_seconds: the time to answer half of the validation rows.
    """
    pace = sorted((1 / speed.pairs_per_second for speed in speeds.values()), reverse=True)
    fixed = fmean(speed.overhead_seconds for speed in speeds.values()) + answer_seconds
    of_rounds = [fmean(pace), fmean(pace), fmean(pace[: rounds[-1].trials])]
    seconds = sum(
        item.trials * (fixed + item.epochs * pairs_per_pass * mean)
        for item, mean in zip(rounds, of_rounds, strict=True)
    )
    return seconds + rounds[-1].trials * answer_seconds  # the other half


def promote(trials: Sequence[Trial], places: int, base_score: float, *, last: bool) -> list[Trial]:
    """Return the trials that go to the next round, each by its recipe and its rate.

    These are the best rate of each recipe, the best recipe first, then further rates by their score. In the last round
    the second place is for the smallest recipe that scores above the frozen base, so that the front reaches from the
    most accurate recipe to a small one.
    """
    ranked = sorted(trials, key=lambda trial: (-trial.score, trial.trainable, trial.number))
    first_of_recipe = {trial.recipe: trial for trial in reversed(ranked)}.values()
    best = sorted(first_of_recipe, key=ranked.index)
    better = [trial for trial in best if trial.score > base_score]
    small = [min(better, key=lambda trial: trial.trainable)] if last and better else []
    order = [*best[:1], *small, *best[1:], *ranked]
    return list({trial.number: trial for trial in order}.values())[:places]
