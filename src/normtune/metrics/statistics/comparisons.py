"""Comparisons of recipes: tests, equivalence, power, and corrections for several comparisons.

A *recipe* is trained with several seeds; each trained model answers the same test images. A difference between two
recipes varies with the seeds and with the images, and both parts are estimated.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from normtune.metrics.statistics.intervals import (
    LEVEL,
    Floats,
    Interval,
    difference_interval,
    satterthwaite_df,
    t_quantile,
    wilson,
)

Key = TypeVar("Key", bound=Hashable)
MIN_SEEDS = 3  # fewest seeds of each recipe for a p-value of recipes; five or more are recommended
POWER = 0.8  # the power that `smallest_difference` assumes
# What `planned_difference` assumes: about the sizes that `benchmarks/statistics_runs.json` has for SLAKE.
DISAGREEMENT = 0.12  # share of rows that one of two models answers right and the other wrong
CORRELATION = 0.05  # correlation of these differences within an image
SEED_DEVIATION = 0.015  # standard deviation of the score over seeds


@dataclass(frozen=True)
class SeedScores:
    """The scores of one recipe: one trained model for each seed."""

    values: Floats  # score of each seed over all rows, [seeds]
    influence: Floats  # what each cluster adds to the error of each seed, [seeds, clusters]; see `influence_of_mean`
    fixed: bool = False  # the one model is the whole recipe, such as a base without tuning: no seed decides it


@dataclass(frozen=True)
class RecipeDifference:
    """The difference between two recipes, second minus first, for new seeds and new images."""

    difference: float
    low: float
    high: float
    p: float
    error: float  # standard error
    df: float


def compare_recipes(first: SeedScores, second: SeedScores, counts: Floats, *, maximum: float = 1.0) -> RecipeDifference:
    """Test whether two recipes differ: `second` minus `first`, where seeds and images are both random.

    The method is that of reader studies in radiology (Obuchowski and Rockette 1995; degrees of freedom of Hillis
    2007), with trained models as readers and images as cases. Readers are nested in the recipe: seeds with the same
    number are not paired. They share the order of the data, but seed n of one recipe is no better predicted by seed n
    of another (`benchmarks/statistics_checks.json`), so pairing would halve the degrees of freedom for nothing. If
    they were positively correlated, the test would reject too rarely, not too often.

        variance = seeds + images
        seeds    = s^2 (1/S1 + 1/S2), where s^2 is the pooled variance of the seeds' scores, and at least the part of
                   it that the clusters' influences predict
        images   = variance over clusters of the difference of the recipes' mean models, less the noise of single
                   models, which `seeds` contains already; at least 0
        df       = variance^2 / (seeds^2 / (S1 + S2 - 2) + images'^2 / df of clusters)   (Satterthwaite)

    It assumes that seeds and clusters are random samples and that the seeds' variance is the same in both recipes.

    Args:
        first, second: the scores of each recipe on the same clusters.
        counts: rows of each cluster, [clusters], all above 0.
        maximum: the highest possible score.

    Raises:
        ValueError: a recipe has fewer than `MIN_SEEDS` seeds, or both are fixed.
    """
    random = [scores for scores in (first, second) if not scores.fixed]
    if not random or min(len(scores.values) for scores in random) < MIN_SEEDS:
        raise ValueError(f"a test of recipes needs {MIN_SEEDS} seeds of each")
    df_seeds = sum(len(scores.values) - 1 for scores in random)
    per_seed = sum(1 / len(scores.values) for scores in random) / df_seeds
    spread = sum(float(((scores.values - scores.values.mean()) ** 2).sum()) for scores in random) * per_seed
    noise = sum(float(((s.influence - s.influence.mean(axis=0)) ** 2).sum()) for s in random) * per_seed
    seeds = max(spread, noise)
    all_images = float(((second.influence.mean(axis=0) - first.influence.mean(axis=0)) ** 2).sum())
    variance = seeds + max(0.0, all_images - noise)
    difference = float(second.values.mean() - first.values.mean())
    # A variance of 0 has no degrees of freedom; `difference_interval` replaces it by its lower bound.
    parts = seeds**2 / df_seeds + all_images**2 / satterthwaite_df(counts)
    df = variance**2 / parts if parts > 0 else float(df_seeds)
    low, high, error = difference_interval(difference, variance, df, clusters=len(counts), maximum=maximum)
    return RecipeDifference(difference, low, high, 2 * _upper_tail(abs(difference) / error, df), error, df)


def recipe_mean(runs: Sequence[Interval], images: int, *, maximum: float = 1.0) -> Interval:
    """Compute the mean score of a recipe and its interval, for new seeds and new images.

    The variance is that of Obuchowski and Rockette for one treatment (Hillis, Obuchowski and Berbaum 2011): the
    variance of the mean over seeds, plus the covariance of two seeds on the same images. The latter is replaced by
    its upper limit, the mean variance of one run, so that no file of single rows is read; the interval is too wide
    rather than too narrow. Its ends are those of Wilson's interval, inside [0, `maximum`] and never equal.

    Args:
        runs: the score of each seed with its own interval, all on the same images. One seed keeps its interval.
        images: number of images.
        maximum: the highest possible score.
    """
    shares = [run.value / maximum for run in runs]
    value = math.fsum(shares) / len(shares)
    if images < 2:
        return Interval(value * maximum, 0.0, maximum)
    largest = value * (1 - value)
    quantile = t_quantile((1 + LEVEL) / 2, images - 1)
    # The intervals of files that version 0.1 wrote may be empty: an image then counts as one row.
    widths = [(run.high - run.low) / maximum for run in runs]
    if len(runs) == 1 and widths[0] > 0:
        return runs[0]
    image_variances = [(width / 2 / quantile) ** 2 if width > 0 else largest / images for width in widths]
    image_part = math.fsum(image_variances) / len(image_variances)
    seed_part, df_seeds = 0.0, max(1, len(runs) - 1)
    if len(runs) > 1:
        seed_part = math.fsum((share - value) ** 2 for share in shares) / df_seeds / len(runs)
    variance = seed_part + image_part
    if largest == 0 or variance == 0:  # all seeds score 0, or all the maximum
        return wilson(value, images, images - 1, maximum)
    seed_share, image_share = seed_part / variance, image_part / variance  # not squares of tiny variances, which are 0
    df = 1 / (seed_share**2 / df_seeds + image_share**2 / (images - 1))
    return wilson(value, largest / variance, df, maximum)


def equivalence(difference: float, error: float, df: float, margin: float) -> float:
    """Test whether a difference is inside the margin: two one-sided tests (TOST; Schuirmann 1987).

    Returns:
        The larger of both p-values. Up to 0.05, the two are equivalent: the 90% interval of the difference is
        inside [-`margin`, `margin`].
    """
    return _upper_tail((margin - abs(difference)) / error, df)


def is_no_worse(difference: float, error: float, df: float, margin: float) -> bool:
    """Whether a difference is above -`margin` (one-sided test at 5%)."""
    return _upper_tail((margin + difference) / error, df) <= 0.05


def smallest_difference(error: float, df: float) -> float:
    """Compute the true difference that a test at 5% finds in 80% of such comparisons.

    This is the minimum detectable effect of Bloom (1995): the standard error times the sum of two quantiles of t.
    """
    return (t_quantile((1 + LEVEL) / 2, df) + t_quantile(POWER, df)) * error


def planned_difference(counts: Floats, seeds: int | None) -> float:
    """Compute the `smallest_difference` of a test set before anything is trained, for accuracy.

    It assumes `DISAGREEMENT`, `CORRELATION` and `SEED_DEVIATION`.

    Args:
        counts: rows of each cluster, [clusters], two clusters or more.
        seeds: number of seeds of each recipe; None compares two trained models, where only the images vary.
    """
    rows = float(counts.sum())
    design_effect = 1 + (float((counts**2).sum()) / rows - 1) * CORRELATION
    image_variance, df_images = DISAGREEMENT / rows * design_effect, satterthwaite_df(counts)
    if seeds is None:
        return smallest_difference(math.sqrt(image_variance), df_images)
    seed_variance, df_seeds = 2 * SEED_DEVIATION**2 / seeds, 2 * (seeds - 1)
    variance = image_variance + seed_variance
    df = variance**2 / (seed_variance**2 / df_seeds + image_variance**2 / df_images)
    return smallest_difference(math.sqrt(variance), df)


def holm_correction(p: Mapping[Key, float]) -> dict[Key, float]:
    """Correct p-values for multiple comparisons (Holm 1979); the result has the order of `p`.

    The smallest of m p-values is multiplied by m, the next by m - 1, and so on. The corrected values never
    decrease in that order and are at most 1.
    """
    adjusted: dict[Key, float] = {}
    highest = 0.0  # the largest corrected value so far
    for rank, name in enumerate(sorted(p, key=lambda name: p[name])):
        highest = max(highest, min(1.0, (len(p) - rank) * p[name]))
        adjusted[name] = highest
    return {name: adjusted[name] for name in p}


def _upper_tail(t: float, df: float) -> float:
    """Compute P(T > t) of Student's T."""
    from scipy.special import stdtr

    return float(stdtr(df, -t))
