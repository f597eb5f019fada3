from __future__ import annotations

import pytest

from normtune.data.records import Example
from normtune.errors import InputError
from normtune.evaluation.baselines import QuestionOnly


def row(question: str, answer: str, id: str = "x") -> Example:
    return Example(id, ("image",), question, answer, "open", "train")


TRAIN = [
    row("Is the lung normal?", "Yes"),
    row("is the lung normal", "yes"),
    row("Is the lung normal?", "No"),
    row("Is the heart large?", "No"),
    row("Is the heart  large?", "no."),
    row("Is the liver there?", "No"),
    row("What organ is this?", "Lung"),
    row("What organ is that?", "Lung"),
    row("Which side?", "b"),
    row("Which side?", "a side"),
]


def answer(question: str) -> str:
    return QuestionOnly.fit(TRAIN).predict([row(question, "unused")])[0].text


def test_the_same_question_gets_its_most_common_answer() -> None:
    assert answer("IS THE LUNG NORMAL") == "Yes"  # "Yes" and "yes" are one answer; "Yes" sorts first


def test_a_new_question_falls_back_to_its_first_two_words() -> None:
    assert answer("What organ fails?") == "Lung"
    assert answer("Is the spleen normal?") == "No"


def test_an_unknown_start_falls_back_to_all_rows() -> None:
    assert answer("Where?") == "No"


def test_ties_go_to_the_alphabetically_first_form() -> None:
    assert answer("Which side?") == "b"  # "a side" normalises to "side"
    assert QuestionOnly.fit(TRAIN[::-1]) == QuestionOnly.fit(TRAIN)


def test_predictions_have_the_ids_of_the_examples() -> None:
    predictions = QuestionOnly.fit(TRAIN).predict([row("Which side?", "", "7"), row("Where?", "", "3")])
    assert [prediction.id for prediction in predictions] == ["7", "3"]


def test_no_training_rows_is_an_input_error() -> None:
    with pytest.raises(InputError, match="needs training rows"):
        QuestionOnly.fit([])
