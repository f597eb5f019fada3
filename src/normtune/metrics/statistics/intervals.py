"""Intervals of one score, and the variance of a score over clusters of rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from normtune.errors import InputError

Floats = NDArray[np.float64]
LEVEL = 0.95  # the confidence level of all intervals
PLUS_FOUR = 4.0  # pseudo-clusters of the smallest variance; see `mean_interval`


@dataclass(frozen=True)
class Interval:
    """An estimate with the two ends of its confidence interval."""

    value: float
    low: float
    high: float


def t_quantile(probability: float, df: float) -> float:
    """Return Student's t with that probability below it; `df` need not be an integer."""
    from scipy.special import stdtrit

    return float(stdtrit(df, probability))


def satterthwaite_df(counts: Floats) -> float:
    """Compute the degrees of freedom of the CR2 variance of a mean: n - 1 for equal clusters, fewer otherwise.

    This is the formula of Bell and McCaffrey (2002) for a model with an intercept alone and independent rows.

    Args:
        counts: rows of each cluster, [clusters], all above 0.
    """
    share = counts / counts.sum()
    adjusted = share**2 / (1 - share)
    return float(1 / ((share**2).sum() + adjusted.sum() ** 2 - (adjusted**2).sum()))


def influence_of_mean(sums: Floats, counts: Floats) -> Floats:
    """Compute what each cluster adds to the error of a mean. The sum of squares is the CR2 variance.

    CR2 (Bell and McCaffrey 2002) divides the residual of a cluster by sqrt(1 - its share of the rows), because a
    cluster pulls the mean towards itself.

    Args:
        sums: total score of each cluster, [..., clusters].
        counts: rows of each cluster, [clusters].
    """
    total = counts.sum()
    mean = sums.sum(axis=-1, keepdims=True) / total
    influence: Floats = (sums - mean * counts) / total / np.sqrt(1 - counts / total)
    return influence


def influence_of_metric(from_sums: Callable[[Floats], Floats], statistics: Floats) -> Floats:
    """Compute the same for a function of sums, by leaving out one cluster at a time (jackknife: Tukey 1958).

    A cluster without which the metric is undefined has no influence.

    Args:
        from_sums: sums of statistics, [n, columns] -> values of the metric, [n].
        statistics: statistics of each cluster, [clusters, columns].
    """
    clusters = len(statistics)
    with np.errstate(invalid="ignore", divide="ignore"):
        without = from_sums(statistics.sum(axis=0) - statistics)
    mean = without[np.isfinite(without)].mean() if np.isfinite(without).any() else 0.0
    influence: Floats = (mean - np.where(np.isfinite(without), without, mean)) * math.sqrt((clusters - 1) / clusters)
    return influence


def mean_interval(sums: Floats, squares: Floats, counts: Floats, *, maximum: float = 1.0) -> Interval:
    """Compute the mean of scores and its interval: Wilson's at the effective number of rows.

    The effective number of rows is value (1 - value) / variance (Kish 1965; Korn and Graubard 1998), with the CR2
    variance, and t with Satterthwaite's degrees of freedom takes the place of z in Wilson's (1927) interval. The
    interval is inside [0, `maximum`] and never empty.

    The variance has a lower bound, because few clusters with a wrong answer cannot show how far wrong answers come
    together. It follows the rule of plus four (Agresti and Coull 1998), applied to clusters: four pseudo-clusters
    are added to the k clusters that carry the rarer outcome. In two of them all rows agree (a correlation within
    clusters of 1) and in two the rows are independent (0); the scores of all four are 0 or `maximum`, the largest
    variance that the mean allows. The k clusters count as independent. So the bound has the correlation
    2 / (k + 4), which is 1/2 before any error occurs, and vanishes as errors occur in more clusters.

    It assumes that clusters are a random sample, and that clusters of every size have the same expected score
    or that the sample has them in the right proportion. Use it from 10 clusters on; one cluster gives [0, `maximum`].

    Args:
        sums: total score of each cluster, [clusters].
        squares: total of the squared scores of each cluster, [clusters].
        counts: rows of each cluster, [clusters], all above 0.
        maximum: the highest possible score; the lowest is 0.
    """
    sums, squares, rows = sums / maximum, squares / maximum**2, float(counts.sum())
    value = float(sums.sum()) / rows
    if len(counts) < 2:
        return Interval(value * maximum, 0.0, maximum)
    largest = value * (1 - value)  # the largest variance of a row with this mean
    unseen = PLUS_FOUR / (PLUS_FOUR + min(_effective_number(sums), _effective_number(counts - sums)))
    row_variance = max(0.0, float(squares.sum()) / rows - value**2)
    row_variance += unseen * (largest - row_variance)
    design_effect = 1 + (float((counts**2).sum()) / rows - 1) * unseen / 2
    variance = max(float((influence_of_mean(sums, counts) ** 2).sum()), row_variance * design_effect / rows)
    size = largest / variance if largest > 0 and variance > 0 else rows / design_effect
    return wilson(value, size, satterthwaite_df(counts), maximum)


