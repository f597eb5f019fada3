from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from normtune.errors import InputError
from normtune.metrics.statistics.intervals import (
    Interval,
    difference_interval,
    influence_of_mean,
    influence_of_metric,
    mean_interval,
    mean_over_seeds,
    ratio_interval,
    satterthwaite_df,
    t_quantile,
    wilson,
)
from tests.support.tolerance import approx

T3 = 3.182446305284263  # scipy.stats.t.ppf(0.975, 3)


def binary_interval(right: list[float], counts: list[float]) -> Interval:
    sums = np.array(right)
    return mean_interval(sums, sums, np.array(counts))


def test_an_interval_by_hand() -> None:
    """Four images of two rows with 2, 1, 1 and 0 right: the deviations are 1, 0, 0 and -1, so CR2 is 2 / 8^2 / (3/4).

    The lower bound is smaller: 8/3 images carry each outcome, hence unseen = 4 / (4 + 8/3) = 0.6, the correlation 0.3,
    and 0.25 (1 + 0.3) / 8. The effective number is 0.25 / (1/24) = 6 of 8 rows.
    """
    interval = binary_interval([2, 1, 1, 0], [2, 2, 2, 2])
    half = math.sqrt(T3**2 * (0.25 * 6 + T3**2 / 4)) / (6 + T3**2)
    assert (interval.value, interval.low, interval.high) == pytest.approx((0.5, 0.5 - half, 0.5 + half))


def test_the_lower_bound_of_the_variance_by_hand() -> None:
    """All eight rows of four images are right: half of the pseudo-images agree, so the design effect is 1 + 1/2."""
    interval = binary_interval([2, 2, 2, 2], [2, 2, 2, 2])
    size = 8 / 1.5
    assert (interval.value, interval.high) == (1.0, 1.0)
    assert interval.low == pytest.approx(size / (size + T3**2))


@given(
    st.lists(st.integers(1, 9).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), min_size=1, max_size=30),
    st.sampled_from([1.0, 10.0]),
)
def test_intervals_contain_their_value_stay_inside_and_are_never_empty(
    images: list[tuple[int, int]], maximum: float
) -> None:
    right, counts = np.array(images, dtype=float).T
    interval = mean_interval(right * maximum, right * maximum**2, counts, maximum=maximum)
    assert 0 <= interval.low <= interval.value <= interval.high <= maximum and interval.low < interval.high
    share = float(right.sum() / counts.sum())
    ratio = ratio_interval(share, np.zeros(len(counts)), counts)
    assert 0 <= ratio.low <= share <= ratio.high <= 1 and ratio.low < ratio.high


@pytest.mark.parametrize("score", [1e-170, 1e-320])
def test_scores_whose_squares_are_zero_have_an_interval(score: float) -> None:
    """A CIDEr-D of almost nothing: the square of 1e-170 is 0 in double precision."""
    sums, counts = np.array([0.0, score, score, 0.0]), np.ones(4)
    assert mean_interval(sums, sums**2, counts).low == 0 < mean_interval(sums, sums**2, counts).high
    assert ratio_interval(score, sums, counts).low == 0 < ratio_interval(score, sums, counts).high


def test_one_image_says_nothing_about_others() -> None:
    assert binary_interval([3], [4]) == Interval(0.75, 0.0, 1.0)
    assert ratio_interval(0.2, np.zeros(1), np.ones(1), maximum=10) == Interval(0.2, 0.0, 10.0)


def test_questions_of_one_image_widen_the_interval() -> None:
    """Ten questions per image, all right or all wrong: as many effective rows as images."""
    together = binary_interval([10, 0] * 50, [10] * 100)
    single = binary_interval([1, 0] * 50, [1] * 100)
    assert (together.low, together.high) == approx((single.low, single.high), dtype=torch.float64, terms=100)


def test_degrees_of_freedom_of_equal_images_are_one_fewer_and_of_unequal_ones_less() -> None:
    assert satterthwaite_df(np.full(7, 3.0)) == approx(6.0, dtype=torch.float64)
    assert 1 < satterthwaite_df(np.array([1.0, 1.0, 1.0, 30.0])) < 2


def test_the_jackknife_of_a_mean_of_equal_images_is_its_cr2_variance() -> None:
    sums, counts = np.array([2.0, 1.0, 0.0, 1.0, 2.0]), np.full(5, 2.0)
    ratio = influence_of_metric(lambda total: total[:, 0] / total[:, 1], np.stack([sums, counts], axis=1))
    mean = influence_of_mean(sums, counts)
    assert float((ratio**2).sum()) == approx(float((mean**2).sum()), dtype=torch.float64)


def test_an_image_without_which_the_metric_is_undefined_has_no_influence() -> None:
    statistics = np.array([[1.0, 2.0], [0.0, 0.0]])
    assert influence_of_metric(lambda total: total[:, 0] / total[:, 1], statistics).tolist() == [0.0, 0.0]


def test_statsmodels_agrees() -> None:
    """Its cluster-robust variance equals CR2 for equal images, and differs by the factor 1 - share for others."""
    api = pytest.importorskip("statsmodels.api")
    proportion = pytest.importorskip("statsmodels.stats.proportion")
    draw = np.random.default_rng(0)
    for counts in (np.full(12, 5), draw.integers(1, 9, 12)):
        image = np.repeat(np.arange(12), counts)
        scores = draw.random(len(image))
        sums = np.bincount(image, scores)
        groups = {"groups": image, "use_correction": False}
        model = api.OLS(scores, np.ones(len(scores))).fit(cov_type="cluster", cov_kwds=groups)
        share = counts / counts.sum()
        variance = float((influence_of_mean(sums, counts.astype(float)) ** 2 * (1 - share)).sum())
        assert variance == approx(float(model.cov_params()[0, 0]), dtype=torch.float64, terms=len(scores))
    low, high = proportion.proportion_confint(9, 12, method="wilson")
    z = 1.959963984540054
    ours = wilson(0.75, 12, 1e9)
    assert t_quantile(0.975, 1e9) == pytest.approx(z), "t with many degrees of freedom is normal"
    assert (ours.low, ours.high) == (pytest.approx(low), pytest.approx(high))


def test_the_interval_of_a_difference_has_a_smallest_width() -> None:
    """No image differs: half of a pseudo-image each way among 4 + 2."""
    low, high, error = difference_interval(0.0, 0.0, 3, clusters=4)
    assert error == approx(1 / 6, dtype=torch.float64)
    assert (low, high) == pytest.approx((-T3 / 6, T3 / 6))
    assert difference_interval(0.9, 1.0, 3, clusters=4)[:2] == (-1.0, 1.0), "inside -1 to 1"


def test_mean_over_seeds_by_hand() -> None:
    interval = mean_over_seeds([1.0, 2.0, 3.0])
    half = 4.302652729749462 / math.sqrt(3)
    assert (interval.value, interval.low, interval.high) == approx((2.0, 2 - half, 2 + half), dtype=torch.float64)


def test_one_seed_has_no_interval_over_seeds() -> None:
    with pytest.raises(InputError, match="two runs or more, got 1"):
        mean_over_seeds([0.5])
