"""Conversations about images: `messages` with `images`, and `conversations` of ShareGPT and LLaVA-Med."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from normtune.data.images.files import ImageFolder
from normtune.data.reading.cells import is_yes_no, split_of_file
from normtune.data.reading.choices import options_of_kind, without_options
from normtune.data.reading.conversations import CONVERSATION_FIELDS, read_conversation
from normtune.data.reading.embedded_images import EmbeddedImages, RowLocation, embedded_image
from normtune.data.reading.image_paths import check_image_path, find_image_folder
from normtune.data.reading.row_reader import RowReader, known_kind
from normtune.data.reading.sources import SourceRow, arrow_files, arrow_rows, parquet_rows
from normtune.data.reading.tables import RowError, check_characters, json_lines
from normtune.data.records import Dataset, Example, Kind, Problem
from normtune.data.split_names import SPLITS, split_name
from normtune.errors import InputError, did_you_mean
from normtune.runtime.files import read_json

# Columns with a meaning; all others become `meta`.
_FIELDS = (*CONVERSATION_FIELDS, "id", "kind", "split", "domain", "options")
_IMAGE_FOLDERS = ("", "images", "image")  # searched below the file's folder


def read(
    root: Path,
    *,
    strict: bool = True,
    image_root: Path | None = None,
    licence: str = "unknown",
    text_only: bool = False,
    history: bool = False,
) -> Dataset:
    """Read a file, or all *.jsonl, *.json and *.parquet files of a folder; each row is one conversation.

    For the layout of a row see `normtune.data.reading.conversations.read_conversation`. Each question-answer
    pair becomes one example, with the images that were shown before the answer. Without `history`, its question is
    answered without the turns before it. A later pair that refers back to earlier turns (see
    `conversations.refers_back`) is therefore skipped and listed; the notes count all pairs and the skipped ones.
    Rows without an image are skipped and listed.

    A conversation of one question with a list `options` is a choice; its answer is a letter, a number or the text of
    an option; options at the end of the question are removed from it. Questions without this field stay open.

    Optional fields: `id`; `kind` (open, closed or report; by default yes and no are closed); `split` (by
    default from the file's name, else train). LLaVA-Med's `domain` becomes the modality. All other fields of
    text or numbers become `meta`.

    Ids are the row's id, with `-turn2` and so on for later pairs. Such files often use an image's id for
    several conversations: repeated ids are numbered and listed.

    Args:
        root: a file or a folder.
        strict: raise an error that names the bad rows; otherwise skip them and list them as problems.
        image_root: folder that image paths are relative to; by default the file's folder, or images/ in it.
        licence: licence of the data.
        text_only: keep rows with missing image files.
        history: each later pair of a conversation sees the turns before it; none is skipped for referring back.

    Raises:
        InputError: there is no such file, no usable row, or (strict) a bad row.
    """
    files = _files(root)
    reader = RowReader("messages", text_only)
    base = root if root.is_dir() else root.parent
    progress = _Progress(base.absolute(), EmbeddedImages(base), history)
    for file, split in files:
        for source in _rows(reader, file, named=len(files) == 1):
            try:
                _read_row(reader, progress, file, split, source)
            except RowError as error:
                (reader.problems if error.harmless else progress.errors).append(
                    Problem(file.name, str(source.number), error.what, error.fix)
                )
                reader.skip_unread(f"{file.stem}-{source.number}", split, error.what)
    progress.errors += reader.resolve_answers()
    reader.report_bad_rows(progress.errors, "row", strict)
    names = (name for example in reader.examples for name in example.images if name not in progress.images)
    folder = image_root or find_image_folder(base, _IMAGE_FOLDERS, names)
    reader.check_images(folder, embedded=progress.images)
    reader.check_repeats()
    reader.notes += progress.notes()
    progress.images.folder = ImageFolder(folder)
    return reader.build_dataset(progress.images, licence)


@dataclass
class _Progress:
    """Counts and errors of the rows read so far."""

    base: Path  # the folder of the files, absolute
    images: EmbeddedImages  # inside parquet and Arrow files
    history: bool  # whether examples carry the turns before them
    conversations: int = 0
    pairs: int = 0
    dependent: int = 0  # pairs that were skipped as they refer back
    errors: list[Problem] = field(default_factory=list)

    def notes(self) -> list[str]:
        turns = "after" if self.history else "without"
        notes = [
            f"{self.conversations} conversations with {self.pairs} question-answer pairs: each pair is one "
            f"question about its image, answered {turns} the turns before it"
        ]
        if self.dependent:
            notes.append(f"{self.dependent} pairs skipped, as they refer back to earlier turns")
        return notes


def _files(root: Path) -> list[tuple[Path, str]]:
    """(file, split) of the data files of a folder, or of the file itself."""
    if not root.is_dir():
        return [(root, split_of_file(root))]
    if (root / "dataset_dict.json").is_file() or (root / "state.json").is_file():
        return [(file, split) for split, file in arrow_files(root)]
    files = [*sorted(root.glob("*.jsonl")), *sorted(root.glob("*.json")), *sorted(root.rglob("*.parquet"))]
    if not files:
        raise InputError(f"{root} holds no *.jsonl, *.json or *.parquet file. Point --root at one.")
    return [(file, split_of_file(file)) for file in files]


def _rows(reader: RowReader, file: Path, named: bool) -> Iterator[SourceRow]:
    """Yield the rows of a file, numbered from 1.

    A .json file without a list of rows is an error if it was `named` by the user, else only listed.
    """
    if file.suffix in (".parquet", ".arrow"):
        rows = parquet_rows(file) if file.suffix == ".parquet" else arrow_rows(file)
        yield from (SourceRow(row.number + 1, row.cells, row.location) for row in rows)
    elif file.suffix == ".jsonl":
        yield from (SourceRow(number, cells) for number, cells in json_lines(file))
    else:
        rows_of_file = read_json(file)
        if isinstance(rows_of_file, list):
            yield from (SourceRow(n, check_characters(cells)) for n, cells in enumerate(rows_of_file, start=1))
        elif named:
            raise InputError(f"{file} holds no list of rows. Write a list of conversations, or JSON lines.")
        else:  # such as LLaMA-Factory's dataset_info.json
            reader.problems.append(Problem(file.name, "", "holds no list of rows", "Not read."))


def _read_row(reader: RowReader, progress: _Progress, file: Path, split: str, source: SourceRow) -> None:
    number, cells = source.number, source.cells
    if isinstance(cells, RowError):
        raise cells
    if not isinstance(cells, dict):
        raise RowError("not a JSON object", 'Write {"messages": [...], "images": [...]}.')
    conversation = read_conversation(cells)
    kind = None if cells.get("kind") in (None, "") else known_kind(str(cells["kind"]))
    options = options_of_kind([cells.get("options")], kind)
    if options and len(conversation.pairs) > 1:
        what = f"options for {len(conversation.pairs)} questions"
        raise RowError(what, "Write a conversation for each question with options.")
    kind = None if kind == "choice" else kind
    split, id = _split(cells, split), _id(cells, file, number)
    column = "images" if cells.get("images") else "image"
    keys = [_key(progress, image, source.location, column, index) for index, image in enumerate(conversation.images)]
    progress.conversations += 1
    progress.pairs += len(conversation.pairs)
    earlier: list[tuple[str, str]] = []
    for pair in conversation.pairs:
        turn = f", turn {pair.turn}" if pair.turn > 1 else ""
        row = reader.start_row(file.name, f"{number}{turn}", f"{id}-turn{pair.turn}" if turn else id)
        answer = row.read_text("answer", pair.answer, lines=True)
        kind_of_pair: Kind = kind or ("closed" if is_yes_no(answer) else "open")
        images = keys[: pair.image_count]
        reason = "" if pair.learnt else "marked as not to be learnt"
        if not pair.learnt:
            row.add_problem(reason, "Skipped, as its weight is 0 or its loss is off.")
        elif pair.refers_back and not progress.history:
            reason = "refers back to earlier turns"
            progress.dependent += 1
            row.add_problem(reason, "Skipped. Write a question that needs no earlier turn, or give --history.")
        question = (
            pair.question if reason and not progress.history else row.read_text("question", pair.question, lines=True)
        )
        if reason:
            reader.skip(Example(row.id, tuple(images), question, pair.answer, kind_of_pair, split), reason)
        else:
            if options and answer:
                reader.answers[row.id] = answer
                question, answer = without_options(question, options), options[0]
            history = tuple(earlier) if progress.history else ()
            row.finish(images, question, answer, kind_of_pair, split, _meta(cells), history=history, options=options)
        earlier.append((question, answer))


def _key(progress: _Progress, image: Any, location: RowLocation | None, column: str, index: int) -> str:
    """An image's key: the SHA-1 of its bytes in a parquet file, or its path relative to the image folder."""
    data = embedded_image(image)
    if data is not None and location is not None:
        return progress.images.add(data, location, column, index)
    path = image.get("path") if isinstance(image, dict) else image
    if not isinstance(path, str) or not path.strip():
        raise RowError(f"image {index + 1} is not a path", "Write its path.")
    path = unquote(path.strip().removeprefix("file://")) if path.strip().startswith("file://") else path.strip()
    check_image_path(f"image {index + 1}", path)
    if Path(path).is_absolute() and Path(path).is_relative_to(progress.base):
        path = Path(path).relative_to(progress.base).as_posix()
    key = posixpath.normpath(path.replace("\\", "/"))
    if key.startswith(("/", "../")) or key == "..":
        what = f"the path of image {index + 1} is outside the image folder"
        raise RowError(what, "Write it relative to the file, or to images/ next to the file.")
    return key


def _split(cells: dict[str, Any], split: str) -> str:
    word = cells.get("split")
    if word in (None, ""):
        return split
    name = split_name(str(word))
    if name not in SPLITS:
        raise RowError(f"split is unknown{did_you_mean(name, SPLITS)}", f"Known splits: {', '.join(SPLITS)}.")
    return name


def _id(cells: dict[str, Any], file: Path, number: int) -> str:
    id = cells.get("id")
    return str(id) if isinstance(id, str | int) and str(id).strip() else f"{file.stem}-{number}"


def _meta(cells: dict[str, Any]) -> dict[str, str]:
    extra = {key: value for key, value in cells.items() if key not in _FIELDS}
    meta = {key: str(value) for key, value in extra.items() if isinstance(value, str | int | float)}
    domain = cells.get("domain")  # LLaVA-Med's {"chest_xray": true, "mri": false, ...}
    if isinstance(domain, dict):
        meta.setdefault("modality", ", ".join(str(name) for name, value in domain.items() if value is True))
    return meta
