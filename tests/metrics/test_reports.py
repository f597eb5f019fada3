"""Scores of example reports that were computed by hand."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from normtune.data.records import Example
from normtune.errors import InputError
from normtune.metrics.reports import (
    NORMALISATIONS,
    normalisations_for,
    normalise_report,
    report_metrics,
    report_table,
    summarise_reports,
    text_pairs,
)
from tests.support.tolerance import approx

REFERENCE = "The heart is normal. No pleural effusion."
PREDICTION = "The heart is enlarged. No effusion."


def report(id: str, text: str, image: str) -> Example:
    return Example(id, (image,), "", text, "report", "test")


def test_r2gen_normalisation_by_hand() -> None:
    text = 'Heart:  normal.. 1. No "effusion". 2. A 2.5 cm nodule, <new>; [left]'
    assert normalise_report(text, "r2gen-iu") == "heart normal . no effusion . a 25 cm nodule new left ."
    assert normalise_report("____ year\nold.... clear", "r2gen-mimic") == "year old . clear ."
    assert normalise_report(REFERENCE, "none") == REFERENCE


# An independent implementation of R2Gen's normalisation, with one regular expression per step.
def r2gen_reference(text: str) -> str:
    text = re.sub(r"\.{2,8}", lambda dots: "." * (-(-len(dots[0]) // 8)), text)
    text = text.replace("1. ", "")
    for lead in (". ", " "):
        for number in "2345":
            text = text.replace(f"{lead}{number}. ", ". ")
    sentences = [re.sub(r"[^a-z0-9 #$|`~\n-]", "", s.strip()) for s in text.strip().lower().split(". ")]
    return " ".join((" . ".join(sentences) + " .").split())


@given(st.text(alphabet='aB 1.25,;:"<-/\n#', max_size=40).filter(lambda text: "........." not in text))
def test_r2gen_normalisation_equals_its_description(text: str) -> None:
    assert normalise_report(text, "r2gen-iu") == r2gen_reference(text)


@given(st.lists(st.sampled_from(["heart", "normal", "no", "Effusion.", "seen,", "LUNGS"]), min_size=1))
def test_normalising_twice_changes_nothing(words: list[str]) -> None:
    once = normalise_report(" ".join(words), "r2gen-iu")
    assert normalise_report(once, "r2gen-iu") == once


def test_an_unknown_normalisation_suggests_the_nearest_name() -> None:
    with pytest.raises(InputError, match="did you mean 'r2gen-iu'"):
        normalise_report("x", "r2gen-ui")
    assert normalisations_for("MIMIC-CXR") == ("none", "r2gen-mimic")
    assert normalisations_for("openi") == ("none", "r2gen-iu")


def test_each_metric_on_an_example_report() -> None:
    """6 predicted words, 7 reference words, 5 in common and in the same order."""
    scores = {n: m.overall() for n, m in report_metrics({"a": (PREDICTION, REFERENCE), "b": ("x", "y z")}).items()}
    row_scores = {
        n: m.by_row()["a"] for n, m in report_metrics({"a": (PREDICTION, REFERENCE), "b": ("x", "y z")}).items()
    }
    assert row_scores["bleu_1"] == pytest.approx(5 / 6 * 2.718281828459045 ** (1 - 7 / 6))
    assert row_scores["rouge_l_f1"] == pytest.approx(2 * (5 / 6) * (5 / 7) / (5 / 6 + 5 / 7))
    assert scores["rouge_l_f1"] == pytest.approx(row_scores["rouge_l_f1"] / 2)
    assert scores["bleu_1"] == approx(5 / 7 * 2.718281828459045 ** (1 - 9 / 7))
    precision, recall = 5 / 6, 5 / 7  # METEOR: the, heart, is | no | effusion
    mean = precision * recall / (0.9 * precision + 0.1 * recall)
    name = next(name for name in row_scores if name.startswith("meteor"))
    assert row_scores[name] == pytest.approx(mean * (1 - 0.5 * (3 / 5) ** 3))
    assert row_scores["cider_d"] < row_scores["cider"] < 10
    assert 0 < scores["sacrebleu"] < 1


def test_meteor_matches_words_with_the_same_stem() -> None:
    metrics = report_metrics({"a": ("effusions", "effusion")})
    metric = next(metric for name, metric in metrics.items() if name.startswith("meteor"))
    assert metric.overall() == pytest.approx(0.5)  # one match is one chunk: the penalty is one half


def test_equal_reports_have_the_highest_score() -> None:
    texts = {"a": (REFERENCE, REFERENCE), "b": ("Lungs are clear today.", "Lungs are clear today.")}
    for normalisation in NORMALISATIONS:
        scores = {name: metric.overall() for name, metric in report_metrics(texts, normalisation=normalisation).items()}
        for name in ("bleu_1", "bleu_4", "sacrebleu", "rouge_l", "rouge_l_f1"):
            assert scores[name] == pytest.approx(1.0), (normalisation, name)
        assert scores["cider_d"] == pytest.approx(10.0)


def test_an_empty_prediction_scores_zero() -> None:
    metrics = report_metrics({"a": ("", REFERENCE), "b": ("", PREDICTION)})
    assert all(metric.overall() == approx(0.0) for metric in metrics.values())


def test_scores_have_names_with_normalisations_intervals_and_counts() -> None:
    examples = [report("1", REFERENCE, "x"), report("2", PREDICTION, "x"), report("3", "Clear lungs.", "y")]
    predictions = {"3": "Clear lungs.", "1": REFERENCE, "2": "Nothing to see."}
    metrics = summarise_reports(report_table(text_pairs(examples, predictions)), examples)
    assert {"bleu_4/none", "bleu_4/r2gen-iu", "cider_d/none", "findings_rules_f1_micro_14"} <= set(metrics)
    bleu = metrics["bleu_1/none"]
    assert bleu.low <= bleu.value <= bleu.high and (bleu.rows, bleu.images) == (3, 2)
    with pytest.raises(InputError, match="1 examples have no prediction, first id '1'"):
        text_pairs(examples, {"2": "", "3": ""})


def test_reports_without_any_finding_have_no_label_f1() -> None:
    metrics = report_table({"1": ("Pneumonia.", "A round thing.")})
    assert not any(name.startswith("findings_rules") for name in metrics)


def test_chinese_reports_are_compared_by_character() -> None:
    report, near = "双肺纹理清晰，心影大小正常。", "双肺纹理清楚，心影大小正常。"
    names = ("bleu_4", "rouge_l", "rouge_l_f1", "sacrebleu")
    for normalisation in ("none", "r2gen-iu"):
        metrics = report_metrics({"1": (report, report), "2": (near, near)}, normalisation=normalisation)
        assert {name: metrics[name].overall() for name in names} == dict.fromkeys(names, approx(1.0))
        close = report_metrics({"1": (near, report), "2": (near, near)}, normalisation=normalisation)
        assert all(0.7 < close[name].overall() < 1.0 for name in names)
