from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from normtune.data.records import Example
from normtune.errors import InputError
from normtune.metrics.statistics.intervals import Floats, Interval, influence_of_mean, mean_interval
from normtune.metrics.sum_metrics import (
    PairedDifference,
    SumMetric,
    average_metric,
    cluster_rows,
    mean_metric,
    metric_intervals,
    paired_difference,
    relative_drop,
    sum_by_cluster,
)
from tests.support.tolerance import approx, sampling_error

DRAW = np.random.default_rng(3)
SCORES = {f"r{at}": float(score) for at, score in enumerate(DRAW.random(60))}
OTHERS = {id: score + 0.05 * float(DRAW.normal()) + 0.02 for id, score in SCORES.items()}
IMAGE = {id: at // 3 for at, id in enumerate(SCORES)}


def ratio(sums: Floats) -> Floats:
    values: Floats = sums[:, 0] / sums[:, 1]
    return values


def differing_by(gaps: list[float]) -> PairedDifference:
    """Compare two means of images with one row each, which differ by `gaps`."""
    first = {str(at): 0.25 for at in range(len(gaps))}
    second = {id: first[id] + gap for id, gap in zip(first, gaps, strict=True)}
    return paired_difference(mean_metric(first), mean_metric(second), {id: id for id in first}, swaps=100_000)


def test_all_swaps_are_tried_for_few_images() -> None:
    result = differing_by([1.0] * 5)  # 2 of 32 patterns reach |5|
    assert (result.p, result.method) == (2 / 32, "exact swaps of 5 images")
    assert differing_by([1.0, 2.0, -1.0]).p == 6 / 8  # |sum| is 4, 2, 2, 0 in pairs: 6 of 8 reach 2


def test_swaps_of_many_images_are_near_the_binomial() -> None:
    """20 images, 15 better and 5 worse by one: sign test 0.041389 (scipy.stats.binomtest(15, 20))."""
    result = differing_by([1.0] * 15 + [-1.0] * 5)
    error = sampling_error(math.sqrt(0.041389 * (1 - 0.041389)), 100_000)
    assert result.p == pytest.approx(0.041389, abs=error) and "100000" in result.method


def test_the_interval_of_a_difference_of_means_is_that_of_the_mean_difference() -> None:
    result = paired_difference(mean_metric(SCORES), mean_metric(OTHERS), IMAGE)
    gaps = np.array([sum(OTHERS[id] - SCORES[id] for id in SCORES if IMAGE[id] == image) for image in range(20)])
    error = math.sqrt(float((influence_of_mean(gaps, np.full(20, 3.0)) ** 2).sum()))
    expected = (gaps.sum() / 60, max(error, 1 / 22), 19.0)
    assert (result.difference, result.error, result.df) == approx(expected, dtype=torch.float64, terms=60)
    assert result.high - result.difference == approx(result.difference - result.low, dtype=torch.float64)


def test_a_metric_has_the_interval_of_its_kind_over_its_own_images() -> None:
    """Three rows of two images, one of which has no row of the second metric."""
    cluster = {"a": 1, "b": 1, "c": 2, "d": 3}
    mean = mean_metric({"a": 1.0, "b": 0.0, "c": 0.5})
    corpus = SumMetric({"c": np.array([1.0, 2.0]), "d": np.array([3.0, 4.0])}, ratio)
    intervals = metric_intervals({"cider_d": mean, "ratio": corpus}, cluster)
    sums, squares, counts = np.array([1.0, 0.5]), np.array([1.0, 0.25]), np.array([2.0, 1.0])
    expected = mean_interval(sums, squares, counts, maximum=10.0)
    assert intervals["cider_d"] == Interval(0.5, expected.low, expected.high)
    assert intervals["ratio"].value == 4 / 6 and 0 < intervals["ratio"].low < 4 / 6 < intervals["ratio"].high < 1


def test_clusters_are_patients_where_the_data_name_them_and_images_otherwise() -> None:
    def example(id: str, *images: str, **meta: str) -> Example:
        return Example(id, images, "", "", "report", "test", meta)

    rows = [example("1", "x"), example("2", "x", "y"), example("3", "z"), example("4")]
    assert cluster_rows(rows) == {"1": "x", "2": "x", "3": "z", "4": "row 4"}
    named = [example("1", "x", patient="p"), example("2", "y", patient="q"), example("3", "z", patient="p")]
    assert cluster_rows(named) == {"1": "x", "2": "y", "3": "x"}


def test_clusters_are_summed_in_order_of_appearance() -> None:
    metric = mean_metric({"q1": 1.0, "q2": 0.0, "q3": 1.0, "q4": 1.0})
    cluster = {"q0": "c", "q1": "b", "q2": "a", "q3": "b", "q4": "a"}
    assert sum_by_cluster(metric.row_statistics, cluster).tolist() == [[0.0, 0.0], [2.0, 2.0], [1.0, 2.0]]


def test_several_models_together_have_the_mean_of_their_statistics() -> None:
    both = average_metric([mean_metric({"a": 1.0, "b": 0.0}), mean_metric({"b": 1.0, "a": 1.0})])
    assert both.by_row() == {"a": 1.0, "b": 0.5} and both.overall() == 0.75


def test_two_rows_of_one_image_are_swapped_together() -> None:
    first, second = mean_metric({"a": 0.0, "b": 0.0, "c": 0.0}), mean_metric({"a": 1.0, "b": 1.0, "c": 1.0})
    result = paired_difference(first, second, {"a": 1, "b": 1, "c": 2})
    assert (result.p, result.rows, result.images) == (2 / 4, 3, 2)


def test_a_corpus_metric_is_computed_from_sums() -> None:
    """Ratios of 0 (1 word) and 1 (3 words); the mean would be 1/2."""
    metric = SumMetric({"a": np.array([0.0, 1.0]), "b": np.array([3.0, 3.0])}, ratio)
    assert metric.overall() == 0.75 and metric.by_row() == {"a": 0.0, "b": 1.0}


def test_one_image_gives_the_whole_range() -> None:
    interval = metric_intervals({"mean": mean_metric({"a": 0.0, "b": 1.0})}, {"a": 1, "b": 1})["mean"]
    assert interval == Interval(0.5, 0.0, 1.0)
    result = paired_difference(mean_metric({"a": 0.0}), mean_metric({"a": 1.0}), {"a": 1})
    assert (result.difference, result.low, result.high, result.p) == (1.0, -1.0, 1.0, 1.0)


def test_equal_runs_have_no_difference() -> None:
    result = paired_difference(mean_metric(SCORES), mean_metric(SCORES), IMAGE)
    assert (result.difference, result.p, result.rows, result.images) == (0.0, 1.0, 60, 20)


def test_paired_rows_are_joined_by_id_not_by_order() -> None:
    backwards = dict(reversed(OTHERS.items()))
    assert paired_difference(mean_metric(SCORES), mean_metric(backwards), IMAGE) == paired_difference(
        mean_metric(SCORES), mean_metric(OTHERS), IMAGE
    )


def test_runs_with_different_rows_are_refused() -> None:
    with pytest.raises(InputError, match="the runs differ in 1 rows, first 'r0'"):
        paired_difference(mean_metric(SCORES), mean_metric({i: s for i, s in SCORES.items() if i != "r0"}), IMAGE)
    with pytest.raises(InputError, match="no rows"):
        metric_intervals({"mean": mean_metric({})}, {})


def test_the_relative_drop_by_hand() -> None:
    """Images lose 1/2, all, 1/2 and all of 1: without each, 1 - 1.5/3 ..., so the jackknife is that of 1 - mean."""
    first = mean_metric(dict.fromkeys("abcd", 1.0))
    second = mean_metric({"a": 0.5, "b": 0.0, "c": 0.5, "d": 0.0})
    drop = relative_drop(first, second, {id: id for id in "abcd"})
    half_width = 3.182446305284263 * max(math.sqrt(4 * 0.25**2 / 3 / 4), 1 / 6)
    assert drop is not None
    assert (drop.value, drop.low, drop.high) == pytest.approx((0.75, 0.75 - half_width, 1.0))
    misled = relative_drop(second, first, {"a": 1, "c": 2, "b": 1, "d": 2})
    assert misled is not None and misled.value == -3.0 and misled.low < -3.0 < misled.high


def test_the_relative_drop_is_undefined_if_the_first_score_is_zero_or_there_is_one_image() -> None:
    first, zero = (mean_metric(dict.fromkeys("abcd", score)) for score in (1.0, 0.0))
    assert relative_drop(zero, first, {id: id for id in "abcd"}) is None
    single = mean_metric({"a": 0.0, "b": 0.0, "c": 0.0, "d": 1.0})
    decided_by_one = relative_drop(single, first, {id: id for id in "abcd"})
    assert decided_by_one is not None and decided_by_one.low < decided_by_one.value == -3.0 < decided_by_one.high
    assert relative_drop(first, single, dict.fromkeys("abcd", 1)) is None, "one image has no variance"