def _effective_number(amounts: Floats) -> float:
    """Count the clusters that carry a total; uneven ones count less (Kish 1965). It is 0 for a total of 0."""
    total = float(amounts.sum())
    # shares first: the square of a very small amount is 0
    return 1 / float(((amounts / total) ** 2).sum()) if total > 0 else 0.0


def ratio_interval(value: float, influence: Floats, counts: Floats, *, maximum: float = 1.0) -> Interval:
    """Compute the interval of a function of sums such as BLEU or F1: the same, with the jackknife's variance.

    The lower bound of the variance treats a cluster as one row of 0 or `maximum`: it is value (1 - value) / clusters,
    times 4 / (k + 4), where k is the effective number of clusters that influence the metric (see `mean_interval`).

    Args:
        value: the metric of all clusters.
        influence: of each cluster, from `influence_of_metric`, [clusters].
        counts: rows of each cluster, [clusters], all above 0; for the degrees of freedom.
        maximum: the highest possible value; the lowest is 0.
    """
    if len(counts) < 2:
        return Interval(value, 0.0, maximum)
    share = value / maximum
    squares = (influence / maximum) ** 2
    largest = share * (1 - share)
    unseen = PLUS_FOUR / (PLUS_FOUR + _effective_number(squares))
    variance = max(float(squares.sum()), unseen * largest / len(counts))
    size = largest / variance if largest > 0 and variance > 0 else float(len(counts))
    return wilson(share, size, satterthwaite_df(counts), maximum)


def wilson(value: float, size: float, df: float, maximum: float = 1.0) -> Interval:
    """Compute the score interval of a share of `size` independent rows (Wilson 1927), with t for the normal's z."""
    square = t_quantile((1 + LEVEL) / 2, df) ** 2
    middle = (value * size + square / 2) / (size + square)
    half = math.sqrt(square * (max(0.0, value * (1 - value)) * size + square / 4)) / (size + square)
    low, high = max(0.0, min(value, middle - half)), min(1.0, max(value, middle + half))
    return Interval(value * maximum, low * maximum, high * maximum)


def difference_interval(
    difference: float, variance: float, df: float, *, clusters: int, maximum: float = 1.0
) -> tuple[float, float, float]:
    """Compute the interval of a difference between two scores of the same rows, with t.

    The variance has a lower bound: the variance of the pseudo-rows of Agresti and Min (2005), which are half a cluster
    in which only the first is right, and half a cluster in which only the second is right.

    Args:
        difference: the estimate.
        variance: of the estimate.
        df: degrees of freedom of the variance.
        clusters: number of clusters.
        maximum: the highest possible score; the interval is inside [-`maximum`, `maximum`].

    Returns:
        Both ends, and the standard error.
    """
    error = math.sqrt(max(variance, (maximum / (clusters + 2)) ** 2))
    half = t_quantile((1 + LEVEL) / 2, df) * error
    return max(-maximum, difference - half), min(maximum, difference + half), error


def mean_over_seeds(values: Sequence[float]) -> Interval:
    """Compute the mean of a quantity that each seed has one value of, with Student's t interval over seeds.

    It says nothing about other images: use `recipe_mean` for a score.

    Raises:
        InputError: if there are fewer than two values, which have no standard deviation.
    """
    if len(values) < 2:
        raise InputError(f"an interval over seeds needs two runs or more, got {len(values)}. Add a seed.")
    mean = math.fsum(values) / len(values)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
    half = t_quantile((1 + LEVEL) / 2, len(values) - 1) * deviation / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)
