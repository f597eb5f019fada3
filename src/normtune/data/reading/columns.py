"""Decides which columns of a table hold the image, the question, the answer and the other fields of an example."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import takewhile
from string import ascii_lowercase

from normtune.errors import InputError, did_you_mean

Columns = dict[str, tuple[str, ...]]  # role -> its columns; several for views, and for a report in parts

# Role -> the usual names of its column, best first; letters and digits in lower case.
USUAL_NAMES: dict[str, tuple[str, ...]] = {
    "image": (
        *("image", "images", "img", "imagepath", "imagepaths", "imagefile", "imagefiles", "imagename", "imgpath"),
        *("imgname", "filename", "filenames", "filepath", "path", "picture", "dicompath", "dicom", "scan", "volume"),
        *("file", "imageid", "imgid", "dicomid"),
    ),
    "question": ("question", "prompt", "instruction", "query", "questiontext", "userprompt", "input"),
    "answer": (
        *("answer", "response", "output", "report", "reporttext", "caption", "answertext", "label", "target"),
        *("completion", "description", "text", "correctanswer", "correctoption", "gtanswer", "answerkey", "answeridx"),
        *("answerindex", "correct", "cop"),
    ),
    "id": ("id", "qid", "questionid"),
    "kind": ("kind", "answertype"),
    "split": ("split", "subset", "partition"),
    "language": ("language", "qlang", "lang"),
    "modality": ("modality",),
    "organ": ("organ", "location", "imageorgan"),
    "options": ("options", "choices", "answerchoices", "answeroptions"),
    "patient": (),  # the usual names are found among the other columns; see `normtune.data.splits.group_columns`
}
# Names of an answer that is a report: no question is needed.
_REPORTS = frozenset(("report", "reporttext", "caption", "description", "findings", "impression"))
_OPTION_PREFIXES = ("option", "choice", "opt", "op", "")  # before the letter or number of a column with one option
_SECTIONS = ("findings", "impression")  # columns that together are a report


def letters(column: str) -> str:
    """A column's name as it is compared: letters and digits in lower case."""
    return re.sub(r"[\W_]", "", column).lower()


def parse_columns(text: str | Mapping[str, str] | None) -> Columns:
    """Parse `--columns`, such as "image=scan,answer=findings+impression".

    Raises:
        InputError: it is not ROLE=COLUMN, or the role is unknown or named twice.
    """
    columns: Columns = {}
    stated = columns_option(text)
    for part in stated.split(",") if stated else ():
        role, equals, names = (piece.strip() for piece in part.partition("="))
        if not equals or not names:
            raise InputError(f"--columns: '{part}' is not ROLE=COLUMN. Write for example image=scan,answer=report.")
        if role not in USUAL_NAMES:
            hint = did_you_mean(role, USUAL_NAMES) or "."
            raise InputError(f"--columns: no field '{role}'{hint} Fields: {', '.join(USUAL_NAMES)}.")
        if role in columns:
            raise InputError(f"--columns: {role} is named twice. Join several columns with +.")
        columns[role] = tuple(name.strip() for name in names.split("+"))
    return columns


def columns_option(columns: str | Mapping[str, str] | None) -> str | None:
    """The columns as `--columns` takes them."""
    return ",".join(f"{role}={name}" for role, name in columns.items()) if isinstance(columns, Mapping) else columns


def find_columns(names: Sequence[str], stated: Columns, *, exact: bool = False) -> Columns:
    """The columns of each role: the stated ones, else those with one of the usual names.

    Args:
        names: the table's columns.
        stated: from `parse_columns`.
        exact: guess only image, question, answer and options; other roles have a column of exactly their name.

    Raises:
        InputError: a stated column does not exist.
    """
    for role, named in stated.items():
        for column in named:
            if column not in names:
                hint = did_you_mean(column, names) or "."
                raise InputError(f"--columns: no column '{column}' for {role}{hint} Columns: {', '.join(names)}.")
    used = {column for named in stated.values() for column in named}
    by_letters: dict[str, str] = {}
    for name in names:
        if name not in used:
            by_letters.setdefault(letters(name), name)
    columns = dict(stated)
    for role, usual in USUAL_NAMES.items():
        if role in columns:
            continue
        if role in names and role not in used:
            columns[role] = (role,)
        elif not exact or role in ("image", "question", "answer", "options"):
            first = next((by_letters[name] for name in usual if name in by_letters), None)
            if first is not None:
                columns[role] = (first,)
        if role in columns:
            by_letters = {key: name for key, name in by_letters.items() if name not in columns[role]}
    if "image" not in columns:
        views = tuple(name for name in names if re.fullmatch(r"(image|img|view|filename)\d+", letters(name)))
        columns |= {"image": views} if views else {}
    if "question" not in columns and "options" not in stated:
        columns.pop("options", None)
    elif "options" not in columns and (options := _option_columns(by_letters)):
        columns["options"] = options
    sections = tuple(by_letters[name] for name in _SECTIONS if name in by_letters)
    if "answer" not in columns and sections:
        columns["answer"] = sections
    return columns


def _option_columns(by_letters: Mapping[str, str]) -> tuple[str, ...]:
    """The columns that hold one option each: option_a, option_b, ...; choice1, choice2, ...; or A, B, C, ..."""
    for prefix in _OPTION_PREFIXES:
        for names in (ascii_lowercase, [str(number) for number in range(1, 27)] if prefix else ""):
            present = takewhile(by_letters.__contains__, (prefix + name for name in names))
            columns = tuple(by_letters[name] for name in present)
            if len(columns) > (1 if prefix else 2):  # two columns A and B may be anything
                return columns
    return ()


def holds_reports(columns: Columns) -> bool:
    """Whether the answers are reports by their column's name, in a table without questions."""
    return "question" not in columns and all(letters(name) in _REPORTS for name in columns.get("answer", ("",)))


def columns_note(columns: Columns) -> str:
    """The note that shows which columns are read."""
    return "columns: " + ", ".join(f"{role}={'+'.join(names)}" for role, names in columns.items())
