"""Options are read from generated answers, and choices are scored."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from normtune.data.examples import Example, option_letter
from normtune.data.records import ChoiceResult, Prediction
from normtune.metrics.answers import score_rows, score_vqa
from normtune.metrics.choices import chosen_text, parse_choice, rotated_options

OPTIONS = ("left lung", "lung", "liver", "a mass of the heart")

words = st.text("bcdefghijklmnop", min_size=2, max_size=6)
option_lists = st.lists(st.lists(words, min_size=1, max_size=3).map(" ".join), min_size=2, max_size=26, unique=True)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("B", 1),
        (" b. ", 1),
        ("(B)", 1),
        ("[B]:", 1),
        ("B. lung", 1),
        ("(b) lung", 1),
        ("C) because of its size", 2),
        ("The answer is B", 1),
        ("The correct answer is: (C).", 2),
        ("Answer: D", 3),
        ("**Answer:** D", 3),
        ("I would choose option C here", 2),
        ("The answer is A because of its size", 0),
        ("Lung.", 1),
        ("LEFT  LUNG", 0),
        ("It is the left lung.", 0),
        ("A mass of the heart", 3),
        ("A fracture", None),
        ("The answer is a fracture", None),
        ("The lung or the liver", None),
        ("E", None),
        ("", None),
        ("The answer is B or C", None),
        ("Both B and C", None),
        ("I think B", 1),
        ("A lungfish", None),
    ],
)
def test_the_option_that_a_text_names(text: str, place: int | None) -> None:
    assert parse_choice(text, OPTIONS) == place


def test_an_options_text_counts_before_a_label_that_it_begins_with() -> None:
    assert parse_choice("E. coli", ("S. aureus", "E. coli")) == 1
    assert parse_choice("B", ("B", "A")) == 1  # alone, a letter is a letter
    assert chosen_text("B", ("B", "A")) == "B"  # but the text of a prediction is that of an option


@given(option_lists, st.data())
def test_every_usual_form_of_an_answer_is_read(options: list[str], data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(options) - 1))
    letter, text = option_letter(place), options[place]
    forms = (
        "{l}",
        "({l})",
        "{l}.",
        "{l}) {t}",
        "({l}) {t}",
        "{l}. {t}",
        "The answer is {l}.",
        "Answer: ({l})",
        "{t}",
        "{t}.",
    )
    for form in forms:
        assert parse_choice(form.format(l=letter, t=text), options) == place


@given(st.text(max_size=40), st.lists(st.text(min_size=1, max_size=8), min_size=2, max_size=5))
def test_any_text_names_one_option_or_none(text: str, options: list[str]) -> None:
    place = parse_choice(text, options)
    assert place is None or 0 <= place < len(options)


def choice(id: str, answer: str, options: tuple[str, ...] = OPTIONS) -> Example:
    return Example(id, (id[0],), "Which organ?", answer, "choice", "test", options=options)


def test_each_way_to_choose_has_its_own_accuracy() -> None:
    examples = [choice("a1", "lung"), choice("b1", "liver"), Example("c1", ("c",), "Is it?", "no", "closed", "test")]
    predictions = [
        Prediction("a1", "lung", choice=ChoiceResult({"letter": (1,), "generated": (2,)})),
        Prediction("b1", "lung", choice=ChoiceResult({"letter": (1,), "generated": (None,)})),
        Prediction("c1", "no"),
    ]
    scores = score_rows(examples, predictions)
    assert scores["choice_accuracy"] == scores["choice_accuracy_letter"] == {"a1": 1.0, "b1": 0.0}
    assert scores["choice_accuracy_generated"] == {"a1": 0.0, "b1": 0.0}
    assert scores["global_exact"] == {"a1": 1.0, "b1": 0.0, "c1": 1.0}
    assert scores["closed_yes_no"] == {"c1": 1.0} and "open_not_yes_no" not in scores
    assert "choice_accuracy_text" not in scores


def test_texts_are_scored_by_the_option_that_they_name() -> None:
    metrics = score_vqa([choice("a1", "lung"), choice("a2", "liver")], {"a1": "The answer is B", "a2": "lung"})
    assert (metrics["choice_accuracy"].value, metrics["choice_accuracy"].images) == (0.5, 1)


def test_an_option_is_right_if_its_text_is_the_answer() -> None:
    repeated = choice("a1", "lung", ("liver", "lung", "lung"))
    scores = score_rows([repeated], [Prediction("a1", "lung", choice=ChoiceResult({"letter": (2,)}))])
    assert scores["choice_accuracy_letter"] == {"a1": 1.0}


def test_rotations_move_each_option_to_each_position() -> None:
    rotated = [rotated_options("abc", rotation) for rotation in range(3)]
    assert rotated == [tuple("abc"), tuple("cab"), tuple("bca")]
