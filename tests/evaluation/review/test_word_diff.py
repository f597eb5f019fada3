from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from normtune.evaluation.review.word_diff import Piece, word_difference

WORDS = st.lists(st.sampled_from(["no", "No", "effusion", "effusion.", "small", "<b>", ".", "left,"]), max_size=12)


def test_case_and_punctuation_are_ignored() -> None:
    assert word_difference("no effusion", "No effusion.") == [Piece("same", "no effusion")]


def test_missed_words_come_before_added_words() -> None:
    pieces = word_difference("Small left effusion seen.", "Small right effusion.")
    assert pieces == [
        Piece("same", "Small"),
        Piece("missed", "right"),
        Piece("added", "left"),
        Piece("same", "effusion"),
        Piece("added", "seen."),
    ]


def test_an_empty_prediction_misses_all_words() -> None:
    assert word_difference("", "no effusion") == [Piece("missed", "no effusion")]
    assert word_difference("no effusion", "") == [Piece("added", "no effusion")]
    assert word_difference("", "") == []


@settings(max_examples=50)
@given(WORDS, WORDS)
def test_no_word_is_lost_or_invented(prediction: list[str], reference: list[str]) -> None:
    pieces = word_difference(" ".join(prediction), " ".join(reference))
    predicted = [word for piece in pieces if piece.kind != "missed" for word in piece.text.split()]
    assert predicted == prediction
    reference_words = sum(len(piece.text.split()) for piece in pieces if piece.kind != "added")
    assert reference_words == len(reference)
