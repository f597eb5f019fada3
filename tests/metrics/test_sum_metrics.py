from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from normtune.errors import InputError
from normtune.metrics.statistics import Floats, PairedDifference
from normtune.metrics.sum_metrics import SumMetric, bootstrap_intervals, mean_metric, paired_difference, relative_drop
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
    gaps = mean_metric({id: OTHERS[id] - SCORES[id] for id in SCORES})
    expected = bootstrap_intervals({"gap": gaps}, IMAGE)["gap"]
    assert (result.difference, result.low, result.high) == approx(
        (expected.value, expected.low, expected.high), dtype=torch.float64
    )


def test_two_rows_of_one_image_are_swapped_together() -> None:
    first, second = mean_metric({"a": 0.0, "b": 0.0, "c": 0.0}), mean_metric({"a": 1.0, "b": 1.0, "c": 1.0})
    result = paired_difference(first, second, {"a": 1, "b": 1, "c": 2})
    assert (result.p, result.rows, result.images) == (2 / 4, 3, 2)


def test_a_corpus_metric_is_computed_from_resampled_sums() -> None:
    """Images with ratio 0 (1 word) and 1 (3 words): resamples give 0, 3/4 and 1; the mean would be 1/2."""
    metric = SumMetric({"a": np.array([0.0, 1.0]), "b": np.array([3.0, 3.0])}, ratio)
    interval = bootstrap_intervals({"ratio": metric}, {"a": 1, "b": 2})["ratio"]
    assert (interval.value, interval.low, interval.high) == (0.75, 0.0, 1.0)
    assert metric.by_row() == {"a": 0.0, "b": 1.0}


def test_rows_of_one_image_are_drawn_together() -> None:
    metric = mean_metric({"a": 0.0, "b": 1.0})
    interval = bootstrap_intervals({"mean": metric}, {"a": 1, "b": 1})["mean"]
    assert (interval.value, interval.low, interval.high) == (0.5, 0.5, 0.5)


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
        bootstrap_intervals({"mean": mean_metric({})}, {})


def test_the_relative_drop_is_undefined_if_the_first_score_is_zero() -> None:
    first, second = (mean_metric(dict.fromkeys("abcd", 1.0)), mean_metric({"a": 0.0, "b": 0.0, "c": 0.0, "d": 1.0}))
    drop = relative_drop(
        first, second, {"d": 1, "c": 1, "b": 2, "a": 2}
    )  # image 1 loses half of its score, image 2 all of it
    assert drop is not None and (drop.value, drop.low, drop.high) == (0.75, 0.5, 1.0)
    misled = relative_drop(second, first, {id: id for id in "abcd"})
    assert misled is not None and (misled.value, misled.low) == (-3.0, -3.0)
    assert misled.high == pytest.approx(-1 / 3), "resamples without d have the score 0 and are ignored"
    zero = mean_metric(dict.fromkeys("abcd", 0.0))
    assert relative_drop(zero, first, {id: id for id in "abcd"}) is None
