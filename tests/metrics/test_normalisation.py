from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from normtune.errors import InputError
from normtune.metrics.normalisation import NORMALISATIONS, differ_in_signs, normalise, tokens

CASES = [
    ("Yes.", "yes"),
    ("The left lung", "left lung"),
    ("None", "0"),
    ("two", "2"),
    ("Ten", "10"),
    ("A", ""),
    ("left-sided", "left sided"),  # no blank touches the hyphen, so it becomes a blank
    ("left - sided", "left sided"),
    ("x-ray, CT", "x ray ct"),  # the comma touches a blank, the hyphen does not
    ("1,000 ml", "1000 ml"),  # a comma between digits: every mark is dropped
    ("1,000 ml x-ray", "1000 ml xray"),
    ("3.5 cm.", "3.5 cm"),
    ("dont know", "don't know"),
    ("couldnt've", "couldn't've"),
    ("patient's lung", "patient's lung"),
    ("T1/T2", "t1 t2"),
    ("what?", "what"),
]


@pytest.mark.parametrize(("text", "expected"), CASES)
def test_vqa_normalisation_by_hand(text: str, expected: str) -> None:
    assert normalise(text) == expected


def test_line_breaks_and_tabs_are_blanks() -> None:
    assert normalise("\tleft\nlung ") == "left lung"


def test_the_normalisations_differ_as_documented() -> None:
    assert normalise(" Left Lung. ", "none") == " Left Lung. "
    # VQA turns the line break into a blank before it looks at the hyphen's neighbours, LLaVA-Med after it.
    # A mark that touches a blank once is removed everywhere.
    assert normalise("x-ray-\nleft") == "xray left"
    assert normalise("x-ray-\nleft", "llava-med") == "x ray left"


def test_an_unknown_normalisation_suggests_the_nearest_name() -> None:
    with pytest.raises(InputError, match="unknown normalisation 'llavamed', did you mean 'llava-med'"):
        normalise("yes", "llavamed")


def test_tokens_split_at_blanks_and_between_chinese_characters() -> None:
    assert tokens("left lung") == ["left", "lung"]
    assert tokens("左肺 CT检查") == ["左", "肺", "CT", "检", "查"]
    assert tokens("") == []


@given(st.text(max_size=60), st.sampled_from(["vqa", "llava-med"]))
def test_no_normalised_word_is_an_article_or_upper_case(text: str, name: str) -> None:
    words = normalise(text, name).split(" ")
    assert not {"a", "an", "the"} & set(words)
    assert all(word == word.lower() for word in words)
    assert not re.search(r"[;/\[\]\"{}()=+\\_><@`?!-]", " ".join(words))


@given(st.text(max_size=60))
def test_tokens_lose_no_visible_character(text: str) -> None:
    assert "".join(tokens(text)) == "".join(text.split())


def test_the_names_are_the_documented_ones() -> None:
    assert list(NORMALISATIONS) == ["none", "vqa", "unicode", "llava-med"]


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("HER2-", "HER2+", True),
        ("culture (-)", "culture (+)", True),
        ("5 mm", ">5 mm", True),
        ("5", "-5", True),
        ("15", "1,5", True),
        ("34", "3-4", True),
        ("12", "1/2", True),
        ("X-ray", "x ray", False),
        ("left - upper", "left upper", False),
        ("yes!", "Yes.", False),
        ("1.5", "15", False),  # points stay in numbers: the texts differ
        ("lung, left", "lung left", False),
    ],
)
def test_signs_are_what_changes_the_meaning(prediction: str, reference: str, expected: bool) -> None:
    assert differ_in_signs(prediction, reference) == expected
