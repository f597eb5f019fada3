from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from normtune.metrics.statistics.comparisons import (
    SeedScores,
    compare_recipes,
    equivalence,
    holm_correction,
    is_no_worse,
    planned_difference,
    recipe_mean,
    smallest_difference,
)
from normtune.metrics.statistics.intervals import Interval, influence_of_mean, t_quantile
from tests.support.tolerance import approx

T4, T4_80 = 2.7764451051977987, 0.9409645846580168  # scipy.stats.t.ppf((0.975, 0.8), 4)


def seed_scores(right: np.ndarray, counts: np.ndarray, *, fixed: bool = False) -> SeedScores:
    """Scores of [seeds, images] sums."""
    return SeedScores(right.sum(axis=1) / counts.sum(), influence_of_mean(right, counts), fixed)


def test_a_comparison_of_recipes_by_hand() -> None:
    """Three seeds each, two images of one row, each answered equally by all seeds of both recipes but for a shift.

    Seeds of the first score 0.1, 0.2, 0.3 on both images, of the second 0.4, 0.5, 0.6: s^2 = 0.01, so the seeds' part
    is 0.01 (1/3 + 1/3), images contribute nothing, and df = 4.
    """
    first, second = (np.repeat(np.array([[0.1], [0.2], [0.3]]) + shift, 2, axis=1) for shift in (0.0, 0.3))
    # The influences are 0; the floor of the variance, (1 / (2 + 2))^2, is larger than 0.02 / 3.
    result = compare_recipes(seed_scores(first, np.ones(2)), seed_scores(second, np.ones(2)), np.ones(2))
    assert (result.difference, result.error, result.df) == approx((0.3, 0.25, 4.0), dtype=torch.float64)
    first, second = (np.repeat(values, 20, axis=1)[:, :40] for values in (first, second))
    result = compare_recipes(seed_scores(first, np.ones(40)), seed_scores(second, np.ones(40)), np.ones(40))
    error = math.sqrt(0.01 * 2 / 3)
    expected = (0.3, 0.3 - T4 * error, 0.3 + T4 * error, error, 4.0)
    assert (result.difference, result.low, result.high, result.error, result.df) == approx(
        expected, dtype=torch.float64, terms=40
    )
    assert f"{result.p:.4f}" == "0.0213", "2 P(T > 3.674), 4 degrees of freedom, from a table of t"


def test_a_fixed_model_has_no_seeds() -> None:
    counts = np.ones(30)
    base = seed_scores(np.tile([0.0, 1.0], 15)[None], counts, fixed=True)
    seeds = seed_scores(np.stack([np.full(30, value) for value in (0.4, 0.5, 0.9)]), counts)
    result = compare_recipes(base, seeds, counts)
    spread, images = 0.07 / 3, float((base.influence**2).sum())
    assert result.error**2 == approx(spread + images, dtype=torch.float64, terms=30)
    assert result.df == approx((spread + images) ** 2 / (spread**2 / 2 + images**2 / 29), dtype=torch.float64, terms=30)


def test_two_seeds_are_not_compared_as_recipes() -> None:
    three, two = (seed_scores(np.ones((seeds, 4)), np.ones(4)) for seeds in (3, 2))
    with pytest.raises(ValueError, match="3 seeds"):
        compare_recipes(three, two, np.ones(4))


