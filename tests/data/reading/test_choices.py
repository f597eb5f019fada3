"""Options and answers of multiple-choice questions, in the forms that tables have them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from normtune.data.reading.choices import read_options, right_option, right_options, without_options
from normtune.data.reading.columns import find_columns, parse_columns
from normtune.data.reading.tables import RowError

FOUR = ("lung", "heart", "liver", "spleen")


@pytest.mark.parametrize(
    "cells",
    [
        [list(FOUR)],
        [tuple(FOUR)],
        [np.array(FOUR, object)],
        [{"A": "lung", "B": "heart", "C": "liver", "D": "spleen", "E": None}],
        ['["lung", "heart", "liver", "spleen"]'],
        ["['lung', 'heart', 'liver', 'spleen']"],  # as pandas writes a list
        ['{"a": "lung", "b": "heart", "c": "liver", "d": "spleen"}'],
        ["lung|heart|liver|spleen"],
        ["lung; heart ;liver;spleen;"],
        ["lung\nheart\nliver\nspleen\n"],
        ["A. lung\nB. heart\nC. liver\nD. spleen"],
        [[" A:lung ", " B:heart ", "C: liver", "D:spleen"]],
        ["(a) lung|(b) heart|(c) liver|(d) spleen"],
        ["lung", "heart", "liver", "spleen", ""],
        ["lung", "heart", "liver", "spleen", float("nan")],
    ],
)
def test_options_are_read_from_one_cell_or_several(cells: list[Any]) -> None:
    assert read_options(cells) == FOUR


@pytest.mark.parametrize("cell", [None, "", [], "[]", float("nan")])
def test_an_empty_cell_has_no_options(cell: Any) -> None:
    assert read_options([cell]) == ()
    assert read_options(["", None, float("nan")]) == ()


def test_a_letter_is_removed_only_if_every_option_has_its_own() -> None:
    assert read_options([["A. lung", "B. heart"]]) == ("lung", "heart")
    assert read_options([["B: cells", "T: cells"]]) == ("B: cells", "T: cells")
    assert read_options(["A. lung; left\nB. heart"]) == ("lung; left", "heart")  # only lines have letters in order


@pytest.mark.parametrize(
    ("cells", "what"),
    [
        (["lung"], "a choice has 1 options"),
        (["lung", "", "liver"], "option B is empty"),
        ([["lung", ""]], "option B is empty"),
        (["lung|heart;liver"], "separated in several ways"),
        (["[lung"], "options are not a JSON list"),
        ([["lung", ["heart"]]], "an option is of type list, not text"),
        ([{"A": "lung", "C": "heart"}], "an object without the keys A, B, C"),
        ([3], "options are of type int"),
        ([list("abcdefghijklmnopqrstuvwxyz0")], "a choice has 27 options"),
    ],
)
def test_cells_that_are_no_options_are_errors_with_a_fix(cells: list[Any], what: str) -> None:
    with pytest.raises(RowError, match=what) as caught:
        read_options(cells)
    assert caught.value.fix


@pytest.mark.parametrize("answer", ["C", "c", "(C)", "C.", "C)", "C: liver", "C. Liver.", "liver", "Liver.", " liver"])
def test_an_answer_is_a_letter_or_a_text(answer: str) -> None:
    assert right_options([(FOUR, answer.strip())])[0] == ["liver"]


def answers_of(*answers: str, options: tuple[str, ...] = FOUR) -> list[str]:
    """The answers, or what is wrong with them."""
    resolved, _ = right_options((options, answer) for answer in answers)
    return [answer.what if isinstance(answer, RowError) else answer for answer in resolved]


def test_a_number_counts_from_where_other_rows_show_it() -> None:
    unknown = "the answer is a number that may count from 0 or from 1"
    assert answers_of("0", "1", "3") == ["lung", "heart", "spleen"]
    assert answers_of("1", "2.0", "4") == ["lung", "heart", "spleen"]
    assert answers_of("1", "2") == [unknown, unknown]
    assert answers_of("0", "1", "4") == ["lung", unknown, "spleen"]
    assert answers_of("5", "0") == ["the answer is a number beyond the options", "lung"]
    assert right_options([(FOUR, "0"), (FOUR, "1"), (FOUR, "B")])[1] == Counter({"from 0": 2, "letter": 1})


def test_an_answer_that_is_a_text_and_a_letter_is_read_as_other_rows_are() -> None:
    groups = ("O", "A", "B", "AB")
    assert answers_of("A", options=groups) == ["A"]
    assert answers_of("A", "AB", options=groups) == ["A", "AB"]  # AB is only a text
    letters, _ = right_options([(groups, "A"), (FOUR, "D")])
    assert letters == ["O", "spleen"]  # D is only a letter
    contradicting, _ = right_options([(groups, "A"), (FOUR, "D"), (FOUR, "liver")])
    assert isinstance(contradicting[0], RowError) and "letter or the text of another option" in contradicting[0].what
    assert answers_of("2", "3", options=("0", "1", "2", "3")) == ["2", "3"]


def test_an_answer_without_an_option_is_an_error() -> None:
    assert answers_of("E", "knee", "D. lung") == [
        "the answer is a letter beyond the options",
        "the answer is none of the options",
        "the answer is none of the options",
    ]
    assert right_option(FOUR, "B", "letter") == right_option(FOUR, "heart", "text") == "heart"
    with pytest.raises(RowError, match="none of the options"):
        right_option(FOUR, "heart", "letter")


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.sampled_from(["letter", "text", "from 0", "from 1"]))
def test_a_file_in_one_style_is_read_in_it_or_refused(indices: list[int], style: str) -> None:
    write = {"letter": "ABCD".__getitem__, "text": FOUR.__getitem__, "from 0": str, "from 1": lambda n: str(n + 1)}
    answers, styles = right_options((FOUR, write[style](index)) for index in indices)
    if any(isinstance(answer, RowError) for answer in answers):
        assert style in ("from 0", "from 1") and not {0, 3} <= set(indices)
    else:
        assert answers == [FOUR[index] for index in indices]
        assert styles == Counter({style: len(indices)})


def test_the_list_of_options_at_the_end_of_a_question_is_removed() -> None:
    for listed in ("\nA. lung\nB. heart", " Answer Choices: (A) lung (B) heart", "\nOptions:\nA) lung, B) heart\n"):
        assert without_options(f"Which organ?{listed}", ("lung", "heart")) == "Which organ?"
    assert without_options("Which? (A) left\nlung\n(B) heart", ("left lung", "heart")) == "Which?"
    for other in ("Which organ? A. lung B. liver", "A. lung B. heart: which organ?", "Which (a+b)?"):
        assert without_options(other, ("lung", "heart")) == other


@pytest.mark.parametrize(
    ("names", "options"),
    [
        (["options"], ("options",)),
        (["Choices"], ("Choices",)),
        (["A", "B", "C", "D"], ("A", "B", "C", "D")),
        (["option_a", "option_b"], ("option_a", "option_b")),
        (["Choice A", "Choice B", "Choice C"], ("Choice A", "Choice B", "Choice C")),
        (["opa", "opb", "opc", "opd"], ("opa", "opb", "opc", "opd")),
        (["option1", "option2"], ("option1", "option2")),
        (["A", "B"], None),  # two columns of other things
        (["option_b", "option_c"], None),
    ],
)
def test_columns_of_options_are_found(names: list[str], options: tuple[str, ...] | None) -> None:
    for exact in (False, True):
        columns = find_columns(["image", "question", "answer", *names], {}, exact=exact)
        assert columns.get("options") == options
    assert "options" not in find_columns(["image", "report", *names], {})
    stated = parse_columns(f"options={'+'.join(names)}")
    assert find_columns(["image", "question", "answer", *names], stated)["options"] == tuple(names)
