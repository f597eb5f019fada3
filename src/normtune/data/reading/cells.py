"""Conversions of a cell that all readers use: text on one line, standard split names, yes or no."""

from __future__ import annotations

import math
import re
from pathlib import Path

from normtune.data.split_names import SPLITS, split_name
from normtune.errors import InputError

_LANGUAGES = {"english": "en", "chinese": "zh", "french": "fr", "german": "de", "spanish": "es", "japanese": "ja"} | {
    "eng": "en", "zho": "zh", "chi": "zh", "中文": "zh", "cn": "zh", "mandarin": "zh",
}  # fmt: skip
NOT_A_NUMBER = frozenset(("nan", "inf", "-inf", "infinity", "null"))  # words that programs write for nothing
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")
_BLANKS = str.maketrans("\t\r\n\v\f", "     ")  # tabs and line ends become blanks
_LINES = str.maketrans("\t\v\f", "   ")


def split_of_file(file: Path) -> str:
    """The split that a file's name, or else its folder, begins with or equals; train if neither names one.

    Example: `data/validation-00000-of-00001.parquet` and `validation/0000.parquet` are of split validate.
    """
    for word in (re.split(r"[-_.]", file.stem)[0], file.parent.name):
        if split_name(word) in SPLITS:
            return split_name(word)
    return "train"


def language_tag(word: str) -> str:
    """The short tag of a language: `en` for EN, en-US and English; an unknown word in lower case."""
    word = word.strip().lower()
    return _LANGUAGES.get(word) or re.split(r"[-_]", word)[0]


def is_yes_no(answer: str) -> bool:
    """Whether the answer is literally yes or no; case and a final full stop do not count."""
    return answer.strip().lower().rstrip(".") in ("yes", "no")


def has_half_character(value: object) -> bool:
    """Whether a text in the value, at any depth, contains half of a surrogate pair.

    JSON can write one as an escape, but tokenizers and UTF-8 files cannot hold it.
    """
    values = [value]
    while values:
        item = values.pop()
        if isinstance(item, str) and not item.isascii() and _HALF_CHARACTER.search(item):
            return True
        if isinstance(item, dict):
            values += [*item, *item.values()]
        elif isinstance(item, list | tuple):
            values += item
    return False


def clean_text(value: object, *, lines: bool = False) -> tuple[str, list[str]]:
    """Convert a cell to text without leading or trailing blanks: one line, or with `lines` as many as it has.

    Numbers become decimal text, tabs and line ends become blanks; None, NaN and infinity become the empty string.

    Returns:
        The text, and a description of each change, such as "is a number, not text".

    Raises:
        InputError: the cell is a list, an object or a truth value, or contains half of a surrogate pair.
    """
    changes = []
    if value is None:
        value = ""
    elif isinstance(value, int | float) and not isinstance(value, bool):
        changes.append("is a number, not text" if math.isfinite(value) else "is not a number (NaN or infinite)")
        value = str(value) if math.isfinite(value) else ""
    if not isinstance(value, str):
        raise InputError(f"is of type {type(value).__name__}, not text")
    if has_half_character(value):
        raise InputError("contains half of a surrogate pair")
    text = re.sub(r"\r\n?", "\n", value).translate(_LINES) if lines else value.translate(_BLANKS)
    if text != value:
        changes.append("holds tabs or line ends")
    if text.strip() != text:
        changes.append("has blanks around it")
    return text.strip(), changes
