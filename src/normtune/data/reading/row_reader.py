"""Collects the rows of a dataset's files into a `Dataset`, and lists what is wrong with them.

A dataset's reader calls `start_row` for each row of a file, passes the cells through the `Row`, and ends it
with `Row.finish`. After the last row it calls `finish`, or the methods that this calls.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image

from normtune.data.examples import Examples
from normtune.data.images.files import ImageFolder
from normtune.data.reading.cells import clean_text, has_half_character, is_yes_no, language_tag
from normtune.data.reading.choices import Style, read_options, right_option, right_options, style_note
from normtune.data.reading.image_paths import find_image_folder, image_key, missing_images
from normtune.data.reading.tables import RowError
from normtune.data.records import KINDS, Dataset, Example, History, Kind, Problem
from normtune.data.split_names import SPLITS, split_name
from normtune.errors import InputError, did_you_mean

_MAX_SHOWN = 5  # number of bad rows that one error names


class RowReader:
    """Collects examples, skipped rows and problems while files are read.

    Rows that cannot be used are skipped. Everything unusual in the files becomes a problem.

    Args:
        dataset: the dataset's name, for ids and messages.
        text_only: keep the rows with missing image files. The files are listed as problems either way.
    """

    def __init__(self, dataset: str, text_only: bool = False) -> None:
        self.name, self.text_only = dataset, text_only
        self.notes: list[str] = []
        self.examples: list[Example] = []
        self.skipped: list[Example] = []
        self.dropped: Counter[str] = Counter()  # reason -> rows that are not in `examples`
        self.problems: list[Problem] = []
        self.locations: dict[str, tuple[str, str]] = {}  # id -> (file, row)
        self.answers: dict[str, str] = {}  # id of a choice -> its answer in the file, until `resolve_answers`
        self.styles: Counter[Style] = Counter()  # style of answers -> resolved answers that have it

    def skip(self, example: Example, reason: str) -> None:
        """Skip a row and count it; the caller lists the problem."""
        self.skipped.append(example)
        self.dropped[reason] += 1

    def skip_unread(self, id: str, split: str, reason: str) -> None:
        """Skip a row of which nothing was read, as `skip` does."""
        self.skip(Example(id, (), "", "", "open", split), reason)

    def report_bad_rows(self, errors: Sequence[Problem], row: str, strict: bool) -> None:
        """List the rows that cannot be used; with `strict`, refuse them.

        Args:
            errors: one for each row.
            row: what messages call a row, such as "line".

        Raises:
            InputError: strict, and there are errors.
        """
        if strict and errors:
            first = (f"{error.file}, {row} {error.row}: {error.message}" for error in errors[:_MAX_SHOWN])
            more = [f"And {len(errors) - _MAX_SHOWN} more bad rows."] if len(errors) > _MAX_SHOWN else []
            raise InputError(" ".join([*first, *more]))
        self.problems += errors

    def resolve_answers(self) -> list[Problem]:
        """Replace the answers of choices by the texts of their options, and skip the rows without a right option.

        Returns:
            A problem for each skipped row.
        """
        choices = [example for example in self.examples if example.id in self.answers]
        answers, styles = right_options((example.options, self.answers[example.id]) for example in choices)
        resolved = {example.id: answer for example, answer in zip(choices, answers, strict=True)}
        usable, problems = [], []
        for example in self.examples if resolved else ():
            answer = resolved.get(example.id, example.answer)
            if isinstance(answer, RowError):
                problems.append(Problem(*self.locations[example.id], answer.what, answer.fix))
                self.skip(example, answer.what)
            else:
                usable.append(replace(example, answer=answer) if answer != example.answer else example)
        self.examples, self.answers = usable if resolved else self.examples, {}
        self.styles += styles
        return problems

    def note_missing_split(self, file: str, split: str) -> None:
        """List the file of a split as missing."""
        self.problems.append(Problem(file, "", "file is missing", f"There is no split '{split}' without it."))

    def start_row(self, file: str, row: str, id: str = "") -> Row:
        """Start a row of a file. An id that is already used gets a number; the fault is listed.

        Args:
            file: the file's name, for messages.
            row: the row's number or name in the file, for messages.
            id: the example's id; if empty, the id is made of the dataset's name and `row`.
        """
        return Row(self, file, row, id or f"{self.name}-{row}".replace(" ", "-"))

    def start_unique_row(self, file: str, row: str, id: str) -> Row:
        """Start a row of a file in which every row must have an id of its own.

        Raises:
            InputError: the id is empty, or an earlier row has it.
        """
        if not id:
            raise InputError(f"{file}, row {row}: its id is empty. Give each row its own id.")
        if id in self.locations:
            earlier = self.locations[id]
            what = f"its id is already used by row {earlier[1]} of {earlier[0]}"
            raise InputError(f"{file}, row {row}: {what}. Give each row its own id.")
        return Row(self, file, row, id)

    def skip_missing_images(self, folder: Path, embedded: Container[str] = ()) -> list[tuple[Example, list[str]]]:
        """Skip the rows with missing image files, unless `text_only` is set; see `check_images`.

        Returns:
            Each row with missing files, and their names.
        """
        names = {name for example in self.examples for name in example.images if name not in embedded}
        missing = missing_images(folder, names)
        incomplete = [
            (example, absent)
            for example in self.examples
            if (absent := [name for name in example.images if name in missing])
        ]
        if incomplete and not self.text_only:
            self.examples = [example for example in self.examples if missing.isdisjoint(example.images)]
            for example, _ in incomplete:
                self.skip(example, "image is missing")
        return incomplete

    def check_images(self, folder: Path, prefix: str = "", embedded: Container[str] = ()) -> None:
        """List each missing image file and, unless `text_only` is set, skip its rows.

        Args:
            folder: image names are relative to it.
            prefix: folder that messages put before image names.
            embedded: image keys that are not files, as the image is inside a parquet file.
        """
        row_counts = Counter(name for _, names in self.skip_missing_images(folder, embedded) for name in names)
        for name, count in row_counts.items():
            file = f"{prefix}/{name}" if prefix else name
            action = "kept for their text" if self.text_only else "skipped"
            fix = f"Rows {action}: {count}. Put the image there."
            self.problems.append(Problem(file, "", "image is missing", fix))

    def find_images(self, root: Path, subfolders: Sequence[str]) -> ImageFolder:
        """Find the folder of the images below `root`, check them, and return their opener.

        Args:
            root: the dataset's folder.
            subfolders: see `find_image_folder`.
        """
        names = (name for example in self.examples for name in example.images)
        folder = find_image_folder(root, subfolders, names)
        subfolder = folder.relative_to(root).as_posix()
        self.check_images(folder, "" if subfolder == "." else subfolder)
        return ImageFolder(folder)

    def finish(self, root: Path, subfolders: Sequence[str], licence: str) -> Dataset:
        """Find and check the images below `root` (see `find_images`), list repeated rows, and build the dataset."""
        images = self.find_images(root, subfolders)
        self.check_repeats()
        return self.build_dataset(images, licence)

    def check_repeats(self) -> None:
        """List each row with the same image, question and answer as an earlier row of its split."""
        earlier_rows: set[tuple[object, ...]] = set()
        for example in self.examples:
            key = (example.split, example.images, example.history, example.question, example.answer)
            if key in earlier_rows:
                what = "same image, question and answer as an earlier row"
                fix = "Kept, as in published counts. Remove the row if it should count once."
                self.problems.append(Problem(*self.locations[example.id], what, fix))
            earlier_rows.add(key)

    def build_dataset(
        self, open_image: Callable[[str], Image.Image], licence: str, examples: Examples | None = None
    ) -> Dataset:
        """The dataset of all rows that were read, or of these; problems of whole files come first.

        Raises:
            InputError: there is no usable row.
        """
        if not (self.examples if examples is None else examples):
            first = f" First problem: {self.problems[0]}" if self.problems else ""
            if any(problem.what == "image is missing" for problem in self.problems):
                first += " To read the text without the images, add --text-only."
            raise InputError(f"dataset {self.name} has no usable rows.{first}")
        if self.styles:
            self.notes.append(style_note(self.styles))
        problems = sorted(self.problems, key=lambda problem: bool(problem.row))
        return Dataset(
            self.name,
            Examples(self.examples) if examples is None else examples,
            open_image,
            problems,
            licence,
            skipped=self.skipped,
            notes=self.notes,
            dropped=self.dropped,
        )


class Row:
    """One row while it is read. Its methods convert cells and list each fault with file and row."""

    def __init__(self, reader: RowReader, file: str, row: str, id: str) -> None:
        self._reader, self.file, self.row = reader, file, row
        self._fault = ""  # what is wrong with its options
        self.id, number = id, 2
        while self.id in reader.locations:  # id, id-2, id-3, ...
            self.id, number = f"{id}-{number}", number + 1
        reader.locations[self.id] = (file, row)
        if self.id != id:
            self.add_problem("its id is used by an earlier row", "Kept, with a number added to the id.")

    def add_problem(self, what: str, fix: str) -> None:
        """List a fault of this row and how to fix it."""
        self._reader.problems.append(Problem(self.file, self.row, what, fix))

    def read_text(self, field: str, value: object, *, lines: bool = False) -> str:
        """The cell as text, on one line unless `lines` is set; what is no text becomes "". Changes are listed."""
        try:
            text, changes = clean_text(value, lines=lines)
        except InputError as error:
            self.add_problem(f"{field} {error}", "Treated as empty.")
            return ""
        for change in changes:
            self.add_problem(f"{field} {change}", "Read as plain text.")
        return text

    def read_prose(self, field: str, value: object) -> str:
        """A report or caption as one line. Line ends and repeated blanks are layout and are not listed."""
        return self.read_text(field, " ".join(value.split()) if isinstance(value, str) else value)

    def read_split(self, word: str) -> str:
        """The standard name of a split: train, validate or test.

        Raises:
            InputError: the word is not a name of a split; see `split_name`.
        """
        name = split_name(word)
        if name not in SPLITS:
            known = f"Known splits: {', '.join(SPLITS)}."
            hint = did_you_mean(name, SPLITS) or "."
            raise InputError(f"{self.file}, row {self.row}: split '{word}' is unknown{hint} {known}")
        return name

    def image_key(self, name: str) -> str:
        """An image's key; see `image_key`."""
        return image_key(self.file, self.row, name)

    def read_kind(self, answer_type: str, answer: str) -> Kind:
        """Open or closed, by the file's answer type. Any other type is listed, and yes and no are closed."""
        match answer_type.upper():
            case "OPEN":
                return "open"
            case "CLOSED":
                return "closed"
        self.add_problem("answer_type is neither OPEN nor CLOSED", "Read as closed if yes/no, else open.")
        return "closed" if is_yes_no(answer) else "open"

    def read_choice(self, options: Sequence[object], answer: object, style: Style) -> tuple[tuple[str, ...], str]:
        """The options, and the text of the right one. A fault is listed, and `finish` skips the row.

        Args:
            options: see `read_options`.
            answer: the right option.
            style: whether the answer is a letter or the text of an option.
        """
        try:
            texts = read_options(options)
            return texts, right_option(texts, self.read_text("answer", answer), style) if texts else ""
        except RowError as error:
            self.add_problem(error.what, f"Row skipped. {error.fix}")
            self._fault = error.what
            return (), ""

    def finish(
        self,
        images: Sequence[str],
        question: str,
        answer: str,
        kind: Kind,
        split: str,
        meta: dict[str, str],
        answer_name: str = "answer",
        history: History = (),
        options: Sequence[str] = (),
    ) -> None:
        """Add the row to the reader's examples, or skip it if its image, answer or question is empty.

        A report may have an empty question. A row with options is of kind choice.

        Args:
            images: image keys.
            question: the question; empty for a report.
            kind: open, closed or report, of a row without options.
            meta: further fields; empty values are dropped.
            answer_name: name of the answer's field, for the message about an empty answer.
            history: the turns before the question.
            options: the options of a choice; `answer` is the text of one of them.

        Raises:
            InputError: the id, an image key or a field of `meta` contains half of a surrogate pair.
        """
        meta = {key: value for key, value in meta.items() if value}
        if "language" in meta:
            meta["language"] = language_tag(meta["language"])
        if has_half_character((self.id, self.row, images, meta)):
            what = "its id or a field contains half of a surrogate pair"
            raise InputError(f"{self.file}, row {self.row}: {what}. Write the whole character, or remove it.")
        options = tuple(options) if answer else ()  # without an answer there is nothing to check them against
        kind = "choice" if options else kind
        example = Example(self.id, tuple(images), question, answer, kind, split, meta, history, options)
        if self._fault:
            self._reader.skip(example, self._fault)
            return
        empty = "image" if not all(images) or not images else answer_name if not answer else ""
        if not empty and not question and kind != "report":
            empty = "question"
        if empty:
            self.add_problem(f"{empty} is empty", "Row skipped. Fill it in to use the row.")
            self._reader.skip(example, f"{empty} is empty")
        else:
            self._reader.examples.append(example)


def known_kind(word: str) -> Kind:
    """Check that a word is a kind of example. Raises `RowError` if it is none."""
    for kind in KINDS:
        if kind == word:
            return kind
    raise RowError(f"kind is unknown{did_you_mean(word, KINDS)}", f"Known kinds: {', '.join(KINDS)}.")
