"""Metrics that are a function of sums over rows, such as BLEU and F1: values, intervals, paired tests.

The BLEU of a corpus is not the mean of the BLEU of its rows. It is computed from the sums of the *statistics* of the
rows (n-gram counts, lengths), and so are its interval (the jackknife leaves out one image at a time) and its test. A
mean is the special case with two statistics per row: the score and the number 1. Two runs are compared by swapping
their statistics image by image (approximate randomisation: Riezler and Maxwell 2005). For a mean, a swap flips the
sign of the image's difference.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from normtune.data.records import Example
from normtune.data.splits import patient_of_image
from normtune.errors import InputError
from normtune.metrics.statistics.intervals import (
    Floats,
    Interval,
    difference_interval,
    influence_of_mean,
    influence_of_metric,
    mean_interval,
    ratio_interval,
    satterthwaite_df,
)

MAX_EXACT_CLUSTERS = 12  # up to this number of clusters, a paired test tries every pattern of swaps
# Start of a metric's name -> its lowest and highest score, if they are not 0 and 1. RadCliQ-v1 is a weighted sum of
# other scores; equal reports have the lowest.
_RANGES = {"cider": (0.0, 10.0), "crimson": (-1.0, 1.0), "radcliq": (-1.45, 5.1)}
LOWER_IS_BETTER = ("radcliq_v1",)
# Describes the intervals in metrics.json.
INTERVALS = "95%, Wilson's at the effective number of rows, by image (by patient where the data name patients)"


@dataclass(frozen=True)
class SumMetric:
    """One metric as the statistics of its rows and a function of their sums."""

    row_statistics: Mapping[str, Floats]  # row id -> [columns]
    from_sums: Callable[[Floats], Floats]  # sums of statistics, [n, columns] -> values of the metric, [n]

    @property
    def is_mean(self) -> bool:
        """Whether the metric is the mean of its rows' scores."""
        return self.from_sums is _mean

    def overall(self) -> float:
        """Compute the metric over all rows."""
        return float(self.from_sums(np.sum(list(self.row_statistics.values()), axis=0)[None])[0])

    def by_row(self) -> dict[str, float]:
        """Compute the metric of each row separately: row id -> score."""
        values = self.from_sums(np.stack(list(self.row_statistics.values())))  # [rows, columns] -> [rows]
        return dict(zip(self.row_statistics, values.tolist(), strict=True))


@dataclass(frozen=True)
class PairedDifference:
    """The difference of one metric between two trained models on the same rows: second minus first."""

    difference: float
    low: float
    high: float
    p: float
    rows: int
    images: int
    method: str
    error: float  # standard error of the difference
    df: float  # its degrees of freedom


def average_metric(metrics: Sequence[SumMetric]) -> SumMetric:
    """Build the metric of several models together: each row has the mean of the models' statistics."""
    rows = metrics[0].row_statistics
    mean = {id: np.mean([metric.row_statistics[id] for metric in metrics], axis=0) for id in rows}
    return SumMetric(mean, metrics[0].from_sums)


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


def cluster_rows(examples: Sequence[Example]) -> dict[str, str]:
    """Return the cluster of each row, by id: its patient where the data name patients, else its image.

    Rows that share an image are in one cluster. A row without an image is a cluster of its own.
    """
    patient = patient_of_image(examples)
    return {e.id: patient[e.images[0]] if e.images else f"row {e.id}" for e in examples}


def score_range(name: str) -> tuple[float, float]:
    """Return the lowest and the highest score of the metric of that name: 0 and 10 for CIDEr, usually 0 and 1."""
    return next((ends for start, ends in _RANGES.items() if name.startswith(start)), (0.0, 1.0))


def score_span(name: str) -> float:
    """Return the largest possible difference between two scores of the metric of that name."""
    lowest, highest = score_range(name)
    return highest - lowest


@dataclass(frozen=True)
class ClusterScores:
    """One metric of one run, by cluster."""

    value: float  # the metric over all rows
    influence: Floats  # what each cluster adds to its error, [clusters]
    counts: Floats  # rows of each cluster, [clusters]


def score_clusters(metric: SumMetric, cluster: Mapping[str, Hashable]) -> ClusterScores:
    """Compute the influence of each cluster that has a row of the metric, in the order of `cluster`."""
    cluster = {id: name for id, name in cluster.items() if id in metric.row_statistics}
    counts = sum_by_cluster(dict.fromkeys(cluster, np.ones(1)), cluster)[:, 0]
    sums = sum_by_cluster(metric.row_statistics, cluster)
    if len(counts) < 2:
        influence = np.zeros(len(counts))
    elif metric.is_mean:
        influence = influence_of_mean(sums[:, 0], counts)
    else:
        influence = influence_of_metric(metric.from_sums, sums)
    return ClusterScores(metric.overall(), influence, counts)


