from __future__ import annotations

import numpy as np
import pytest

from normtune.errors import InputError
from normtune.metrics.corpus import Summed, intervals, mean_of, paired
from normtune.metrics.stats import Floats, bootstrap_mean, paired_difference

DRAW = np.random.default_rng(3)
SCORES = {f"r{at}": float(score) for at, score in enumerate(DRAW.random(60))}
OTHERS = {id: score + 0.05 * float(DRAW.normal()) + 0.02 for id, score in SCORES.items()}
IMAGE = {id: at // 3 for at, id in enumerate(SCORES)}


def ratio(sums: Floats) -> Floats:
    found: Floats = sums[:, 0] / sums[:, 1]
    return found


def test_the_interval_of_a_mean_is_the_cluster_bootstraps() -> None:
    found = intervals({"mean": mean_of(SCORES)}, IMAGE)["mean"]
    expected = bootstrap_mean(SCORES, IMAGE)
    assert (found.value, found.low, found.high) == pytest.approx(
        (expected.value, expected.low, expected.high)
    )


def test_the_paired_test_of_a_mean_is_the_sign_flip() -> None:
    found = paired(mean_of(SCORES), mean_of(OTHERS), IMAGE)
    expected = paired_difference(SCORES, OTHERS, IMAGE)
    assert found.difference == pytest.approx(expected.difference)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-9)
    assert found.p == pytest.approx(expected.p, abs=0.02)
    few = {id: SCORES[id] for id in list(SCORES)[:12]}
    ours = paired(mean_of(few), mean_of({id: OTHERS[id] for id in few}), IMAGE)
    assert ours.p == pytest.approx(paired_difference(few, {i: OTHERS[i] for i in few}, IMAGE).p)
    assert ours.method == "exact swaps of 4 images"


def test_a_corpus_metric_is_computed_from_resampled_sums() -> None:
    """Images of ratio 0 (1 word) and 1 (3 words): resamples give 0, 3/4 and 1; the mean would be 1/2."""
    metric = Summed({"a": np.array([0.0, 1.0]), "b": np.array([3.0, 3.0])}, ratio)
    found = intervals({"ratio": metric}, {"a": 1, "b": 2})["ratio"]
    assert (found.value, found.low, found.high) == (0.75, 0.0, 1.0)
    assert metric.by_row() == {"a": 0.0, "b": 1.0}


def test_rows_of_one_image_are_drawn_together() -> None:
    metric = mean_of({"a": 0.0, "b": 1.0})
    found = intervals({"mean": metric}, {"a": 1, "b": 1})["mean"]
    assert (found.value, found.low, found.high) == (0.5, 0.5, 0.5)


def test_equal_runs_differ_by_nothing() -> None:
    found = paired(mean_of(SCORES), mean_of(SCORES), IMAGE)
    assert (found.difference, found.p, found.rows, found.images) == (0.0, 1.0, 60, 20)


def test_swaps_join_by_id_not_by_order() -> None:
    backwards = dict(reversed(OTHERS.items()))
    assert paired(mean_of(SCORES), mean_of(backwards), IMAGE) == paired(
        mean_of(SCORES), mean_of(OTHERS), IMAGE
    )


def test_runs_of_other_rows_are_refused() -> None:
    with pytest.raises(InputError, match="the runs differ in 1 rows, first 'r0'"):
        paired(mean_of(SCORES), mean_of({i: s for i, s in SCORES.items() if i != "r0"}), IMAGE)
    with pytest.raises(InputError, match="no row"):
        intervals({"mean": mean_of({})}, {})
