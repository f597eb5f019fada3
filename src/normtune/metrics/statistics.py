"""Intervals and tests for scores whose rows are not independent.

Questions of one image share its difficulty, so the image, not the question, is what is resampled (cluster
bootstrap: Davison and Hinkley 1997, section 3.8). Everything is seeded. Two runs are compared in
`normtune.metrics.sum_metrics`.
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
RESAMPLES = 2000
EXACT_CLUSTERS = 12  # up to 2^12 sign patterns are all tried


@dataclass(frozen=True)
class Interval:
    """An estimate with the ends of its confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Paired:
    """The difference (second run less first) of one metric on the same rows."""

    difference: float
    low: float
    high: float
    p: float
    rows: int
    images: int
    method: str


def by_cluster(scores: Mapping[str, float], cluster: Mapping[str, Hashable]) -> tuple[Floats, Floats]:
    """Sums and row counts of each cluster that has a scored row, in order of appearance: [clusters] both."""
    index: dict[Hashable, int] = {}
    which = np.array([index.setdefault(cluster[id], len(index)) for id in scores], dtype=np.intp)
    values = np.fromiter(scores.values(), dtype=np.float64, count=len(scores))
    return np.bincount(which, weights=values).astype(np.float64), np.bincount(which).astype(np.float64)


def resampled_sums(stacked: Floats, *, resamples: int = RESAMPLES, seed: int = 0) -> Floats:
    """Column sums over clusters drawn with replacement: [clusters, columns] -> [resamples, columns]."""
    clusters = len(stacked)
    generator = np.random.default_rng(seed)
    totals = np.empty((resamples, stacked.shape[1]))
    step = max(1, 2_000_000 // clusters)  # bounds the memory of one block of draws
    for start in range(0, resamples, step):
        block = min(step, resamples - start)
        drawn = generator.integers(0, clusters, size=(block, clusters), dtype=np.int32)
        drawn += (np.arange(block, dtype=np.int32) * clusters)[:, None]
        times = np.bincount(drawn.ravel(), minlength=block * clusters).reshape(block, clusters)
        totals[start : start + block] = times.astype(np.float64) @ stacked
    return totals


def bootstrap_means(
    sums: Floats, counts: Floats, *, resamples: int = RESAMPLES, level: float = 0.95, seed: int = 0
) -> list[Interval]:
    """Percentile intervals of several means over rows, from the same resamples of clusters.

    Percentile rather than BCa: BCa's jackknife is undefined for scores that are all equal, which small
    closed subsets reach, and the two agree to a few tenths of a point at the sizes of VQA test sets. A
    resample without a row of some metric is left out for that metric.

    Args:
        sums: total score of each metric in each cluster, [metrics, clusters].
        counts: rows of each metric in each cluster, [metrics, clusters]; every metric has a row.
        resamples: how often clusters are drawn with replacement.
        level: the interval's coverage.
        seed: of the draws.
    """
    assert sums.shape == counts.shape and sums.ndim == 2 and (counts.sum(axis=1) > 0).all()
    totals = resampled_sums(np.concatenate([sums, counts]).T, resamples=resamples, seed=seed)
    with np.errstate(invalid="ignore"):
        means = totals[:, : len(sums)] / totals[:, len(sums) :]  # [resamples, metrics]
    tail = (1 - level) / 2
    ends = np.nanquantile(means, [tail, 1 - tail], axis=0)  # [2, metrics]
    values = sums.sum(axis=1) / counts.sum(axis=1)
    return [Interval(float(v), float(a), float(b)) for v, a, b in zip(values, *ends, strict=True)]


def bootstrap_mean(
    scores: Mapping[str, float],
    cluster: Mapping[str, Hashable],
    *,
    resamples: int = RESAMPLES,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """The mean of `scores` (row id -> score) with an interval that resamples clusters (row id -> image).

    Raises:
        InputError: there is no row.
    """
    if not scores:
        raise InputError("no row to take the mean of. Choose a split that has some.")
    sums, counts = by_cluster(scores, cluster)
    return bootstrap_means(sums[None], counts[None], resamples=resamples, level=level, seed=seed)[0]


def holm(p: Mapping[Key, float]) -> dict[Key, float]:
    """p-values corrected for being several, in the order given (Holm 1979)."""
    adjusted: dict[Key, float] = {}
    highest = 0.0
    for rank, name in enumerate(sorted(p, key=lambda name: p[name])):
        highest = max(highest, min(1.0, (len(p) - rank) * p[name]))
        adjusted[name] = highest
    return {name: adjusted[name] for name in p}


def _t_coverage(t: float, freedom: int) -> float:
    """P(|T| < t) of Student's t for whole degrees of freedom (Abramowitz and Stegun 26.7.3, 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    square = math.cos(angle) ** 2
    odd = freedom % 2 == 1
    term, total = (math.cos(angle), 0.0) if odd else (1.0, 0.0)
    for k in range(freedom // 2):
        total += term
        term *= square * ((2 * k + 2) / (2 * k + 3) if odd else (2 * k + 1) / (2 * k + 2))
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total


def t_quantile(level: float, freedom: int) -> float:
    """The t for which Student's T lies in (-t, t) with probability `level`."""
    low, high = 0.0, 1.0
    while _t_coverage(high, freedom) < level:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_coverage(middle, freedom) < level else (low, middle)
    return (low + high) / 2


def mean_over_seeds(values: Sequence[float], level: float = 0.95) -> Interval:
    """Mean of one score over training seeds, with Student's t interval.

    Raises:
        InputError: fewer than two values, from which no spread can be told.
    """
    if len(values) < 2:
        raise InputError(f"an interval over seeds needs two runs or more, got {len(values)}. Add a seed.")
    mean = math.fsum(values) / len(values)
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
    half = t_quantile(level, len(values) - 1) * spread / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)