def metric_intervals(metrics: Mapping[str, SumMetric], cluster: Mapping[str, Hashable]) -> dict[str, Interval]:
    """Compute the 95% interval of each metric: `mean_interval` of means, `ratio_interval` of other metrics.

    Args:
        metrics: name -> metric; each may have some of the rows only.
        cluster: row id -> cluster, from `cluster_rows`.

    Raises:
        InputError: if a metric has no row.
    """
    if not all(metric.row_statistics for metric in metrics.values()):
        raise InputError("there are no rows to score. Choose a split that has rows.")
    intervals = {}
    for name, metric in metrics.items():
        lowest, scores = score_range(name)[0], score_clusters(metric, cluster)
        if metric.is_mean:
            shifted = {id: row[0] - lowest for id, row in metric.row_statistics.items()}
            rows = {id: np.array([score, score**2]) for id, score in shifted.items()}
            sums, squares = sum_by_cluster(rows, {id: cluster[id] for id in rows}).T
            interval = mean_interval(sums, squares, scores.counts, maximum=score_span(name))
        else:
            interval = ratio_interval(scores.value, scores.influence, scores.counts, maximum=score_span(name))
        low, high = min(scores.value, interval.low + lowest), max(scores.value, interval.high + lowest)  # rounding
        intervals[name] = Interval(scores.value, low, high)
    return intervals


def paired_difference(
    first: SumMetric, second: SumMetric, cluster: Mapping[str, Hashable], *, maximum: float = 1.0, swaps: int = 10_000
) -> PairedDifference:
    """Test whether two trained models differ on images like these: `second` minus `first` on the same rows.

    It says nothing about other seeds of the same recipes; `compare_recipes` does. The p-value comes from swapping the
    models image by image. If they differ in at most 12 clusters, the test tries every pattern of swaps. Otherwise it
    draws `swaps` random patterns and counts the observed one among them, so that p is never 0 (Phipson and Smyth
    2010). The interval is `difference_interval` with the variance of the clusters' influences.

    Args:
        first: metric of the first model.
        second: the same metric of the second model; rows are joined by id.
        cluster: row id -> cluster, from `cluster_rows`.
        maximum: the highest possible score.
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
    cluster = {id: cluster[id] for id in first.row_statistics}
    first_sums, second_sums = (sum_by_cluster(metric.row_statistics, cluster) for metric in (first, second))
    first_scores, second_scores = (score_clusters(metric, cluster) for metric in (first, second))
    difference = second_scores.value - first_scores.value
    p, method = _swap_test(first, first_sums, second_sums, difference, swaps)
    rows, clusters = len(cluster), len(first_sums)
    if clusters < 2:  # one image has no variance
        return PairedDifference(difference, -maximum, maximum, p, rows, clusters, method, maximum, 1.0)
    variance = float(((second_scores.influence - first_scores.influence) ** 2).sum())
    df = satterthwaite_df(first_scores.counts)
    low, high, error = difference_interval(difference, variance, df, clusters=clusters, maximum=maximum)
    return PairedDifference(difference, low, high, p, rows, clusters, method, error, df)


def relative_drop(
    first: SumMetric, second: SumMetric, cluster: Mapping[str, Hashable], *, maximum: float = 1.0
) -> Interval | None:
    """Compute (first - second) / first on the same rows, joined by id, with its 95% interval.

    The variance is the jackknife's, the interval is symmetric up to its upper limit of 1.

    Returns:
        The relative drop, or None if `first` is 0 or there is one cluster.
    """
    assert first.row_statistics.keys() == second.row_statistics.keys(), "the same rows"
    cluster = {id: cluster[id] for id in first.row_statistics}
    first_sums, second_sums = (sum_by_cluster(metric.row_statistics, cluster) for metric in (first, second))
    width, clusters = first_sums.shape[1], len(first_sums)

    def drop(sums: Floats) -> Floats:  # [n, both metrics' columns] -> [n]
        return 1 - second.from_sums(sums[:, width:]) / first.from_sums(sums[:, :width])

    both = np.concatenate([first_sums, second_sums], axis=1)
    before = first.overall()
    if before == 0 or clusters < 2:
        return None
    variance = float((influence_of_metric(drop, both) ** 2).sum())
    value = 1 - second.overall() / before
    # Divided by `first`, the interval of a difference becomes the interval of a relative drop.
    low, high, _ = difference_interval(0.0, variance * before**2, clusters - 1, clusters=clusters, maximum=maximum)
    return Interval(value, value + low / before, min(1.0, value + high / before))


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
