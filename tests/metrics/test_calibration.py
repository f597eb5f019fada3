from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from normtune.data.records import Example, Prediction
from normtune.metrics.calibration import (
    BINS,
    ConfidentRows,
    abstention_report,
    area_under_risk_coverage,
    calibration_error,
    confidence_report,
    overconfidence,
    reliability_bins,
    risk_coverage,
)
from tests.support.tolerance import approx, sampling_error


def confident_rows(confidence: list[float], right: list[int], cluster: list[int] | None = None) -> ConfidentRows:
    return ConfidentRows(
        np.array(confidence), np.array(right, float), np.array(cluster or range(len(right)), dtype=np.int64)
    )


def draw_rows(images: int, accuracy: float | None, seed: int = 0) -> ConfidentRows:
    """Five questions an image; right as often as their confidence says, or with a fixed accuracy."""
    draw = np.random.default_rng(seed)
    confidence = draw.random(5 * images)
    right = draw.random(5 * images) < (confidence if accuracy is None else accuracy)
    return ConfidentRows(confidence, right.astype(float), np.repeat(np.arange(images), 5))


HALF = confident_rows([0.95, 0.95, 0.55, 0.55], [1, 0, 1, 1])


def test_the_calibration_error_of_two_bins_by_hand() -> None:
    assert calibration_error(HALF).value == approx((abs(0.5 - 0.95) + abs(1 - 0.55)) / 2)
    assert [(b["from"], b["rows"], b["right"]["value"]) for b in reliability_bins(HALF)] == [
        (0.5, 2, 1.0),
        (0.9, 2, 0.5),
    ]
    assert overconfidence(HALF).value == approx(0.75 - 0.75)


def test_a_confidence_between_two_bins_is_in_the_upper_one_and_1_in_the_last() -> None:
    bins = reliability_bins(confident_rows([0.3, 0.7, 1.0, 0.0], [1, 1, 1, 1]))
    assert [round(BINS * b["from"]) for b in bins] == [0, 3, 7, 9]


def test_the_calibration_error_is_that_of_torchmetrics() -> None:
    functional = pytest.importorskip("torchmetrics.functional.classification")
    rows = draw_rows(200, None)
    expected = functional.binary_calibration_error(
        torch.tensor(rows.confidence), torch.tensor(rows.right).long(), n_bins=BINS, norm="l1"
    )
    assert calibration_error(rows).value == approx(float(expected), terms=1000)


def test_the_bins_are_those_of_scikit_learn() -> None:
    calibration = pytest.importorskip("sklearn.calibration")
    rows = draw_rows(200, None)
    right, confidence = calibration.calibration_curve(rows.right, rows.confidence, n_bins=BINS)
    bins = reliability_bins(rows)
    assert [b["right"]["value"] for b in bins] == approx(right.tolist(), terms=1000)
    assert [b["confidence"] for b in bins] == approx(confidence.tolist(), terms=1000)


def test_a_calibrated_model_may_have_no_error_and_an_overconfident_one_has_its_error_in_the_interval() -> None:
    calibrated = calibration_error(draw_rows(100, None))
    assert calibrated.value > calibrated.low == 0.0
    # |accuracy - confidence| of uniform confidences: the mean of |0.2 - u| is 0.34 (0.02 + 0.32)
    wrong = calibration_error(draw_rows(100, 0.2))
    assert 0 < wrong.low < 0.34 < wrong.high < 0.5


def test_certain_and_right_answers_of_few_images_do_not_prove_calibration() -> None:
    error = calibration_error(confident_rows([1.0] * 10, [1] * 10))
    assert error.value == error.low == 0.0 and error.high > 0.1


def test_one_image_has_the_whole_interval() -> None:
    rows = confident_rows([0.9, 0.2], [1, 0], [0, 0])
    assert (calibration_error(rows).low, calibration_error(rows).high) == (0.0, 1.0)
    assert (overconfidence(rows).low, overconfidence(rows).high) == (-1.0, 1.0)
    assert (area_under_risk_coverage(rows).low, area_under_risk_coverage(rows).high) == (0.0, 1.0)


def test_the_area_under_the_risk_coverage_curve_by_hand() -> None:
    rows = confident_rows([0.7, 0.9, 0.8], [1, 1, 0])
    assert area_under_risk_coverage(rows).value == approx((0 + 1 / 2 + 1 / 3) / 3)
    points = risk_coverage(rows)
    assert points[-1] == {"coverage": 1.0, "risk": 1 / 3, "confidence": 0.7}
    assert (points[2]["risk"], points[2]["confidence"]) == (0.0, 0.9)


def test_rows_of_equal_confidence_have_their_mean_risk_in_any_order() -> None:
    for right in ([1, 1, 0, 0], [0, 0, 1, 1]):
        rows = confident_rows([0.5] * 4, right)
        assert area_under_risk_coverage(rows).value == 0.5
        assert {point["risk"] for point in risk_coverage(rows)} == {0.5}


def test_the_area_of_uninformative_confidence_is_the_error_rate() -> None:
    area = area_under_risk_coverage(draw_rows(1_000, 0.7))
    assert abs(area.value - 0.3) < sampling_error(1.0, 5_000)
    assert area.low < 0.3 < area.high


EXAMPLES = [Example(str(n), (str(n // 2),), "?", "yes", "closed" if n < 4 else "open", "test") for n in range(8)]
SCORES = [math.log(0.9), math.log(0.8), math.log(0.3), None, 0.1, -math.inf, math.log(0.6), math.log(0.5)]
PREDICTIONS = [Prediction(e.id, "yes", score) for e, score in zip(EXAMPLES, SCORES, strict=True)]
RIGHT = dict.fromkeys("0146", 1.0) | dict.fromkeys("2357", 0.0)


def test_the_report_is_by_kind_and_counts_rows_without_confidence() -> None:
    report = confidence_report(EXAMPLES, PREDICTIONS, RIGHT)
    assert report is not None and list(report) == ["all", "closed", "open"]
    assert (report["all"]["rows"], report["all"]["images"], report["all"]["without_confidence"]) == (6, 4, 2)
    assert report["closed"]["rows"] == 3 and report["open"]["mean_confidence"] == approx((1 + 0.6 + 0.5) / 3)
    assert confidence_report(EXAMPLES, [Prediction(e.id, "yes") for e in EXAMPLES], RIGHT) is None


def test_answers_below_the_threshold_or_without_confidence_are_abstained() -> None:
    report = abstention_report(EXAMPLES, PREDICTIONS, RIGHT, 0.6)
    assert (report["abstained"], report["coverage"]["value"]) == (4, 0.5)
    assert (report["right_if_answered"]["value"], report["right_if_abstained"]["value"]) == (1.0, 0.0)
    reports = abstention_report(EXAMPLES, PREDICTIONS, None, 0.6)
    assert reports["abstained"] == 4 and "right_if_answered" not in reports
    assert abstention_report(EXAMPLES, PREDICTIONS, RIGHT, 0.0)["abstained"] == 0
