"""Compares two texts word by word."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal

# Punctuation around words that is ignored.
_MARKS = ".,;:!?()[]\"'"


@dataclass(frozen=True)
class Piece:
    """Consecutive words that are in both texts, only in the prediction, or only in the reference."""

    kind: Literal["same", "added", "missed"]
    text: str


def word_difference(prediction: str, reference: str) -> list[Piece]:
    """Compare a prediction with its reference; case and punctuation around words are ignored.

    Returns:
        Pieces in reading order. The "same" and "added" pieces together have the words of the prediction. If
        the texts differ at a position, the "missed" words come before the "added" words.
    """
    predicted, expected = prediction.split(), reference.split()
    matcher = difflib.SequenceMatcher(
        a=[_key(word) for word in expected], b=[_key(word) for word in predicted], autojunk=False
    )
    pieces = []
    for tag, a, a_end, b, b_end in matcher.get_opcodes():
        if tag == "equal":
            pieces.append(Piece("same", " ".join(predicted[b:b_end])))
            continue
        if a < a_end:
            pieces.append(Piece("missed", " ".join(expected[a:a_end])))
        if b < b_end:
            pieces.append(Piece("added", " ".join(predicted[b:b_end])))
    return pieces


def _key(word: str) -> str:
    """Normalise a word for the comparison; a word of punctuation only stays as it is."""
    return word.strip(_MARKS).lower() or word
