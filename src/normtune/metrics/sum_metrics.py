"""Metrics that are a function of sums over rows, such as BLEU and F1: values, intervals, paired tests.

BLEU of a corpus is not the mean of its rows' BLEU, so a resample of images sums the rows' *statistics*
(n-gram counts, lengths) and computes the metric again from the sums (Koehn 2004). A mean is the case whose
statistics are the score and a one. Two runs are compared by swapping them image by image (approximate
randomisation: Riezler and Maxwell 2005), which for a mean flips the signs of the images' differences.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass

import numpy as np

from normtune.errors import InputError
from normtune.metrics.statistics import EXACT_CLUSTERS, RESAMPLES, Floats, Interval, Paired, resampled_sums


@dataclass(frozen=True)
class SumMetric:
    """One metric: the statistics of each row, [columns], and its value of their sums, [n, columns] -> [n]."""

    rows: Mapping[str, Floats]
    value: Callable[[Floats], Floats]

    def overall(self) -> float:
        """The metric over all rows."""
        return float(self.value(np.sum(list(self.rows.values()), axis=0)[None])[0])

    def by_row(self) -> dict[str, float]:
        """The metric of each row alone, as row id -> score."""
        return dict(zip(self.rows, self.value(np.stack(list(self.rows.values()))).tolist(), strict=True))


def mean_metric(scores: Mapping[str, float]) -> SumMetric:
    """The mean over rows."""
    return SumMetric({id: np.array([score, 1.0]) for id, score in scores.items()}, _mean)


def _mean(sums: Floats) -> Floats:
    mean: Floats = sums[:, 0] / sums[:, 1]
    return mean


def _clustered(rows: Mapping[str, Floats], cluster: Mapping[str, Hashable]) -> Floats:
    """Sums of each cluster, in order of appearance: [clusters, columns]."""
    index: dict[Hashable, int] = {}
    which = [index.setdefault(cluster[id], len(index)) for id in rows]
    sums = np.zeros((len(index), len(next(iter(rows.values())))))
    np.add.at(sums, which, np.stack(list(rows.values())))
    return sums


def intervals(
    metrics: Mapping[str, SumMetric],
    cluster: Mapping[str, Hashable],
    *,
    resamples: int = RESAMPLES,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Interval]:
    """Percentile intervals of metrics over the same rows, all from the same resamples of clusters.

    Raises:
        InputError: there is no row.
    """
    if not metrics:
        return {}
    first = next(iter(metrics.values())).rows
    if not first:
        raise InputError("no row to score. Choose a split that has some.")
    assert all(metric.rows.keys() == first.keys() for metric in metrics.values())
    tables = [_clustered(metric.rows, cluster) for metric in metrics.values()]
    drawn = resampled_sums(np.concatenate(tables, axis=1), resamples=resamples, seed=seed)
    found, start = {}, 0
    for (name, metric), table in zip(metrics.items(), tables, strict=True):
        values = metric.value(drawn[:, start : start + table.shape[1]])
        low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
        found[name] = Interval(metric.overall(), float(low), float(high))
        start += table.shape[1]
    return found


def paired(
    first: SumMetric,
    second: SumMetric,
    cluster: Mapping[str, Hashable],
    *,
    resamples: int = RESAMPLES,
    swaps: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> Paired:
    """`second` less `first` on the same rows, joined by id: bootstrap interval and two-sided p-value.

    Every pattern of swaps is tried for up to 12 clusters in which the runs differ, else `swaps` random ones
    with the observed one counted among them, so that p is never 0 (Phipson and Smyth 2010).

    Raises:
        InputError: the two do not score the same rows, or score none.
    """
    if first.rows.keys() != second.rows.keys():
        odd = sorted(first.rows.keys() ^ second.rows.keys())
        raise InputError(f"the runs differ in {len(odd)} rows, first '{odd[0]}'. Compare runs of one split.")
    if not first.rows:
        raise InputError("no row to compare. Choose a split that has some.")
    one = _clustered(first.rows, cluster)
    two = _clustered({id: second.rows[id] for id in first.rows}, cluster)
    width = one.shape[1]
    drawn = resampled_sums(np.concatenate([one, two], axis=1), resamples=resamples, seed=seed)
    low, high = np.quantile(
        second.value(drawn[:, width:]) - first.value(drawn[:, :width]), [(1 - level) / 2, (1 + level) / 2]
    )
    difference = second.overall() - first.overall()
    p, method = _swapped_p(first, one, two, difference, swaps=swaps, seed=seed)
    return Paired(difference, float(low), float(high), p, len(first.rows), len(one), method)


def relative_drop(
    first: SumMetric,
    second: SumMetric,
    cluster: Mapping[str, Hashable],
    *,
    resamples: int = RESAMPLES,
    level: float = 0.95,
    seed: int = 0,
) -> Interval | None:
    """(first - second) / first on the same rows, joined by id, with its percentile interval.

    None where `first` is 0; a resample in which it is 0 is left out.
    """
    assert first.rows.keys() == second.rows.keys(), "the same rows"
    whole = first.overall()
    if whole == 0:
        return None
    one = _clustered(first.rows, cluster)
    two = _clustered({id: second.rows[id] for id in first.rows}, cluster)
    drawn = resampled_sums(np.concatenate([one, two], axis=1), resamples=resamples, seed=seed)
    before, after = first.value(drawn[:, : one.shape[1]]), second.value(drawn[:, one.shape[1] :])
    shares = 1 - after[before != 0] / before[before != 0]
    low, high = np.quantile(shares, [(1 - level) / 2, (1 + level) / 2])
    return Interval(1 - second.overall() / whole, float(low), float(high))


def _swapped_p(
    metric: SumMetric, one: Floats, two: Floats, observed: float, *, swaps: int, seed: int
) -> tuple[float, str]:
    """Share of swaps between the runs whose difference is as large as the observed one, and the method."""
    moved = (one != two).any(axis=1)
    gap = (two - one)[moved]  # [differing clusters, columns]
    total_one, total_two = one.sum(axis=0), two.sum(axis=0)
    slack = 1e-9 * max(1.0, abs(observed))

    def extreme(swapped: Floats) -> int:
        """swapped: [patterns, differing clusters] of 0 and 1."""
        change = swapped @ gap
        difference = metric.value(total_two - change) - metric.value(total_one + change)
        return int((np.abs(difference) >= abs(observed) - slack).sum())

    if len(gap) <= EXACT_CLUSTERS:
        patterns = (np.arange(2 ** len(gap))[:, None] >> np.arange(len(gap))) & 1
        return extreme(patterns.astype(np.float64)) / len(patterns), f"exact swaps of {len(gap)} images"
    generator = np.random.default_rng(seed)
    hits, step = 0, max(1, 2_000_000 // len(gap))
    for start in range(0, swaps, step):
        size = (min(step, swaps - start), len(gap))
        hits += extreme(generator.integers(0, 2, size=size, dtype=np.int8).astype(np.float64))
    return (1 + hits) / (1 + swaps), f"swaps by image, {swaps} random patterns"