def test_statsmodels_agrees() -> None:
    """For equal images, the variance is that of the mixed ANOVA: MS(seeds) + MS(recipe x image) - MS(rest)."""
    pandas = pytest.importorskip("pandas")
    formula = pytest.importorskip("statsmodels.formula.api")
    anova = pytest.importorskip("statsmodels.stats.anova")
    draw, seeds, images = np.random.default_rng(1), 4, 15
    scores = draw.random((2, seeds, images)) * 0.2 + draw.random((2, 1, images)) + draw.random((2, seeds, 1)) * 0.3
    recipe, seed, image = (axis.ravel() for axis in np.indices(scores.shape))
    frame = pandas.DataFrame({"score": scores.ravel(), "recipe": recipe, "seed": seed, "image": image})
    model = formula.ols("score ~ C(recipe) * C(image) + C(recipe):C(seed)", frame).fit()
    squares = anova.anova_lm(model)["mean_sq"]
    of_seeds, interaction = squares["C(recipe):C(seed)"], squares["C(recipe):C(image)"]
    expected = 2 / (images * seeds) * (of_seeds + max(0.0, interaction - squares["Residual"]))
    counts = np.ones(images)
    result = compare_recipes(seed_scores(scores[0], counts), seed_scores(scores[1], counts), counts)
    assert result.error**2 == approx(float(expected), dtype=torch.float64, terms=scores.size)
    paired = pytest.importorskip("statsmodels.stats.weightstats")
    p, _, _ = paired.ttost_paired(scores[1, 0], scores[0, 0], -0.2, 0.2)
    gaps = scores[1, 0] - scores[0, 0]
    ours = equivalence(float(gaps.mean()), float(gaps.std(ddof=1)) / math.sqrt(images), images - 1, 0.2)
    assert ours == approx(float(p), dtype=torch.float64, terms=1000)
    corrected = pytest.importorskip("statsmodels.stats.multitest").multipletests([0.04, 0.01, 0.03], method="holm")[1]
    assert list(holm_correction({"a": 0.04, "b": 0.01, "c": 0.03}).values()) == approx(
        corrected.tolist(), dtype=torch.float64
    )


def test_equivalence_is_shown_inside_the_margin_only() -> None:
    assert f"{equivalence(0.0, 0.01, 20, 0.02):.4f}" == "0.0296", "P(T > 2), 20 degrees of freedom"
    assert equivalence(0.02, 0.01, 20, 0.02) == 0.5, "at the margin"
    assert is_no_worse(0.05, 0.01, 20, 0.02) and equivalence(0.05, 0.01, 20, 0.02) > 0.5, "better is not equivalent"
    assert not is_no_worse(-0.01, 0.01, 20, 0.02)


def test_the_smallest_difference_is_found_in_80_percent() -> None:
    assert smallest_difference(0.01, 4) == pytest.approx(0.01 * (T4 + T4_80))
    counts = np.full(96, 11.0)
    planned = [planned_difference(counts, seeds) for seeds in (3, 5, 10)]
    assert planned == sorted(planned, reverse=True)
    assert planned_difference(np.full(960, 11.0), 5) < planned[1]
    assert planned_difference(counts, None) < planned[2], "seeds add to what images decide"


def test_the_mean_of_a_recipe_by_hand() -> None:
    """Three seeds with 0.4, 0.5, 0.6 on 11 images, and intervals with a standard error of 0.05 (t of 10 df: 2.228)."""
    t10 = 2.2281388519649385
    runs = [Interval(value, value - 0.05 * t10, value + 0.05 * t10) for value in (0.4, 0.5, 0.6)]
    interval = recipe_mean(runs, 11)
    seeds, images = 0.01 / 3, 0.05**2
    variance = seeds + images
    df = variance**2 / (seeds**2 / 2 + images**2 / 10)
    size = 0.25 / variance
    assert interval.value == approx(0.5, dtype=torch.float64)
    square = t_quantile(0.975, df) ** 2
    half = math.sqrt(square * (0.25 * size + square / 4)) / (size + square)
    assert (interval.low, interval.high) == pytest.approx((0.5 - half, 0.5 + half))
    assert recipe_mean(runs[:1], 11) is runs[0]


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=6), st.floats(0, 1), st.integers(1, 50), st.sampled_from([1.0, 10.0])
)
@example([0.0, 1e-103], 1e-103, 2, 1.0)  # the square of the variance is 0
def test_means_of_recipes_stay_inside_and_are_never_empty(
    values: list[float], width: float, images: int, maximum: float
) -> None:
    """Also for the empty intervals of old files."""
    runs = [Interval(v * maximum, max(0.0, v - width) * maximum, min(1.0, v + width) * maximum) for v in values]
    interval = recipe_mean(runs, images, maximum=maximum)
    assert 0 <= interval.low <= interval.high <= maximum and interval.low < interval.high


def test_two_equal_seeds_do_not_give_an_empty_interval() -> None:
    """A study of version 0.1 printed 57.1 [57.1, 57.1] and 50.0 [-161.8, 261.8]."""
    equal = recipe_mean([Interval(4 / 7, 4 / 7, 4 / 7)] * 2, 2)
    assert 0 < equal.low < 4 / 7 < equal.high < 1
    apart = recipe_mean([Interval(1 / 3, 0.1, 0.6), Interval(2 / 3, 0.4, 0.9)], 20)
    assert 0 < apart.low < 0.5 < apart.high < 1


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
