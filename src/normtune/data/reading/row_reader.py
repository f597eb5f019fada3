"""The rows of a dataset's files on their way to a Dataset: ids, faults, missing images, repeated rows."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Callable, Container, Iterable, Sequence
from itertools import islice
from pathlib import Path

from PIL import Image

from normtune.data.reading.cells import SPLITS, is_yes_no, split_name, text_of
from normtune.data.records import Dataset, Example, Kind, Problem
from normtune.errors import InputError, did_you_mean


class RowReader:
    """What was read so far. Rows that cannot be used are left out; whatever is odd becomes a problem.

    With `text_only`, rows whose image files are missing are kept (and the files listed all the same).
    """

    def __init__(self, dataset: str, text_only: bool = False) -> None:
        self.name, self.text_only = dataset, text_only
        self.notes: list[str] = []
        self.examples: list[Example] = []
        self.left_out: list[Example] = []
        self.problems: list[Problem] = []
        self.places: dict[str, tuple[str, str]] = {}  # id -> (file, row)

    def row(self, file: str, row: str, id: str = "") -> Row:
        """A new row; `row` is its number or name in the file, and makes the id where there is none."""
        return Row(self, file, row, id or f"{self.name}-{row}".replace(" ", "-"))

    def unique_row(self, file: str, row: str, id: str) -> Row:
        """A new row of a file whose ids are keys.

        Raises:
            InputError: the id is empty or stands on an earlier row.
        """
        if not id:
            raise InputError(f"{file}, row {row}: its id is empty. Give each row an id of its own.")
        if id in self.places:
            earlier = self.places[id]
            what = f"its id stands on row {earlier[1]} of {earlier[0]} too"
            raise InputError(f"{file}, row {row}: {what}. Give each row an id of its own.")
        return Row(self, file, row, id)

    def check_images(self, folder: Path, shown_as: str = "", inside: Container[str] = ()) -> None:
        """List each missing image file, and leave its rows out but for `text_only`.

        `folder` is what image names are relative to, `shown_as` what problems put before them; keys that are
        `inside` are no files.
        """
        names = {name for example in self.examples for name in example.images}
        missing = missing_images(folder, (name for name in names if name not in inside))
        kept: list[Example] = []
        rows: dict[str, int] = {}
        for example in self.examples:
            gone = [name for name in example.images if name in missing]
            (self.left_out if gone and not self.text_only else kept).append(example)
            for name in gone:
                rows[name] = rows.get(name, 0) + 1
        self.examples = kept
        for name, count in rows.items():
            shown = f"{shown_as}/{name}" if shown_as else name
            done = "kept for their text" if self.text_only else "left out"
            mend = f"Rows {done}: {count}. Put the image there."
            self.problems.append(Problem(shown, "", "image is missing", mend))

    def check_repeats(self) -> None:
        """List each row that repeats image, question and answer of an earlier row of its split."""
        seen: set[tuple[object, ...]] = set()
        for example in self.examples:
            key = (example.split, example.images, example.question, example.answer)
            if key in seen:
                what = "same image, question and answer as an earlier row"
                mend = "Kept, as published counts keep it: remove the row if it should count once."
                self.problems.append(Problem(*self.places[example.id], what, mend))
            seen.add(key)

    def dataset(self, open_image: Callable[[str], Image.Image], licence: str) -> Dataset:
        """All that was read, with problems of whole files first.

        Raises:
            InputError: there is no usable row.
        """
        if not self.examples:
            first = f" First problem: {self.problems[0]}" if self.problems else ""
            if any(problem.what == "image is missing" for problem in self.problems):
                first += " To read the text without the images, add --text-only."
            raise InputError(f"dataset {self.name} holds no usable rows.{first}")
        problems = sorted(self.problems, key=lambda problem: bool(problem.row))
        return Dataset(
            self.name, self.examples, open_image, problems, licence, self.left_out, notes=self.notes
        )


class Row:
    """One row being read: its cells go through here, so that every fault is listed with file and row."""

    def __init__(self, reading: RowReader, file: str, row: str, id: str) -> None:
        self._reading, self.file, self.row = reading, file, row
        self.id, again = id, 2
        while self.id in reading.places:
            self.id, again = f"{id}-{again}", again + 1
        reading.places[self.id] = (file, row)
        if self.id != id:
            self.problem("its id stands on an earlier row too", "Kept under a numbered id.")

    def problem(self, what: str, mend: str) -> None:
        """List a fault of this row."""
        self._reading.problems.append(Problem(self.file, self.row, what, mend))

    def text(self, field: str, value: object) -> str:
        """The cell as one line of text; empty where it is no text at all. Changes are listed."""
        try:
            text, changes = text_of(value)
        except InputError as error:
            self.problem(f"{field} {error}", "Treated as empty.")
            return ""
        for change in changes:
            self.problem(f"{field} {change}", "Read as plain text.")
        return text

    def prose(self, field: str, value: object) -> str:
        """A report or caption as one line: its line ends and runs of blanks are layout, and not listed."""
        return self.text(field, " ".join(value.split()) if isinstance(value, str) else value)

    def split(self, word: str) -> str:
        """The split's one name.

        Raises:
            InputError: it is none of train, validate, test or their other names.
        """
        name = split_name(word)
        if name not in SPLITS:
            known = f"Known are {', '.join(SPLITS)}."
            hint = did_you_mean(name, SPLITS) or "."
            raise InputError(f"{self.file}, row {self.row}: split '{word}' is unknown{hint} {known}")
        return name

    def image(self, name: str) -> str:
        """An image's path below its folder, normalised so that one file has one key.

        Raises:
            InputError: the path is absolute or leads out of the folder.
        """
        key = posixpath.normpath(name.replace("\\", "/")) if name else ""
        if key.startswith(("/", "../")) or key == ".." or ":" in key.split("/")[0]:
            what = "the image's path leads out of the dataset's folder"
            raise InputError(f"{self.file}, row {self.row}: {what}. Write it relative to that folder.")
        return key

    def kind(self, answer_type: str, answer: str) -> Kind:
        """Open or closed as the file says; a file that says something else is listed."""
        match answer_type.upper():
            case "OPEN":
                return "open"
            case "CLOSED":
                return "closed"
        self.problem("answer_type is neither OPEN nor CLOSED", "Read as closed if yes/no, else open.")
        return "closed" if is_yes_no(answer) else "open"

    def finish(
        self,
        images: Sequence[str],
        question: str,
        answer: str,
        kind: Kind,
        split: str,
        meta: dict[str, str],
        answer_called: str = "answer",
    ) -> None:
        """Keep the row, or leave it out where image, answer or (but for reports) question is empty."""
        filled = {key: value for key, value in meta.items() if value}
        example = Example(self.id, tuple(images), question, answer, kind, split, filled)
        empty = "image" if not all(images) or not images else answer_called if not answer else ""
        if not empty and not question and kind != "report":
            empty = "question"
        if empty:
            self.problem(f"{empty} is empty", "Row left out: fill it in, or leave it so.")
        (self._reading.left_out if empty else self._reading.examples).append(example)


def image_folder(root: Path, below: Sequence[str], names: Iterable[str]) -> Path:
    """The first of the folders `below` root ("" is root itself) that holds one of the first few images.

    Where none does, the first of all.
    """
    few = list(islice(names, 50))
    for folder in (root / name for name in below):
        if any((folder / name).is_file() for name in few):
            return folder
    return root / below[0]


def missing_images(folder: Path, names: Iterable[str]) -> set[str]:
    """Those of `names` (below `folder`, or absolute) that are no files: each directory is listed once."""
    listings: dict[str, set[str]] = {}
    missing = set()
    for name in set(names):
        parent, file = os.path.split(os.path.normpath(os.path.join(folder, name)))
        if parent not in listings:
            try:
                with os.scandir(parent) as entries:
                    listings[parent] = {entry.name for entry in entries if entry.is_file()}
            except (OSError, ValueError):  # ValueError: a NUL in the path
                listings[parent] = set()
        if file not in listings[parent]:
            missing.add(name)
    return missing
