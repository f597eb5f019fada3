from __future__ import annotations

import random
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from normtune.data.records import Example, Kind, Prediction
from normtune.errors import InputError
from normtune.metrics.answers import (
    METRICS,
    closed_substring,
    exact_match,
    llava_med_recall,
    score_rows,
    score_vqa,
    token_f1,
    token_recall,
)
from normtune.metrics.normalisation import normalise, tokens
from normtune.metrics.statistics.intervals import mean_interval

WORDS = ["left", "lung", "right", "kidney", "no", "yes", "normal", "the", "a", "2", "two", "x-ray", "1,000", "dont."]
texts = st.lists(st.sampled_from(WORDS), max_size=6).map(" ".join)


def example(id: str, answer: str, kind: Kind = "open", image: str = "image") -> Example:
    return Example(id, (image,), "question", answer, kind, "test")


# An independent implementation of LLaVA-Med's protocol from its description, with sets and loops.
def llava_med_reference(prediction: str, reference: str) -> float:
    def words(text: str) -> list[str]:
        for _ in range(2):
            source = text = text.lower()
            for mark in ';/[]"{}()=+\\_-><@`,?!':
                touches_blank = mark + " " in source or " " + mark in source
                text = text.replace(mark, "" if touches_blank or re.search(r"\d,\d", source) else " ")
            text = re.sub(r"\.(?!\d)", "", text, count=32)
            numbers = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
            words_left = []
            for word in text.split():
                if word == "none":
                    word = "0"
                if word in numbers:
                    word = str(numbers.index(word))
                if word in ("a", "an", "the"):
                    continue
                words_left.append({"dont": "don't"}.get(word, word))
            text = " ".join(words_left).replace(",", "")
        return text.split()

    predicted, expected = words(prediction), words(reference)
    true_positive = false_negative = 0
    for word in set(predicted) | set(expected):
        if word in predicted and word in expected:
            true_positive += predicted.count(word)
        elif word in expected:
            false_negative += expected.count(word)
    return true_positive / (true_positive + false_negative) if true_positive else 0.0


# The formula of SQuAD's official evaluation, on tokens.
def squad_f1(prediction: str, reference: str) -> float:
    predicted, expected = prediction.split(), reference.split()
    if not predicted or not expected:
        return float(predicted == expected)
    same = sum((Counter(predicted) & Counter(expected)).values())
    if same == 0:
        return 0.0
    precision, recall = same / len(predicted), same / len(expected)
    return 2 * precision * recall / (precision + recall)


@pytest.mark.parametrize(
    ("prediction", "reference", "expected_recall", "expected_f1", "expected_llava_med"),
    [
        ("left lung", "left lung", 1, 1, 1),
        ("lung", "left lung", 1 / 2, 2 / 3, 1 / 2),
        ("left left left", "left kidney", 1 / 2, 2 / 5, 3 / 4),  # repeated words raise only LLaVA-Med's recall
        ("left and right lung", "left lung, right lung", 3 / 4, 3 / 4, 1),
        ("heart", "left lung", 0, 0, 0),
        ("", "left lung", 0, 0, 0),
        ("left", "", 0, 0, 0),
        ("", "", 1, 1, 0),
    ],
)
def test_open_scores_by_hand(
    prediction: str, reference: str, expected_recall: float, expected_f1: float, expected_llava_med: float
) -> None:
    normalised_prediction, normalised_reference = normalise(prediction), normalise(reference)
    assert token_recall(normalised_prediction, normalised_reference) == pytest.approx(expected_recall)
    assert token_f1(normalised_prediction, normalised_reference) == pytest.approx(expected_f1)
    assert llava_med_recall(prediction, reference) == pytest.approx(expected_llava_med)


@given(texts, texts)
def test_f1_is_squads(prediction: str, reference: str) -> None:
    assert token_f1(prediction, reference) == pytest.approx(squad_f1(prediction, reference))


@given(texts, texts)
def test_llava_med_recall_is_its_protocol(prediction: str, reference: str) -> None:
    assert llava_med_recall(prediction, reference) == pytest.approx(llava_med_reference(prediction, reference))


@given(texts, texts)
def test_open_scores_are_bounded_and_ordered(prediction: str, reference: str) -> None:
    for score in (exact_match, token_recall, token_f1):
        assert 0 <= score(prediction, reference) <= 1
        assert score(reference, reference) == 1
    assert exact_match(prediction, reference) <= token_f1(prediction, reference)
    assert exact_match(prediction, reference) <= token_recall(prediction, reference)
    assert 0 <= llava_med_recall(prediction, reference) <= 1
    overlap = len(set(tokens(prediction)) & set(tokens(reference)))
    assert (token_recall(prediction, reference) > 0) == (overlap > 0) or not prediction or not reference


@given(texts, texts, st.randoms(use_true_random=False))
def test_word_order_changes_neither_recall_nor_f1(prediction: str, reference: str, rng: random.Random) -> None:
    words = prediction.split()
    rng.shuffle(words)
    shuffled = " ".join(words)
    assert token_recall(shuffled, reference) == token_recall(prediction, reference)
    assert token_f1(shuffled, reference) == token_f1(prediction, reference)


def test_closed_substring_counts_no_in_normal() -> None:
    assert closed_substring("It looks normal", "No") == 1
    assert closed_substring("It looks fine", "No") == 0
    assert closed_substring("Yes, it does.", "yes") == 1


