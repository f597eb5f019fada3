"""Reads the options of a multiple-choice question, and finds the right one by its letter, its number or its text."""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from normtune.data.examples import check_options, option_index, option_letter, plain_option
from normtune.data.reading.cells import clean_text
from normtune.data.reading.tables import RowError
from normtune.errors import InputError

Style = Literal["letter", "text", "from 0", "from 1"]  # how answers name an option; the last two are numbers

_SEPARATORS = ("\n", "|", ";")  # between the options in one cell of text
_LETTERED = re.compile(r"\(?([A-Za-z])\s*[.):]\s*(.*)", re.DOTALL)  # "A. Lung", "(A) Lung" or "A:Lung"
_LETTER = re.compile(r"\(?([A-Za-z])(?:\s*[.):]\s*(.*))?", re.DOTALL)  # "A", "(A)", "A." or "A. Lung"
_NUMBER = re.compile(r"(\d{1,2})(?:\.0)?", re.ASCII)
_FIX = "Write the letter of the right option, or its text."


def read_options(cells: Sequence[Any]) -> tuple[str, ...]:
    """The options of a question, without letters before them ("A. Lung" becomes "Lung").

    Args:
        cells: one cell with all options, or one cell for each option. All options in one cell are a list, a dict
            {"A": ...}, JSON, or text with one separator: line ends, "|" or ";".

    Returns:
        The texts; empty if all cells are empty.

    Raises:
        RowError: the cell cannot be divided into options, an option is no text or is empty, or there is only one.
    """
    values = list(cells) if len(cells) > 1 else _items(cells[0])
    try:
        texts = [clean_text(value)[0] for value in values]
    except InputError as error:
        raise RowError(f"an option {error}", "Write it as text.") from error
    while texts and not texts[-1] and len(cells) > 1:  # a row may have fewer options than there are columns
        texts.pop()
    texts = _without_letters(texts) or texts
    if texts:
        try:
            check_options("choice", texts, texts[0])
        except InputError as error:
            what, _, fix = str(error).partition(". ")
            raise RowError(what, fix) from error
    return tuple(texts)


def options_of_kind(cells: Sequence[Any], kind: str | None) -> tuple[str, ...]:
    """The options of a row that states its kind, or None; see `read_options`.

    Raises:
        RowError: they cannot be read, a row of another kind has options, or a choice has none.
    """
    options = read_options(cells) if cells else ()
    if options and kind not in (None, "choice"):
        raise RowError(f"a row of kind {kind} has options", "Give it the kind choice, or remove its options.")
    if kind == "choice" and not options:
        raise RowError("a choice has no options", "Add a list 'options', or in a table the columns A, B, C, ...")
    return options


def right_option(options: Sequence[str], answer: str, style: Style) -> str:
    """The text of the option that an answer of a known style names.

    Raises:
        RowError: it names none of the options.
    """
    index = _readings(options, answer).get(style)
    if index is None:
        raise _no_option(answer)
    return options[index]


def right_options(rows: Iterable[tuple[Sequence[str], str]]) -> tuple[list[str | RowError], Counter[Style]]:
    """The right option of each row of a dataset, from answers that are letters, numbers or texts.

    An answer can have several meanings: 2 is the second or the third option, and O the text of a blood group or the
    fifteenth letter. It is then read in the style of the rows in which only one meaning is possible: a 0 shows that
    numbers count from 0, a 4 of four options that they count from 1. If no such row exists, the
    text of an option is preferred, and a number is an error. If such rows contradict each other, it is an error too.

    Args:
        rows: (options, answer) of each row.

    Returns:
        The text of the right option of each row, or the error that makes the row unusable; and the number of rows of
        each style.
    """
    rows = list(rows)
    readings = [_readings(options, answer) for options, answer in rows]
    certain = {style for meanings in readings if len(meanings) == 1 for style in meanings}
    styles: Counter[Style] = Counter()
    answers: list[str | RowError] = []
    for (options, answer), meanings in zip(rows, readings, strict=True):
        likely = {style: options[index] for style, index in meanings.items() if style in certain}
        if not likely:
            preferred: Iterable[Style] = ("text",) if "text" in meanings else meanings
            likely = {style: options[meanings[style]] for style in preferred}
        texts = set(likely.values())
        if len(texts) == 1:
            styles[next(iter(likely))] += 1
            answers.append(texts.pop())
        else:
            answers.append(_ambiguous(likely) if meanings else _no_option(answer))
    return answers, styles


