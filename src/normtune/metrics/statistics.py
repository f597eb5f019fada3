"""Confidence intervals and tests for scores of rows that are not independent.

Questions about one image share its difficulty. The bootstrap (Efron and Tibshirani 1993) therefore resamples
images, not questions (cluster bootstrap: Davison and Hinkley 1997, section 3.8). All random draws are seeded.
`normtune.metrics.sum_metrics` computes intervals from the resamples and compares two runs.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from normtune.errors import InputError

Floats = NDArray[np.float64]
Key = TypeVar("Key", bound=Hashable)
RESAMPLES = 2000  # bootstrap resamples by default
MAX_EXACT_CLUSTERS = 12  # up to this number of clusters, a paired test tries every pattern of swaps


@dataclass(frozen=True)
class Interval:
    """An estimate with the two ends of its confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class PairedDifference:
    """The difference of one metric between two runs on the same rows: second run minus first run."""

    difference: float
    low: float
    high: float
    p: float
    rows: int
    images: int
    method: str


def resample_sums(stacked: Floats, *, resamples: int = RESAMPLES) -> Floats:
    """Draw clusters with replacement and sum their columns, once per resample.

    Args:
        stacked: statistics of each cluster, [clusters, columns].
        resamples: number of resamples.

    Returns:
        [resamples, columns].
    """
    clusters = len(stacked)
    generator = np.random.default_rng(0)
    totals = np.empty((resamples, stacked.shape[1]))
    step = max(1, 2_000_000 // clusters)  # resamples per block, which bounds the memory
    for start in range(0, resamples, step):
        block = min(step, resamples - start)
        drawn = generator.integers(0, clusters, size=(block, clusters), dtype=np.int32)
        # Shift each resample into its own range of numbers: one bincount then counts all of them.
        drawn += (np.arange(block, dtype=np.int32) * clusters)[:, None]
        times = np.bincount(drawn.ravel(), minlength=block * clusters).reshape(block, clusters)
        # How often each cluster was drawn, [block, clusters] @ [clusters, columns] -> [block, columns]
        totals[start : start + block] = times.astype(np.float64) @ stacked
    return totals


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


def _t_coverage(t: float, freedom: int) -> float:
    """Compute P(|T| < t) of Student's t for integer degrees of freedom.

    The finite series is in Abramowitz and Stegun: 26.7.3 for odd and 26.7.4 for even degrees of freedom.
    """
    angle = math.atan(t / math.sqrt(freedom))
    square = math.cos(angle) ** 2
    is_odd = freedom % 2 == 1
    term, total = (math.cos(angle), 0.0) if is_odd else (1.0, 0.0)
    for k in range(freedom // 2):
        total += term
        term *= square * ((2 * k + 2) / (2 * k + 3) if is_odd else (2 * k + 1) / (2 * k + 2))
    return 2 / math.pi * (angle + math.sin(angle) * total) if is_odd else math.sin(angle) * total


def t_quantile(level: float, freedom: int) -> float:
    """Find the t with P(-t < T < t) = `level` for Student's T, by bisection."""
    low, high = 0.0, 1.0
    while _t_coverage(high, freedom) < level:  # double the upper end until it is beyond t
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_coverage(middle, freedom) < level else (low, middle)
    return (low + high) / 2


def mean_over_seeds(values: Sequence[float]) -> Interval:
    """Compute the mean of one score over training seeds, with Student's t 95% interval.

    Raises:
        InputError: if there are fewer than two values, which have no standard deviation.
    """
    if len(values) < 2:
        raise InputError(f"an interval over seeds needs two runs or more, got {len(values)}. Add a seed.")
    mean = math.fsum(values) / len(values)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
    half_width = t_quantile(0.95, len(values) - 1) * deviation / math.sqrt(len(values))
    return Interval(mean, mean - half_width, mean + half_width)
