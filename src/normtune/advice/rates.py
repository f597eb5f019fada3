"""The learning rates that a recipe is tried at: its default, and rates above and below it.

They are fixed. Optuna's sampler (TPE) was no closer to the best rate on known curves, with three rates or with five
(`benchmarks/advise.json`), and fixed rates make all recipes' searches alike.
"""

from __future__ import annotations

from math import log10
from statistics import fmean

from normtune.studies.recipe_names import default_rates

# Quarters of a power of ten from the default, in the order of the trials: 3 times above and below it, 10 times, others.
STEPS = (0, 2, -2, 4, -4, 1, -1, 3, -3)


def rates_of(recipe: str) -> list[float]:
    """The rates to try, in their order: the default of the recipe's methods first, with two significant digits.

    A recipe of several methods has one rate for all of them; its default is the geometric mean of theirs.
    """
    default = fmean(log10(rate) for rate in default_rates(recipe).values())
    return [float(f"{10 ** (default + step / 4):.1e}") for step in STEPS]
