"""The exception for bad input. Its message names the problem, its place and a remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input. The command line prints its message as one line on stderr and exits with status 2."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `", did you mean 'ln'?"` if a known word is similar to `word`, else an empty string."""
    cutoff = 0.5 if len(word) <= 3 else 0.6  # in a word of two letters, one wrong letter is already half
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f", did you mean '{close[0]}'?" if close else ""
