"""Multiple-choice questions in every format of own data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pytest

from normtune.data.registry import open_dataset
from normtune.data.summary import summarize, summary_text
from normtune.errors import InputError
from tests.support import own_data
from tests.support.own_data import Rows, write_arrow, write_delimited, write_text

ORGANS = ["lung", "heart", "liver", "spleen"]


def make_rows(root: Path) -> Rows:
    """Choices of four or three options, and every third row an open question."""
    rows = own_data.make_rows(root, 24)
    for number, row in enumerate(rows):
        if number % 3 == 0:
            row |= {"options": None}
        else:
            organs = ORGANS[: 3 + number % 2]
            row |= {"question": "Which organ, left or right?", "options": organs, "answer": organs[number % 3]}
    return rows


def as_text(rows: Rows, write: Callable[[list[str]], str] = json.dumps) -> Rows:
    """The rows for formats that have no lists."""
    return [row | {"options": write(row["options"]) if row["options"] else ""} for row in rows]


def as_columns(rows: Rows) -> Rows:
    """One column for each option, and the letter as the answer."""
    changed = []
    for row in rows:
        options = row["options"] or []
        cells = {name: value for name, value in row.items() if name != "options"}
        cells |= {f"Choice {letter}": text for letter, text in zip("ABCD", [*options, "", "", "", ""], strict=False)}
        cells["answer"] = "ABCD"[options.index(row["answer"])] if options else row["answer"]
        changed.append(cells)
    return changed


def fields(root: Path, data: Any) -> list[tuple[Any, ...]]:
    dataset = open_dataset(data)
    return [(e.question, e.answer, e.options, e.kind, e.split, e.meta) for e in dataset.examples]


WRITERS: dict[str, Callable[[Path, Rows], Any]] = {
    "csv, JSON": lambda root, rows: own_data.FORMATS["csv"](root, as_text(rows)),
    "csv, Python list": lambda root, rows: own_data.FORMATS["csv"](root, as_text(rows, str)),
    "csv, lines": lambda root, rows: own_data.FORMATS["csv"](root, as_text(rows, "\n".join)),
    "csv, columns": lambda root, rows: own_data.FORMATS["csv"](root, as_columns(rows)),
    "tsv, columns": lambda root, rows: own_data.FORMATS["tsv"](root, as_columns(rows)),
    "xlsx, bars": lambda root, rows: own_data.FORMATS["xlsx"](root, as_text(rows, "|".join)),
    "xlsx, columns": lambda root, rows: own_data.FORMATS["xlsx"](root, as_columns(rows)),
    "json": own_data.FORMATS["json"],
    "jsonl": own_data.FORMATS["jsonl"],
    "jsonl, columns": lambda root, rows: own_data.FORMATS["jsonl"](root, as_columns(rows)),
    "parquet": own_data.FORMATS["parquet"],
    "arrow": lambda root, rows: write_arrow(root / "saved", rows, root),
    "imagefolder": lambda root, rows: own_data.FORMATS["imagefolder jsonl"](root, rows),
    "list of dicts": lambda root, rows: [row | {"image": str(root / row["image"])} for row in rows],
    "data frame": lambda root, rows: pandas.DataFrame(
        [row | {"image": str(root / row["image"])} for row in as_columns(rows)]
    ),
}


@pytest.mark.parametrize("format", WRITERS)
def test_the_same_choices_are_read_from_every_format(tmp_path: Path, format: str) -> None:
    rows = make_rows(tmp_path)
    expected = [
        (
            row["question"],
            row["answer"],
            tuple(row["options"] or ()),
            "choice" if row["options"] else "closed" if row["answer"] in ("yes", "no") else "open",
            row["split"],
            {"patient_id": row["patient_id"]},
        )
        for row in rows
    ]
    assert fields(tmp_path, WRITERS[format](tmp_path, rows)) == expected


@pytest.mark.parametrize("answer", ["liver", "C", "C. liver", 2])
def test_a_conversation_with_options_is_a_choice(tmp_path: Path, answer: str | int) -> None:
    own_data.make_rows(tmp_path, 2)
    listed = "Which organ?\nA. lung\nB. heart\nC. liver"
    rows = []
    for text in (answer, 0) if answer == 2 else (answer,):
        turns = [{"role": "user", "content": f"<image>{listed}"}, {"role": "assistant", "content": str(text)}]
        rows.append({"messages": turns, "images": ["scans/000.png"], "options": ORGANS[:3]})
    without = {name: value for name, value in rows[0].items() if name != "options"}
    file = write_text(tmp_path / "chats.jsonl", "".join(json.dumps(row) + "\n" for row in [*rows, without]))
    examples = open_dataset(file).examples
    first, last = examples[0], examples[-1]
    assert (first.question, first.answer, first.options) == ("Which organ?", "liver", ("lung", "heart", "liver"))
    assert (last.question, last.answer, last.kind, last.options) == (listed, str(answer), "open", ())


def test_conversations_with_wrong_options_are_errors_by_row(tmp_path: Path) -> None:
    own_data.make_rows(tmp_path, 2)
    turns = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "knee"}]
    base = {"messages": turns, "images": ["scans/000.png"]}
    for row, message in (
        (base | {"options": ORGANS}, "row 1: the answer is none of the options"),
        (base | {"options": ORGANS[:1]}, "row 1: a choice has 1 options"),
        (base | {"options": ORGANS, "kind": "closed"}, "row 1: a row of kind closed has options"),
        (base | {"kind": "choice"}, "row 1: a choice has no options"),
        (base | {"messages": turns * 2, "options": ORGANS}, "row 1: options for 2 questions"),
    ):
        file = write_text(tmp_path / "chats.jsonl", json.dumps(row) + "\n")
        with pytest.raises(InputError, match=message):
            open_dataset(file)


def table(root: Path, *cells: tuple[str, str, str]) -> Path:
    own_data.make_rows(root, 2)
    names = ("options", "answer", "kind")
    rows = [{"image": "scans/000.png", "question": "Which?"} | dict(zip(names, row, strict=True)) for row in cells]
    return write_delimited(root / "rows.csv", rows)


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (("lung|heart", "knee", ""), "row 2: the answer is none of the options"),
        (("lung|heart", "C", ""), "row 2: the answer is a letter beyond the options"),
        (("lung|heart", "1", ""), "row 2: the answer is a number that may count from 0 or from 1"),
        (("lung", "lung", ""), "row 2: a choice has 1 options. Give it 2 to 26"),
        (("lung|heart", "lung", "closed"), "row 2: a row of kind closed has options"),
        (("", "lung", "choice"), "row 2: a choice has no options"),
    ],
)
def test_wrong_options_are_errors_by_row(tmp_path: Path, cells: tuple[str, str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_dataset(table(tmp_path, cells))


def test_wrong_rows_can_be_left_out_and_are_counted(tmp_path: Path) -> None:
    cells = [("lung|heart", "lung", "choice"), ("lung|heart", "knee", ""), ("", "left", "open"), ("lung", "lung", "")]
    dataset = open_dataset(table(tmp_path, *cells), skip_bad=True)
    assert [(e.kind, e.answer) for e in dataset.examples] == [("choice", "lung"), ("open", "left")]
    assert dataset.dropped == {"the answer is none of the options": 1, "a choice has 1 options": 1}
    assert [(problem.row, problem.what) for problem in dataset.problems] == [
        ("3", "the answer is none of the options"),
        ("5", "a choice has 1 options"),
    ]


def test_the_summary_shows_option_counts_and_how_answers_are_read(tmp_path: Path) -> None:
    dataset = open_dataset(WRITERS["csv, columns"](tmp_path, make_rows(tmp_path)))
    summary = summarize(dataset)
    assert summary["parts"]["train"]["options"] == {"3": 5, "4": 6}
    text = summary_text(summary)
    assert "  options: 3 in 5 rows, 4 in 6 rows" in text
    assert "answers of choices: 16 letters" in text
    assert "options=Choice A+Choice B+Choice C+Choice D" in text
