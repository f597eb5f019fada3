from __future__ import annotations

import math

import numpy as np
import pytest

from normtune.data.records import ChoiceResult, Example, Prediction
from normtune.metrics.conformal import LEVELS, conformal_report, conformal_set, conformal_text, conformal_threshold
from tests.support.tolerance import approx, sampling_error


def test_the_threshold_of_ten_images_by_hand() -> None:
    scores = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
    images = [str(n) for n in range(9)]
    assert conformal_threshold(scores, images, 0.9) == 0.9  # weight 1/10 each: the ninth reaches 0.9
    assert conformal_threshold(scores, images, 0.8) == 0.8
    assert conformal_threshold(scores[:8], images[:8], 0.9) == math.inf


def test_the_questions_of_an_image_share_its_weight() -> None:
    """Three images: weights 1/4, of which "a" gives 1/8 to each of its questions."""
    scores = np.array([0.1, 0.2, 0.3, 0.4])
    assert conformal_threshold(scores, ["a", "b", "c", "a"], 0.6) == 0.3  # 1/8 + 1/4 + 1/4
    assert conformal_threshold(scores, ["a", "b", "c", "d"], 0.6) == 0.3  # 1/5 each
    assert conformal_threshold(scores, ["a", "a", "a", "b"], 0.6) == 0.4  # 3 x 1/9 + 1/3


@pytest.mark.parametrize("level", LEVELS)
def test_sets_of_new_images_contain_the_answer_as_often_as_stated(level: float) -> None:
    draw, images, repeats = np.random.default_rng(0), 30, 2_000
    covered = []
    for _ in range(repeats):
        level_of_image = draw.random(images + 1)  # questions of one image are alike
        scores = np.clip(level_of_image[:, None] + 0.2 * draw.standard_normal((images + 1, 3)), 0, 1)
        clusters = [str(n) for n in np.repeat(np.arange(images), 3)]
        covered.append(scores[-1, 0] <= conformal_threshold(scores[:-1].ravel(), clusters, level))
    assert np.mean(covered) > level - sampling_error(math.sqrt(level * (1 - level)), repeats)


def question(number: int, answer: str) -> Example:
    return Example(f"q{number}", (f"{number // 2}",), "?", answer, "closed", "test")


def test_the_report_counts_sets_and_questions_without_a_candidate_as_answer() -> None:
    calibration = [question(n, "Yes.") for n in range(40)] + [question(40, "left")]
    shares = [{"yes": 1 - n / 100, "no": n / 100} for n in range(41)]
    fitted = [Prediction(e.id, "yes", shares=s) for e, s in zip(calibration, shares, strict=True)]
    test = [question(n, answer) for n, answer in enumerate(["yes", "no", "no", "both"])] + [question(9, "open")]
    answered = [
        Prediction(e.id, "yes", shares={"yes": s, "no": 1 - s})
        for e, s in zip(test[:4], (0.9, 0.7, 0.1, 0.5), strict=True)
    ]
    report = conformal_report((calibration, fitted), (test, [*answered, Prediction("q9", "lung")]))
    assert report is not None
    assert report["calibration"] == {"rows": 40, "images": 20, "left_out": 1}
    assert report["test"] == {"rows": 3, "images": 2, "left_out": 1}
    ninety = report["levels"]["0.9"]
    assert ninety["threshold"] == approx(0.37)  # the 38th of 40 questions: 19 of 21 images
    assert ninety["coverage"]["value"] == approx(2 / 3) and ninety["sizes"] == {"1": 3}
    assert "contain the answer, 1.00 candidates on average; 3 rows" in conformal_text({"conformal": report})[0]
    assert conformal_set(shares[40], 0.6) == ["yes", "no"] and conformal_set(shares[40], 0.3) == []
    few = conformal_report((calibration[:10], fitted[:10]), (test[:3], answered[:3]))
    assert few is not None and few["levels"]["0.9"]["threshold"] is None and few["levels"]["0.9"]["mean_size"] == 2
    assert conformal_report((test[4:], [Prediction("q9", "lung")]), (test[:3], answered[:3])) is None


def test_options_have_the_shares_of_their_likelihoods() -> None:
    """The likelihoods 1, 1/2 and 0 are shares of 2/3, 1/3 and 0."""
    scores = {"letter": (0.0, math.log(0.5), None), "text": (0.0, 0.0, 0.0)}
    options = ("lung", "heart", "liver")
    examples = [Example(f"q{n}", (str(n),), "?", options[n % 2], "choice", "test", options=options) for n in range(40)]
    predictions = [Prediction(e.id, "lung", -0.4, None, ChoiceResult({"letter": (0,)}, scores)) for e in examples]
    report = conformal_report((examples[:20], predictions[:20]), (examples[20:], predictions[20:]))
    assert report is not None and report["levels"]["0.9"]["threshold"] == approx(2 / 3)
    assert report["levels"]["0.9"]["sizes"] == {"2": 20} and report["levels"]["0.9"]["coverage"]["value"] == 1.0
    none = ChoiceResult({"letter": (0,)}, {"letter": (None, None, None)})
    assert conformal_report((examples[:1], [Prediction("q0", "lung", choice=none)]), (examples, predictions)) is None