ROWS = [
    example("c1", "Yes", "closed", "i1"),
    example("c2", "No", "closed", "i1"),
    example("c3", "Left", "closed", "i2"),
    example("o1", "left lung", "open", "i2"),
    example("o2", "yes", "open", "i3"),  # labelled open, although its answer is yes
]
ANSWERS = {"c1": "yes.", "c2": "normal", "c3": "left side", "o1": "The lung", "o2": "yes"}


def test_each_metric_scores_the_rows_of_its_table() -> None:
    table = score_rows(ROWS, ANSWERS)
    assert set(table) == set(METRICS)
    assert table["closed_label"] == {"c1": 1, "c2": 0, "c3": 0}
    assert table["closed_yes_no"] == {"c1": 1, "c2": 0, "o2": 1}
    assert table["closed_substring"] == {"c1": 1, "c2": 1, "c3": 1}
    assert table["open_exact"] == {"o1": 0, "o2": 1}
    assert table["open_not_yes_no"] == {"c3": 0, "o1": 0}
    assert table["open_recall"] == {"o1": 0.5, "o2": 1}
    assert table["open_f1"] == {"o1": pytest.approx(2 / 3), "o2": 1}
    assert table["open_recall_llava_med"] == {"o1": 0.5, "o2": 1}
    assert table["global_exact"] == {"c1": 1, "c2": 0, "c3": 0, "o1": 0, "o2": 1}


def test_metrics_are_means_with_row_and_image_counts() -> None:
    metrics = score_vqa(ROWS, ANSWERS)
    closed = metrics["closed_label"]
    assert closed.value == pytest.approx(1 / 3) and (closed.rows, closed.images) == (3, 2)
    expected = mean_interval(np.array([1.0, 0.0]), np.array([1.0, 0.0]), np.array([2.0, 1.0]))  # images i1 and i2
    assert (closed.low, closed.high) == (expected.low, expected.high)
    assert metrics["global_exact"].images == 3


def test_a_metric_without_rows_is_omitted() -> None:
    metrics = score_vqa([example("o", "lung")], {"o": "lung"})
    assert not any(name.startswith("closed") for name in metrics)


def test_the_order_of_predictions_and_examples_does_not_matter() -> None:
    predictions = [Prediction(id, text) for id, text in ANSWERS.items()]
    backwards = score_vqa(ROWS, predictions[::-1])
    assert backwards == score_vqa(ROWS, ANSWERS)
    assert score_rows(ROWS[::-1], ANSWERS) == score_rows(ROWS, ANSWERS)


def test_normalisation_can_be_turned_off() -> None:
    strict = score_rows([example("o", "Lung")], {"o": "lung"}, normalisation="none")
    assert strict["open_exact"] == {"o": 0.0}


@pytest.mark.parametrize(
    ("predictions", "message"),
    [
        ({"c1": "yes"}, r"4 examples have no prediction, first id 'c2'"),
        ({**ANSWERS, "zz": "yes"}, r"1 predictions have no example, first id 'zz'"),
        ([Prediction("c1", "a"), Prediction("c1", "b")], r"1 ids occur more than once in the predictions, first 'c1'"),
    ],
)
def test_ids_must_match_one_to_one(predictions: dict[str, str] | list[Prediction], message: str) -> None:
    with pytest.raises(InputError, match=message):
        score_vqa(ROWS, predictions)


def test_example_ids_must_be_unique() -> None:
    with pytest.raises(InputError, match="1 ids occur more than once in the examples"):
        score_vqa([example("o", "lung"), example("o", "heart")], {"o": "lung"})


def test_reports_are_refused() -> None:
    with pytest.raises(InputError, match="example 'r' asks for a report"):
        score_vqa([example("r", "No findings.", "report")], {"r": "none"})


@pytest.mark.parametrize("normalisation", ["vqa", "llava-med"])
def test_an_option_that_the_normalisation_empties_is_compared_as_it_is(normalisation: str) -> None:
    rows = [example(str(number), option, "closed") for number, option in enumerate("ABCD")]
    always = {letter: score_vqa(rows, dict.fromkeys("0123", letter), normalisation=normalisation) for letter in "AD"}
    for metrics in always.values():
        assert {metrics[name].value for name in ("closed_label", "closed_substring", "global_exact")} == {0.25}
    empty = score_vqa(rows, dict.fromkeys("0123", ""), normalisation=normalisation)
    assert {empty[name].value for name in ("closed_label", "closed_substring", "global_exact")} == {0.0}
    assert score_vqa(rows[:1], {"0": "(a)."}, normalisation=normalisation)["global_exact"].value == 1.0
    assert closed_substring("aortic stenosis", "A") == 0.0
    assert closed_substring("Option A.", "a") == 1.0


def test_a_reference_yes_with_a_full_stop_is_a_yes() -> None:
    rows = [example("1", "Yes.", "closed"), example("2", "no", "closed"), example("3", "nodule")]
    metrics = score_vqa(rows, {"1": "yes", "2": "yes", "3": "nodule"})
    assert (metrics["closed_yes_no"].value, metrics["closed_yes_no"].rows) == (0.5, 2)
    assert (metrics["open_not_yes_no"].value, metrics["open_not_yes_no"].rows) == (1.0, 1)


@pytest.mark.parametrize(
    ("prediction", "reference"),
    [("me\u0301niscus", "méniscus"), ("\ufb01brosis", "fibrosis"), ("Crohn\u2019s", "Crohn's"), ("ＣＴ", "ct")],
)
def test_the_unicode_normalisation_unifies_texts_that_look_the_same(prediction: str, reference: str) -> None:
    assert normalise(prediction, "unicode") == normalise(reference, "unicode")
    assert normalise(prediction) != normalise(reference)
