"""Made-up reports, scored by hand."""

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
    score_report,
)

MEANT = "The heart is normal. No pleural effusion."
SAID = "The heart is enlarged. No effusion."


def report(id: str, text: str, image: str) -> Example:
    return Example(id, (image,), "", text, "report", "test")


def test_r2gens_cleaning_by_hand() -> None:
    text = 'Heart:  normal.. 1. No "effusion". 2. A 2.5 cm nodule, <new>; [left]'
    assert normalise_report(text, "r2gen-iu") == "heart normal . no effusion . a 25 cm nodule new left ."
    assert normalise_report("____ year\nold.... clear", "r2gen-mimic") == "year old . clear ."
    assert normalise_report(MEANT, "none") == MEANT


# R2Gen's cleaning once more, from its description, with one regular expression for each step.
def r2gen_again(text: str) -> str:
    text = re.sub(r"\.{2,8}", lambda dots: "." * (-(-len(dots[0]) // 8)), text)
    text = text.replace("1. ", "")
    for lead in (". ", " "):
        for number in "2345":
            text = text.replace(f"{lead}{number}. ", ". ")
    sentences = [re.sub(r"[^a-z0-9 #$|`~\n-]", "", s.strip()) for s in text.strip().lower().split(". ")]
    return " ".join((" . ".join(sentences) + " .").split())


@given(st.text(alphabet='aB 1.25,;:"<-/\n#', max_size=40).filter(lambda text: "........." not in text))
def test_r2gens_cleaning_equals_its_description(text: str) -> None:
    assert normalise_report(text, "r2gen-iu") == r2gen_again(text)


@given(st.lists(st.sampled_from(["heart", "normal", "no", "Effusion.", "seen,", "LUNGS"]), min_size=1))
def test_cleaning_twice_changes_nothing(words: list[str]) -> None:
    once = normalise_report(" ".join(words), "r2gen-iu")
    assert normalise_report(once, "r2gen-iu") == once


def test_an_unknown_normalisation_is_refused_with_a_guess() -> None:
    with pytest.raises(InputError, match="did you mean 'r2gen-iu'"):
        normalise_report("x", "r2gen-ui")
    assert normalisations_for("MIMIC-CXR") == ("none", "r2gen-mimic")
    assert normalisations_for("openi") == ("none", "r2gen-iu")


def test_each_metric_on_a_made_up_report() -> None:
    """6 words said, 7 meant, 5 in common and in one order."""
    found = {n: m.overall() for n, m in report_metrics({"a": (SAID, MEANT), "b": ("x", "y z")}).items()}
    rows = {n: m.by_row()["a"] for n, m in report_metrics({"a": (SAID, MEANT), "b": ("x", "y z")}).items()}
    assert rows["bleu_1"] == pytest.approx(5 / 6 * 2.718281828459045 ** (1 - 7 / 6))
    assert rows["rouge_l_f1"] == pytest.approx(2 * (5 / 6) * (5 / 7) / (5 / 6 + 5 / 7))
    assert found["rouge_l_f1"] == pytest.approx(rows["rouge_l_f1"] / 2)
    assert found["bleu_1"] == pytest.approx(5 / 7 * 2.718281828459045 ** (1 - 9 / 7), rel=1e-6)
    precision, recall = 5 / 6, 5 / 7  # METEOR: the, heart, is | no | effusion
    mean = precision * recall / (0.9 * precision + 0.1 * recall)
    name = next(name for name in rows if name.startswith("meteor"))
    assert rows[name] == pytest.approx(mean * (1 - 0.5 * (3 / 5) ** 3))
    assert rows["cider_d"] < rows["cider"] < 10
    assert 0 < found["sacrebleu"] < 1


def test_meteor_counts_words_of_one_stem() -> None:
    found = report_metrics({"a": ("effusions", "effusion")})
    metric = next(metric for name, metric in found.items() if name.startswith("meteor"))
    assert metric.overall() == pytest.approx(0.5)  # one match is one chunk: half is taken off


def test_the_same_report_scores_full_marks() -> None:
    texts = {"a": (MEANT, MEANT), "b": ("Lungs are clear today.", "Lungs are clear today.")}
    for how in NORMALISATIONS:
        found = {name: metric.overall() for name, metric in report_metrics(texts, normalisation=how).items()}
        for name in ("bleu_1", "bleu_4", "sacrebleu", "rouge_l", "rouge_l_f1"):
            assert found[name] == pytest.approx(1.0), (how, name)
        assert found["cider_d"] == pytest.approx(10.0)


def test_an_empty_prediction_scores_nothing() -> None:
    found = report_metrics({"a": ("", MEANT), "b": ("", SAID)})
    assert all(metric.overall() == pytest.approx(0.0, abs=1e-6) for metric in found.values())


def test_scores_carry_names_normalisations_intervals_and_images() -> None:
    examples = [report("1", MEANT, "x"), report("2", SAID, "x"), report("3", "Clear lungs.", "y")]
    predictions = {"3": "Clear lungs.", "1": MEANT, "2": "Nothing to see."}
    found = score_report(examples, predictions, resamples=50)
    assert {"bleu_4/none", "bleu_4/r2gen-iu", "cider_d/none", "findings_rules_f1_micro_14"} <= set(found)
    bleu = found["bleu_1/none"]
    assert bleu.low <= bleu.value <= bleu.high and (bleu.rows, bleu.images) == (3, 2)
    with pytest.raises(InputError, match="1 examples have no prediction, first id '1'"):
        score_report(examples, {"2": "", "3": ""})


def test_reports_of_no_finding_at_all_get_no_label_f1() -> None:
    found = score_report([report("1", "A round thing.", "x")], {"1": "Pneumonia."}, resamples=5)
    assert not any(name.startswith("findings_rules") for name in found)
