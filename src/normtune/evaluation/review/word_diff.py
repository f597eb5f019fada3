"""Where two texts differ, word by word."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal

_MARKS = ".,;:!?()[]\"'"


@dataclass(frozen=True)
class Piece:
    """Words in a row that both texts have, that the prediction adds, or that it leaves out."""

    kind: Literal["same", "added", "missed"]
    text: str


def word_difference(said: str, meant: str) -> list[Piece]:
    """`said` against `meant` as pieces in reading order; case and punctuation around words do not count.

    The words of "same" and "added" pieces together are those of `said`; where the texts part, what was
    missed comes before what was added.
    """
    ours, theirs = said.split(), meant.split()
    matcher = difflib.SequenceMatcher(
        a=[_key(word) for word in theirs], b=[_key(word) for word in ours], autojunk=False
    )
    pieces = []
    for tag, a, a_end, b, b_end in matcher.get_opcodes():
        if tag == "equal":
            pieces.append(Piece("same", " ".join(ours[b:b_end])))
            continue
        if a < a_end:
            pieces.append(Piece("missed", " ".join(theirs[a:a_end])))
        if b < b_end:
            pieces.append(Piece("added", " ".join(ours[b:b_end])))
    return pieces


def _key(word: str) -> str:
    return word.strip(_MARKS).lower() or word
