"""The one exception that users see: what was wrong, where, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input. The command line prints its text as one line on stderr and exits with status 2."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`", did you mean 'ln'?"` where a known word is close to `word`, else an empty string."""
    cutoff = 0.5 if len(word) <= 3 else 0.6  # of two letters one is half
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f", did you mean '{close[0]}'?" if close else ""
