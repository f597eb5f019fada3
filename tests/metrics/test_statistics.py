from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Mapping

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from normtune.errors import InputError
from normtune.metrics.statistics import RESAMPLES, Interval, holm_correction, mean_over_seeds, t_quantile
from normtune.metrics.sum_metrics import SumMetric, bootstrap_intervals, mean_metric, sum_by_cluster
from tests.support.tolerance import approx, quantile_error


def bootstrap_mean(
    scores: dict[str, float], cluster: Mapping[str, Hashable], *, resamples: int = RESAMPLES
) -> Interval:
    return bootstrap_intervals({"mean": mean_metric(scores)}, cluster, resamples=resamples)["mean"]


def one_row_per_cluster(values: list[float]) -> tuple[dict[str, float], dict[str, str]]:
    """Scores by id, with one row per cluster."""
    return {str(i): value for i, value in enumerate(values)}, {str(i): str(i) for i in range(len(values))}


def test_clusters_are_summed_in_order_of_appearance() -> None:
    metric = mean_metric({"q1": 1.0, "q2": 0.0, "q3": 1.0, "q4": 1.0})
    cluster = {"q0": "c", "q1": "b", "q2": "a", "q3": "b", "q4": "a"}
    assert sum_by_cluster(metric.row_statistics, cluster).tolist() == [[0.0, 0.0], [2.0, 2.0], [1.0, 2.0]]


def test_interval_of_single_row_clusters_equals_scipy() -> None:
    """scipy 1.17: bootstrap((x,), np.mean, n_resamples=200_000, method="percentile", rng=0) with
    x = (np.arange(40) * 37 % 101) / 100 gives (0.4075, 0.58975)."""
    scores, cluster = one_row_per_cluster([(i * 37 % 101) / 100 for i in range(40)])
    interval = bootstrap_mean(scores, cluster, resamples=100_000)
    assert interval.value == approx(np.mean(list(scores.values())), dtype=torch.float64)
    width = 0.58975 - 0.4075  # of a 95% interval: 3.92 standard deviations
    error = 2 * quantile_error(width / 3.92, 100_000)  # both values are random
    assert interval.low == pytest.approx(0.4075, abs=error)
    assert interval.high == pytest.approx(0.58975, abs=error)


def test_interval_of_few_clusters_equals_full_enumeration() -> None:
    """Four images of unequal size: all 256 equally likely resamples are enumerated."""
    sums, counts = np.array([1.0, 3.0, 0.0, 2.0]), np.array([1.0, 6.0, 2.0, 2.0])
    means = [sums[list(draw)].sum() / counts[list(draw)].sum() for draw in itertools.product(range(4), repeat=4)]
    low, high = np.quantile(means, [0.025, 0.975])
    rows = {str(at): np.array(pair) for at, pair in enumerate(zip(sums, counts, strict=True))}
    metric = SumMetric(rows, mean_metric({"row": 0.0}).from_sums)
    interval = bootstrap_intervals({"mean": metric}, {id: id for id in rows}, resamples=20_000)["mean"]
    assert (interval.value, interval.low, interval.high) == (6 / 11, pytest.approx(low), pytest.approx(high))


def test_questions_of_one_image_widen_the_interval() -> None:
    """Ten questions per image, all right or all wrong: the interval over images is sqrt(10) times wider."""
    scores = {f"{image}-{q}": float(image % 2) for image in range(100) for q in range(10)}
    by_image = bootstrap_mean(scores, {id: id.split("-")[0] for id in scores})
    by_question = bootstrap_mean(scores, {id: id for id in scores})
    ratio = (by_image.high - by_image.low) / (by_question.high - by_question.low)
    # the relative error of two widths of 3.92 standard deviations with two random ends each
    assert ratio == pytest.approx(math.sqrt(10), rel=2 * 2 * quantile_error(1 / 3.92, RESAMPLES))


def test_metrics_share_their_resamples_for_any_block_size() -> None:
    generator = np.random.default_rng(3)
    first, second = ({str(at): float(score) for at, score in enumerate(scores)} for scores in generator.random((2, 50)))
    cluster = {id: id for id in first}
    both = bootstrap_intervals({"first": mean_metric(first), "second": mean_metric(second)}, cluster)
    assert both["second"] == bootstrap_mean(second, cluster)


def test_a_resample_without_rows_is_ignored() -> None:
    interval = bootstrap_mean({"a": 1.0}, {"a": 1, "b": 2, "c": 3})
    assert (interval.value, interval.low, interval.high) == (1.0, 1.0, 1.0)


def test_no_rows_is_an_input_error() -> None:
    with pytest.raises(InputError, match="no rows"):
        bootstrap_mean({}, {})


def test_holm_by_hand() -> None:
    corrected = holm_correction({"a": 0.04, "b": 0.01, "c": 0.03})
    assert corrected == {"a": pytest.approx(0.06), "b": pytest.approx(0.03), "c": pytest.approx(0.06)}
    assert list(corrected) == ["a", "b", "c"]
    assert holm_correction({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}


@given(st.dictionaries(st.text(max_size=3), st.floats(0, 1), max_size=8))
def test_holm_never_lowers_p_values_and_keeps_their_order(p: dict[str, float]) -> None:
    corrected = holm_correction(p)
    assert all(p[name] <= corrected[name] <= 1 for name in p)
    ranked = sorted(p, key=lambda name: p[name])
    assert all(corrected[a] <= corrected[b] for a, b in itertools.pairwise(ranked))


@pytest.mark.parametrize(
    ("level", "freedom", "expected"),  # scipy.stats.t.ppf((1 + level) / 2, freedom)
    [
        (0.95, 1, 12.706204736174694),
        (0.95, 2, 4.302652729749462),
        (0.95, 3, 3.1824463052837078),
        (0.95, 4, 2.7764451051977934),
        (0.95, 9, 2.2621571627982053),
        (0.95, 30, 2.0422724563012378),
        (0.99, 5, 4.032142983555227),
        (0.5, 7, 0.7111417780817866),
    ],
)
def test_t_quantiles_equal_scipy(level: float, freedom: int, expected: float) -> None:
    assert t_quantile(level, freedom) == approx(expected, dtype=torch.float64, terms=1_000_000)


def test_mean_over_seeds_by_hand() -> None:
    interval = mean_over_seeds([1.0, 2.0, 3.0])
    half_width = 4.302652729749462 / math.sqrt(3)
    assert (interval.value, interval.low, interval.high) == (
        2.0,
        pytest.approx(2 - half_width),
        pytest.approx(2 + half_width),
    )


def test_one_seed_has_no_interval() -> None:
    with pytest.raises(InputError, match="two runs or more, got 1"):
        mean_over_seeds([0.5])
