"""What every reader does to a cell: one line of text, a split's one name, yes or no."""

from __future__ import annotations

import re
from pathlib import Path

from normtune.errors import InputError

SPLITS = ("train", "validate", "test")  # in the order of learning
_SPLIT_NAMES = {
    "training": "train",
    "validation": "validate",
    "valid": "validate",
    "val": "validate",
    "dev": "validate",
    "testing": "test",
}
_BLANKS = str.maketrans("\t\r\n\v\f", "     ")


def split_name(word: str) -> str:
    """The one name of a split: `validation`, `valid`, `val` and `dev` are `validate`; unknown words stay."""
    word = word.strip().lower()
    return _SPLIT_NAMES.get(word, word)


def split_of_file(file: Path) -> str:
    """`data/validation-00000-of-00001.parquet` and `validation/0000.parquet` are both of split validate.

    Where neither the name nor the folder says a split, it is train.
    """
    for word in (re.split(r"[-_.]", file.stem)[0], file.parent.name):
        if split_name(word) in SPLITS:
            return split_name(word)
    return "train"


def is_yes_no(answer: str) -> bool:
    """Whether the answer is literally yes or no, whatever its case and final full stop."""
    return answer.strip().lower().rstrip(".") in ("yes", "no")


def text_of(value: object) -> tuple[str, list[str]]:
    """A cell as one line of text without blanks around it, and what had to be changed for that.

    Numbers become their decimal text, tabs and line ends become blanks, None becomes the empty string.

    Raises:
        InputError: the cell is a list, an object or a truth value.
    """
    changes = []
    if value is None:
        value = ""
    elif isinstance(value, int | float) and not isinstance(value, bool):
        changes.append("is a number, not text")
        value = str(value)
    if not isinstance(value, str):
        raise InputError(f"is of type {type(value).__name__}, not text")
    text = value.translate(_BLANKS)
    if text != value:
        changes.append("holds tabs or line ends")
    if text.strip() != text:
        changes.append("has blanks around it")
    return text.strip(), changes
