from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from normtune.evaluation.review.word_diff import Piece, word_difference

WORDS = st.lists(
    st.sampled_from(["no", "No", "effusion", "effusion.", "small", "<b>", ".", "left,"]), max_size=12
)


def test_capitals_and_punctuation_do_not_count() -> None:
    assert word_difference("no effusion", "No effusion.") == [Piece("same", "no effusion")]


def test_what_was_missed_comes_before_what_was_added() -> None:
    found = word_difference("Small left effusion seen.", "Small right effusion.")
    assert found == [
        Piece("same", "Small"),
        Piece("missed", "right"),
        Piece("added", "left"),
        Piece("same", "effusion"),
        Piece("added", "seen."),
    ]


def test_an_empty_text_misses_everything() -> None:
    assert word_difference("", "no effusion") == [Piece("missed", "no effusion")]
    assert word_difference("no effusion", "") == [Piece("added", "no effusion")]
    assert word_difference("", "") == []


@settings(max_examples=50)
@given(WORDS, WORDS)
def test_no_word_is_lost_or_made(said: list[str], meant: list[str]) -> None:
    pieces = word_difference(" ".join(said), " ".join(meant))
    ours = [word for piece in pieces if piece.kind != "missed" for word in piece.text.split()]
    assert ours == said
    theirs = sum(len(piece.text.split()) for piece in pieces if piece.kind != "added")
    assert theirs == len(meant)
