"""Intervals and differences of the scores of questions, clustered by image, for `format_interval`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from normtune.metrics.sum_metrics import mean_metric, metric_intervals, paired_difference

METRIC = "global_exact"  # the metric of the scores: it gives the range of their intervals
Scores = Mapping[str, float]  # id of a question -> its score
Images = Mapping[str, tuple[str, ...]]  # id of a question -> its images


def interval(scores: Scores, images: Images) -> dict[str, float]:
    """Mean score and its 95% interval."""
    return asdict(metric_intervals({METRIC: mean_metric(scores)}, images)[METRIC])


def difference(first: Scores, second: Scores, images: Images) -> dict[str, float]:
    """`second` minus `first` on the same questions, with its 95% interval and p-value."""
    paired = paired_difference(mean_metric(first), mean_metric(second), images)
    return {"value": paired.difference, "low": paired.low, "high": paired.high, "p": paired.p}
