"""The standard names of splits, and the other names that files and users give them."""

from __future__ import annotations

SPLITS = ("train", "validate", "test")  # standard names, in their usual order
_SPLIT_NAMES = {  # other name -> standard name
    "training": "train",
    "validation": "validate",
    "valid": "validate",
    "val": "validate",
    "dev": "validate",
    "testing": "test",
}


def split_name(word: str) -> str:
    """The standard name of a split, such as `validate` for `val`; unknown words are returned in lower case."""
    word = word.strip().lower()
    return _SPLIT_NAMES.get(word, word)


def standard_split(name: str) -> str:
    """The standard name of a split; a name that is no other name of one is returned as it is."""
    return split_name(name) if split_name(name) in SPLITS else name
