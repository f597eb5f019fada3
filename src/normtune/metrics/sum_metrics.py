"""Metrics that are a function of sums over rows, such as BLEU and F1: values, intervals, paired tests.

The BLEU of a corpus is not the mean of the BLEU of its rows. A bootstrap resample of images therefore sums
the *statistics* of the rows (n-gram counts, lengths) and computes the metric again from the sums (Koehn
2004). A mean is the special case with two statistics per row: the score and the number 1. Two runs are
compared by swapping their statistics image by image (approximate randomisation: Riezler and Maxwell 2005).
For a mean, a swap flips the sign of the image's difference.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass

import numpy as np

from normtune.errors import InputError
from normtune.metrics.statistics import MAX_EXACT_CLUSTERS, RESAMPLES, Floats, Interval, PairedDifference, resample_sums

_ENDS = ((1 - 0.95) / 2, (1 + 0.95) / 2)  # quantiles at the ends of a 95% interval


@dataclass(frozen=True)
class SumMetric:
    """One metric as the statistics of its rows and a function of their sums."""

    row_statistics: Mapping[str, Floats]  # row id -> [columns]
    from_sums: Callable[[Floats], Floats]  # sums of statistics, [n, columns] -> values of the metric, [n]

    def overall(self) -> float:
        """Compute the metric over all rows."""
        return float(self.from_sums(np.sum(list(self.row_statistics.values()), axis=0)[None])[0])

    def by_row(self) -> dict[str, float]:
        """Compute the metric of each row separately: row id -> score."""
        values = self.from_sums(np.stack(list(self.row_statistics.values())))  # [rows, columns] -> [rows]
        return dict(zip(self.row_statistics, values.tolist(), strict=True))


def mean_metric(scores: Mapping[str, float]) -> SumMetric:
    """Build the metric that is the mean of `scores` (row id -> score) over rows."""
    return SumMetric({id: np.array([score, 1.0]) for id, score in scores.items()}, _mean)


def _mean(sums: Floats) -> Floats:
    mean: Floats = sums[:, 0] / sums[:, 1]
    return mean


def sum_by_cluster(rows: Mapping[str, Floats], cluster: Mapping[str, Hashable]) -> Floats:
    """Sum the statistics of each cluster, [clusters, columns], in the order in which `cluster` names them."""
    index = {name: at for at, name in enumerate(dict.fromkeys(cluster.values()))}
    sums = np.zeros((len(index), len(next(iter(rows.values())))))
    np.add.at(sums, [index[cluster[id]] for id in rows], np.stack(list(rows.values())))
    return sums


def bootstrap_intervals(
    metrics: Mapping[str, SumMetric], cluster: Mapping[str, Hashable], *, resamples: int = RESAMPLES
) -> dict[str, Interval]:
    """Compute 95% percentile intervals of several metrics, all from the same resamples of clusters.

    These are percentile intervals (Efron and Tibshirani 1993, chapter 13) rather than BCa intervals. The
    jackknife of BCa is undefined if all scores are equal, which happens in small closed subsets, and the two
    agree to a few tenths of a point at the sizes of VQA test sets. A mean ignores the resamples that have
    none of its rows.

    Args:
        metrics: name -> metric; each may have some of the rows only.
        cluster: row id -> cluster (the row's images). All clusters are drawn, those without a row too.
        resamples: number of bootstrap resamples.

    Raises:
        InputError: if a metric has no row.
    """
    if not metrics:
        return {}
    if not all(metric.row_statistics for metric in metrics.values()):
        raise InputError("there are no rows to score. Choose a split that has rows.")
    tables = [sum_by_cluster(metric.row_statistics, cluster) for metric in metrics.values()]
    # The columns of all metrics next to each other: [clusters, columns] -> [resamples, columns]
    drawn = resample_sums(np.concatenate(tables, axis=1), resamples=resamples)
    intervals, start = {}, 0
    for (name, metric), table in zip(metrics.items(), tables, strict=True):
        with np.errstate(invalid="ignore"):  # 0 / 0 of a resample without rows is NaN, which nanquantile ignores
            values = metric.from_sums(drawn[:, start : start + table.shape[1]])
        low, high = np.nanquantile(values, _ENDS)
        intervals[name] = Interval(metric.overall(), float(low), float(high))
        start += table.shape[1]
    return intervals


def paired_difference(
    first: SumMetric,
    second: SumMetric,
    cluster: Mapping[str, Hashable],
    *,
    resamples: int = RESAMPLES,
    swaps: int = 10_000,
) -> PairedDifference:
    """Compute `second` minus `first` on the same rows: the 95% bootstrap interval and a two-sided p-value.

    If the runs differ in at most 12 clusters, the test tries every pattern of swaps. Otherwise it draws
    `swaps` random patterns and counts the observed one among them, so that p is never 0 (Phipson and Smyth
    2010).

    Args:
        first: metric of the first run.
        second: the same metric of the second run; rows are joined by id.
        cluster: row id -> cluster (the row's images).
        resamples: number of bootstrap resamples for the interval.
        swaps: number of random patterns of swaps for the p-value.

    Raises:
        InputError: if the two metrics do not have the same rows, or have no rows.
    """
    if first.row_statistics.keys() != second.row_statistics.keys():
        differing = sorted(first.row_statistics.keys() ^ second.row_statistics.keys())
        raise InputError(
            f"the runs differ in {len(differing)} rows, first '{differing[0]}'. Compare runs of one split."
        )
    if not first.row_statistics:
        raise InputError("there are no rows to compare. Choose a split that has rows.")
    first_sums, second_sums, first_values, second_values = _resample_both(first, second, cluster, resamples)
    low, high = np.quantile(second_values - first_values, _ENDS)
    difference = second.overall() - first.overall()
    p, method = _swap_test(first, first_sums, second_sums, difference, swaps)
    rows, images = len(first.row_statistics), len(first_sums)
    return PairedDifference(difference, float(low), float(high), p, rows, images, method)


def _resample_both(
    first: SumMetric, second: SumMetric, cluster: Mapping[str, Hashable], resamples: int
) -> tuple[Floats, Floats, Floats, Floats]:
    """Sum the rows of both runs by cluster, and compute both metrics in the same resamples of clusters.

    Returns:
        The sums of each cluster in the first and in the second run, each [clusters, columns]; the metric of the first
        and of the second run, each [resamples].
    """
    cluster = {id: cluster[id] for id in first.row_statistics}
    first_sums = sum_by_cluster(first.row_statistics, cluster)
    second_sums = sum_by_cluster({id: second.row_statistics[id] for id in first.row_statistics}, cluster)
    drawn = resample_sums(np.concatenate([first_sums, second_sums], axis=1), resamples=resamples)
    width = first_sums.shape[1]
    return first_sums, second_sums, first.from_sums(drawn[:, :width]), second.from_sums(drawn[:, width:])


def relative_drop(
    first: SumMetric, second: SumMetric, cluster: Mapping[str, Hashable], *, resamples: int = RESAMPLES
) -> Interval | None:
    """Compute (first - second) / first on the same rows, joined by id, with its 95% percentile interval.

    Returns:
        The relative drop, or None if `first` is 0. The interval ignores resamples in which `first` is 0.
    """
    assert first.row_statistics.keys() == second.row_statistics.keys(), "the same rows"
    first_value = first.overall()
    if first_value == 0:
        return None
    _, _, before, after = _resample_both(first, second, cluster, resamples)
    drops = 1 - after[before != 0] / before[before != 0]
    low, high = np.quantile(drops, _ENDS)
    return Interval(1 - second.overall() / first_value, float(low), float(high))


def _swap_test(metric: SumMetric, first: Floats, second: Floats, observed: float, swaps: int) -> tuple[float, str]:
    """Test the observed difference by swapping clusters between the runs.

    Args:
        metric: the metric of both runs.
        first: sums of each cluster in the first run, [clusters, columns].
        second: the same of the second run.
        observed: the metric of the second run minus that of the first.
        swaps: number of random patterns, if there are too many clusters to try all patterns.

    Returns:
        The p-value (the share of patterns with a difference at least as large as the observed one), and a
        description of the method.
    """
    differs = (first != second).any(axis=1)
    gap = (second - first)[differs]  # [differing clusters, columns]; swapping equal clusters changes nothing
    first_total, second_total = first.sum(axis=0), second.sum(axis=0)
    tolerance = 1e-9 * max(1.0, abs(observed))  # equal differences count in spite of rounding

    def count_extreme(swapped: Floats) -> int:
        """Count the patterns ([patterns, differing clusters] of 0 and 1) with a difference that large."""
        change = swapped @ gap  # what the swaps move from the second run to the first, [patterns, columns]
        difference = metric.from_sums(second_total - change) - metric.from_sums(first_total + change)
        return int((np.abs(difference) >= abs(observed) - tolerance).sum())

    if len(gap) <= MAX_EXACT_CLUSTERS:
        # Bit j of the pattern's number decides whether cluster j is swapped.
        patterns = (np.arange(2 ** len(gap))[:, None] >> np.arange(len(gap))) & 1
        return count_extreme(patterns.astype(np.float64)) / len(patterns), f"exact swaps of {len(gap)} images"
    generator = np.random.default_rng(0)
    hits, step = 0, max(1, 2_000_000 // len(gap))  # patterns per block, which bounds the memory
    for start in range(0, swaps, step):
        size = (min(step, swaps - start), len(gap))
        hits += count_extreme(generator.integers(0, 2, size=size, dtype=np.int8).astype(np.float64))
    return (1 + hits) / (1 + swaps), f"swaps by image, {swaps} random patterns"