def without_options(question: str, options: Sequence[str]) -> str:
    """The question without the list of its options at its end, as in "Which? Answer choices: (A) Lung (B) Heart"."""
    texts = [r"\s+".join(map(re.escape, option.split())) for option in options]  # lines of a question may end anywhere
    letters = (rf"\(?{option_letter(index)}[.):]\s*{text}" for index, text in enumerate(texts))
    heading = r"\s*((answer )?(choices|options)\s*:)?\s*"
    return re.sub(heading + r"[,;]?\s*".join(letters) + r"\s*$", "", question, flags=re.IGNORECASE)


def style_note(styles: Counter[Style]) -> str:
    """The note that shows how the answers of choices were read."""
    names = {"letter": "letters", "text": "texts of options", "from 0": "numbers from 0", "from 1": "numbers from 1"}
    return "answers of choices: " + ", ".join(f"{rows} {names[style]}" for style, rows in styles.items())


def _items(value: Any) -> list[Any]:
    """The options in one cell."""
    if hasattr(value, "tolist"):  # a NumPy array
        value = value.tolist()
    if value is None or value == "" or value != value:
        return []
    if isinstance(value, Mapping):
        filled = {str(key).upper(): text for key, text in value.items() if text is not None}
        if list(filled) != [option_letter(index) for index in range(len(filled))]:
            raise RowError("options are an object without the keys A, B, C, ...", 'Write {"A": ..., "B": ...}.')
        return list(filled.values())
    if isinstance(value, list | tuple):
        return list(value)
    if not isinstance(value, str):
        raise RowError(f"options are of type {type(value).__name__}", "Write a list.")
    text = value.strip()
    if text[:1] in ("[", "{"):
        return _items(_parsed(text))
    pieces = [text.rstrip(separator).split(separator) for separator in _SEPARATORS if separator in text]
    pieces = [piece for piece in pieces if _without_letters(piece)] or pieces
    if len(pieces) > 1:
        raise RowError("options are separated in several ways", "Write a JSON list, or one column for each option.")
    return pieces[0] if pieces else [text]


def _parsed(text: str) -> Any:
    """The list or object that a text holds, as JSON or as Python prints it."""
    for parse in (json.loads, ast.literal_eval):
        try:
            value = parse(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
        if isinstance(value, list | tuple | dict):
            return value
    raise RowError("options are not a JSON list", 'Write ["...", "..."], or one column for each option.')


def _without_letters(texts: Sequence[str]) -> list[str] | None:
    """The texts without A, B, C, ... before them; None unless each of them has its letter."""
    matches = [_LETTERED.fullmatch(text.strip()) for text in texts]
    bodies = [m[2].strip() for n, m in enumerate(matches) if m is not None and m[1].upper() == option_letter(n)]
    return bodies if len(bodies) == len(texts) else None


def _readings(options: Sequence[str], answer: str) -> dict[Style, int]:
    """Style -> index of the option that the answer names if it is read in this style."""
    meanings: dict[Style, int] = {}
    if letter := _LETTER.fullmatch(answer):
        index = option_index(letter[1])
        if index < len(options) and (not letter[2] or plain_option(letter[2]) == plain_option(options[index])):
            meanings["letter"] = index
    equal = [index for index, option in enumerate(options) if option == answer]
    equal = equal or [index for index, option in enumerate(options) if plain_option(option) == plain_option(answer)]
    if len({options[index] for index in equal}) == 1:
        meanings["text"] = equal[0]
    if number := _NUMBER.fullmatch(answer):
        value = int(number[1])
        meanings |= {"from 0": value} if value < len(options) else {}
        meanings |= {"from 1": value - 1} if 1 <= value <= len(options) else {}
    return meanings


def _no_option(answer: str) -> RowError:
    if _NUMBER.fullmatch(answer):
        return RowError("the answer is a number beyond the options", _FIX)
    if (letter := _LETTER.fullmatch(answer)) and not letter[2]:
        return RowError("the answer is a letter beyond the options", _FIX)
    return RowError("the answer is none of the options", _FIX)


def _ambiguous(likely: Mapping[Style, str]) -> RowError:
    if "from 0" in likely or "from 1" in likely:
        return RowError("the answer is a number that may count from 0 or from 1", _FIX)
    return RowError("the answer may be a letter or the text of another option", "Write the letter and the text: A. ...")
