from __future__ import annotations

import numpy as np
import pytest

from normtune.errors import InputError
from normtune.metrics.statistics import Floats, Paired, bootstrap_mean
from normtune.metrics.sum_metrics import SumMetric, intervals, mean_metric, paired, relative_drop

DRAW = np.random.default_rng(3)
SCORES = {f"r{at}": float(score) for at, score in enumerate(DRAW.random(60))}
OTHERS = {id: score + 0.05 * float(DRAW.normal()) + 0.02 for id, score in SCORES.items()}
IMAGE = {id: at // 3 for at, id in enumerate(SCORES)}


def ratio(sums: Floats) -> Floats:
    found: Floats = sums[:, 0] / sums[:, 1]
    return found


def test_the_interval_of_a_mean_is_the_cluster_bootstraps() -> None:
    found = intervals({"mean": mean_metric(SCORES)}, IMAGE)["mean"]
    expected = bootstrap_mean(SCORES, IMAGE)
    assert (found.value, found.low, found.high) == pytest.approx(
        (expected.value, expected.low, expected.high)
    )


def differing_by(gaps: list[float]) -> Paired:
    """The paired test of two means whose images, of one row each, differ by `gaps`."""
    first = {str(at): 0.25 for at in range(len(gaps))}
    second = {id: first[id] + gap for id, gap in zip(first, gaps, strict=True)}
    return paired(mean_metric(first), mean_metric(second), {id: id for id in first}, swaps=100_000)


def test_all_swaps_are_tried_for_few_images() -> None:
    found = differing_by([1.0] * 5)  # 2 of 32 patterns reach |5|
    assert (found.p, found.method) == (2 / 32, "exact swaps of 5 images")
    assert differing_by([1.0, 2.0, -1.0]).p == 6 / 8  # |sum| is 4, 2, 2, 0 in pairs: 6 of 8 reach 2


def test_swaps_of_many_images_are_near_the_binomial() -> None:
    """20 images, 15 better and 5 worse by one: sign test 0.041389 (scipy.stats.binomtest(15, 20))."""
    found = differing_by([1.0] * 15 + [-1.0] * 5)
    assert found.p == pytest.approx(0.041389, abs=0.002) and "100000" in found.method


def test_the_interval_of_a_difference_of_means_is_that_of_the_mean_difference() -> None:
    found = paired(mean_metric(SCORES), mean_metric(OTHERS), IMAGE)
    expected = bootstrap_mean({id: OTHERS[id] - SCORES[id] for id in SCORES}, IMAGE)
    assert (found.difference, found.low, found.high) == pytest.approx(
        (expected.value, expected.low, expected.high), abs=1e-9
    )


def test_two_rows_of_one_image_are_swapped_together() -> None:
    first, second = mean_metric({"a": 0.0, "b": 0.0, "c": 0.0}), mean_metric({"a": 1.0, "b": 1.0, "c": 1.0})
    found = paired(first, second, {"a": 1, "b": 1, "c": 2})
    assert (found.p, found.rows, found.images) == (2 / 4, 3, 2)


def test_a_corpus_metric_is_computed_from_resampled_sums() -> None:
    """Images of ratio 0 (1 word) and 1 (3 words): resamples give 0, 3/4 and 1; the mean would be 1/2."""
    metric = SumMetric({"a": np.array([0.0, 1.0]), "b": np.array([3.0, 3.0])}, ratio)
    found = intervals({"ratio": metric}, {"a": 1, "b": 2})["ratio"]
    assert (found.value, found.low, found.high) == (0.75, 0.0, 1.0)
    assert metric.by_row() == {"a": 0.0, "b": 1.0}


def test_rows_of_one_image_are_drawn_together() -> None:
    metric = mean_metric({"a": 0.0, "b": 1.0})
    found = intervals({"mean": metric}, {"a": 1, "b": 1})["mean"]
    assert (found.value, found.low, found.high) == (0.5, 0.5, 0.5)


def test_equal_runs_differ_by_nothing() -> None:
    found = paired(mean_metric(SCORES), mean_metric(SCORES), IMAGE)
    assert (found.difference, found.p, found.rows, found.images) == (0.0, 1.0, 60, 20)


def test_swaps_join_by_id_not_by_order() -> None:
    backwards = dict(reversed(OTHERS.items()))
    assert paired(mean_metric(SCORES), mean_metric(backwards), IMAGE) == paired(
        mean_metric(SCORES), mean_metric(OTHERS), IMAGE
    )


def test_runs_of_other_rows_are_refused() -> None:
    with pytest.raises(InputError, match="the runs differ in 1 rows, first 'r0'"):
        paired(mean_metric(SCORES), mean_metric({i: s for i, s in SCORES.items() if i != "r0"}), IMAGE)
    with pytest.raises(InputError, match="no row"):
        intervals({"mean": mean_metric({})}, {})


def test_the_share_lost_is_of_the_first_score_and_nothing_where_that_is_nothing() -> None:
    first, second = (
        mean_metric(dict.fromkeys("abcd", 1.0)),
        mean_metric({"a": 0.0, "b": 0.0, "c": 0.0, "d": 1.0}),
    )
    found = relative_drop(first, second, {"d": 1, "c": 1, "b": 2, "a": 2})  # image 1 loses a half, 2 all
    assert found is not None and (found.value, found.low, found.high) == (0.75, 0.5, 1.0)
    misled = relative_drop(second, first, {id: id for id in "abcd"})
    assert misled is not None and (misled.value, misled.low) == (-3.0, -3.0)
    assert misled.high == pytest.approx(-1 / 3), (
        "of resamples without d, in which there is nothing, none counts"
    )
    nothing = mean_metric(dict.fromkeys("abcd", 0.0))
    assert relative_drop(nothing, first, {id: id for id in "abcd"}) is None
