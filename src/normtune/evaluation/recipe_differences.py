"""Compares one metric of two models or of two recipes: selects the question, its test, and what the data can show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import numpy as np

from normtune.data.records import Example
from normtune.errors import InputError
from normtune.metrics.statistics.comparisons import (
    DISAGREEMENT,
    MIN_SEEDS,
    SEED_DEVIATION,
    SeedScores,
    compare_recipes,
    equivalence,
    holm_correction,
    is_no_worse,
    planned_difference,
    smallest_difference,
)
from normtune.metrics.sum_metrics import (
    LOWER_IS_BETTER,
    SumMetric,
    average_metric,
    cluster_rows,
    paired_difference,
    score_clusters,
    score_span,
)

Key = TypeVar("Key", bound=Hashable)
# What the p-value of a comparison answers
Question = Literal["recipes", "trained models"]
QUESTIONS: dict[Question, str] = {
    "recipes": "these recipes differ, for new seeds and new images like these",
    "trained models": "these trained models differ on images like these; other seeds of their recipes may not",
}


@dataclass(frozen=True)
class MetricDifference:
    """One metric of two runs or recipes on the same rows. `difference` is the second minus the first."""

    first: float  # the metric of the first; the mean of several seeds
    second: float  # the same of the second
    difference: float
    low: float  # lower end of the 95% interval of the difference
    high: float  # its upper end
    p: float  # p-value of the test that answers `question`
    p_holm: float  # corrected for all metrics of all compared runs (Holm 1979)
    rows: int  # number of rows
    images: int  # number of images
    method: str  # the test
    question: Question  # `recipes` with three seeds or more of each, else `trained models`
    seeds: int  # the smaller number of seeds of the two recipes
    smallest_difference: float  # the true difference that is found in 80% of such comparisons
    margin: float | None  # the largest difference that does not matter, if the user states one
    equivalent: bool | None  # whether the difference is inside the margin (TOST at 5%); None without a margin
    # whether the second is worse by less than the margin (one-sided test at 5%); None without a margin
    no_worse: bool | None


@dataclass(frozen=True)
class Group:
    """The evaluated models of one recipe."""

    metrics: Sequence[Mapping[str, SumMetric]]  # every metric of each model (seed)
    fixed: bool = False  # no seed decides the model: a base without tuning, or a baseline


def check_margin(points: float | None) -> None:
    """Check that a margin is above 0. Raises `InputError` if it is not."""
    if points is not None and not points > 0:
        raise InputError(f"--margin {points:g}: the margin must be above 0, in points such as 2.")


def compare_metric(
    name: str, first: Group, second: Group, examples: Sequence[Example], *, margin: float | None = None
) -> MetricDifference:
    """Compare one metric of two groups that answered the same examples; `p_holm` is p.

    With `MIN_SEEDS` seeds or more of each recipe, the recipes are compared. With fewer seeds, the trained models are
    compared: the score of a row is then the mean over the models of a recipe.

    Args:
        first, second: the groups.
        margin: the largest difference that does not matter, in points (2 is 0.02).

    Raises:
        InputError: the models did not answer the same rows.
    """
    groups, cluster, maximum = (first, second), cluster_rows(examples), score_span(name)
    metrics = [[table[name] for table in group.metrics] for group in groups]
    random = [len(group.metrics) for group in groups if not group.fixed]
    question: Question
    if random and min(random) >= MIN_SEEDS:
        question, method = "recipes", "Obuchowski-Rockette, Hillis' degrees of freedom"
        scores = [[score_clusters(metric, cluster) for metric in seeds] for seeds in metrics]
        before, after = (
            SeedScores(np.array([s.value for s in seeds]), np.stack([s.influence for s in seeds]), group.fixed)
            for seeds, group in zip(scores, groups, strict=True)
        )
        if len(scores[0][0].counts) > 1:
            result = compare_recipes(before, after, scores[0][0].counts, maximum=maximum)
            values = (result.difference, result.low, result.high, result.p)
            error, df = result.error, result.df
        else:  # one image has no variance
            values = (float(after.values.mean() - before.values.mean()), -maximum, maximum, 1.0)
            error, df = maximum, 1.0
        means = float(before.values.mean()), float(after.values.mean())
    else:
        question = "trained models"
        reference, other = (average_metric(seeds) if len(seeds) > 1 else seeds[0] for seeds in metrics)
        pair = paired_difference(reference, other, cluster, maximum=maximum)
        values, method = (pair.difference, pair.low, pair.high, pair.p), pair.method
        error, df = pair.error, pair.df
        means = reference.overall(), other.overall()
    difference, low, high, p = values
    sign = -1 if name in LOWER_IS_BETTER else 1
    limit = None if margin is None else margin / 100
    rows = metrics[0][0].row_statistics.keys()
    return MetricDifference(
        first=means[0],
        second=means[1],
        difference=difference,
        low=low,
        high=high,
        p=p,
        p_holm=p,
        rows=len(rows),
        images=len({example.images for example in examples if example.id in rows}),
        method=method,
        question=question,
        seeds=min(random or [1]),
        smallest_difference=min(maximum, smallest_difference(error, df)),
        margin=limit,
        equivalent=None if limit is None else equivalence(difference, error, df, limit) <= 0.05,
        no_worse=None if limit is None else is_no_worse(sign * difference, error, df, limit),
    )


def plan_comparison(examples: Sequence[Example]) -> dict[str, float]:
    """Compute the smallest differences in accuracy that a test set of questions can show, before any training.

    Returns:
        `trained models`, `3 seeds`, `5 seeds` and `10 seeds` (of each recipe) -> the true difference that is found in
        80% of comparisons. It is empty for reports and for a single image or patient.
    """
    cluster = cluster_rows(examples)
    counts = np.array(list(Counter(cluster.values()).values()), dtype=np.float64)
    if len(counts) < 2 or any(example.kind == "report" for example in examples):
        return {}
    plans = {"trained models": None, "3 seeds": 3, "5 seeds": 5, "10 seeds": 10}
    return {name: min(1.0, planned_difference(counts, seeds)) for name, seeds in plans.items()}


def plan_text(plan: Mapping[str, float]) -> str:
    """Format the result of `plan_comparison` as one line, in points."""
    differences = ", ".join(f"{name} {100 * value:.1f}" for name, value in plan.items())
    return (
        f"Points of accuracy that the test split can show (80% power): {differences}. Assumes that two models disagree "
        f"on {100 * DISAGREEMENT:g}% of the questions, and a standard deviation of {100 * SEED_DEVIATION:g} points "
        "over seeds."
    )


def correct_p_values(differences: Mapping[Key, MetricDifference]) -> dict[Key, MetricDifference]:
    """Return the differences with `p_holm` corrected for all of them."""
    corrected = holm_correction({key: difference.p for key, difference in differences.items()})
    return {key: replace(difference, p_holm=corrected[key]) for key, difference in differences.items()}
