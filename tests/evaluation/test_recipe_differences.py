from __future__ import annotations

import numpy as np
import pytest

from normtune.data.records import Example
from normtune.errors import InputError
from normtune.evaluation.recipe_differences import (
    Group,
    check_margin,
    compare_metric,
    correct_p_values,
    plan_comparison,
    plan_text,
)
from normtune.metrics.statistics.comparisons import SeedScores, compare_recipes
from normtune.metrics.sum_metrics import mean_metric, paired_difference, score_clusters

EXAMPLES = [Example(f"{i}{n}", (f"{i}",), "?", "yes", "closed", "test") for i in range(12) for n in "ab"]
CLUSTER = {example.id: example.images[0] for example in EXAMPLES}


def recipe(seeds: int, accuracy: float, start: int = 0, *, fixed: bool = False) -> Group:
    """Models of seeds with random right answers."""
    draws = [np.random.default_rng(start + seed).random(len(EXAMPLES)) < accuracy for seed in range(seeds)]
    metrics = [mean_metric({e.id: float(r) for e, r in zip(EXAMPLES, right, strict=True)}) for right in draws]
    return Group([{"global_exact": metric} for metric in metrics], fixed)


def test_two_models_are_paired_by_image() -> None:
    first, second = recipe(1, 0.5), recipe(1, 0.9, 10)
    result = compare_metric("global_exact", first, second, EXAMPLES)
    pair = paired_difference(first.metrics[0]["global_exact"], second.metrics[0]["global_exact"], CLUSTER)
    assert (result.question, result.seeds, result.method) == ("trained models", 1, pair.method)
    assert (result.difference, result.low, result.high, result.p) == (pair.difference, pair.low, pair.high, pair.p)
    assert (result.margin, result.equivalent, result.no_worse) == (None, None, None)
    assert (result.rows, result.images) == (24, 12)


def test_three_seeds_are_compared_as_recipes() -> None:
    first, second = recipe(3, 0.5), recipe(4, 0.9, 10)
    result = compare_metric("global_exact", first, second, EXAMPLES, margin=60)
    scores = [[score_clusters(m["global_exact"], CLUSTER) for m in group.metrics] for group in (first, second)]
    expected = compare_recipes(
        *(SeedScores(np.array([s.value for s in seeds]), np.stack([s.influence for s in seeds])) for seeds in scores),
        scores[0][0].counts,
    )
    assert (result.question, result.seeds) == ("recipes", 3)
    assert (result.difference, result.p, result.low) == (expected.difference, expected.p, expected.low)
    assert result.second == pytest.approx(np.mean([s.value for s in scores[1]]))
    assert result.margin == 0.6 and result.no_worse is True and result.smallest_difference > 0


def test_fewer_seeds_compare_the_trained_models_together() -> None:
    result = compare_metric("global_exact", recipe(3, 0.5), recipe(2, 0.9, 10), EXAMPLES)
    assert (result.question, result.seeds) == ("trained models", 2)
    assert result.first == pytest.approx(np.mean([model["global_exact"].overall() for model in recipe(3, 0.5).metrics]))


def test_a_base_without_tuning_needs_no_seeds() -> None:
    base = recipe(1, 0.2, 20, fixed=True)
    assert compare_metric("global_exact", base, recipe(3, 0.9), EXAMPLES).question == "recipes"
    single_seed = recipe(1, 0.2, 20)
    assert compare_metric("global_exact", single_seed, recipe(3, 0.9), EXAMPLES).question == "trained models"
    assert compare_metric("global_exact", base, base, EXAMPLES).question == "trained models"


def test_one_image_shows_nothing() -> None:
    rows = EXAMPLES[:2]
    right = [{"m": mean_metric(dict.fromkeys([e.id for e in rows], score))} for score in (0.0, 0.5, 1.0)]
    result = compare_metric("m", Group(right), Group(right[::-1]), rows)
    assert (result.low, result.high, result.p, result.smallest_difference) == (-1.0, 1.0, 1.0, 1.0)


def test_p_values_are_corrected_together() -> None:
    result = compare_metric("global_exact", recipe(1, 0.5), recipe(1, 0.9, 10), EXAMPLES)
    assert correct_p_values({"a": result, "b": result})["a"].p_holm == min(1.0, 2 * result.p)


def test_a_margin_is_above_zero() -> None:
    check_margin(None)
    with pytest.raises(InputError, match="margin must be above 0"):
        check_margin(0)


def test_a_test_set_states_what_it_can_show() -> None:
    plan = plan_comparison(EXAMPLES)
    assert plan["3 seeds"] > plan["5 seeds"] > plan["10 seeds"] > plan["trained models"] > 0
    assert f"5 seeds {100 * plan['5 seeds']:.1f}" in plan_text(plan)
    assert plan_comparison(EXAMPLES[:2]) == {}, "one image"
    assert plan_comparison([Example("r", ("1",), "", "x", "report", "test")] * 2) == {}
