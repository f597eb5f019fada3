"""The user's own data as a table, in any format of `normtune.data.reading.sources`: one question or report a row."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from normtune.data.formats import FORMATS
from normtune.data.images.files import ImageFolder
from normtune.data.reading.cells import clean_text, is_yes_no
from normtune.data.reading.choices import options_of_kind
from normtune.data.reading.columns import Columns, columns_note, find_columns, holds_reports, letters, parse_columns
from normtune.data.reading.embedded_images import EmbeddedImages, embedded_image
from normtune.data.reading.image_names import find_image_keys, identifier_column, identifier_of, index_dicom
from normtune.data.reading.image_paths import check_image_path, find_image_folder, image_key
from normtune.data.reading.row_reader import RowReader, known_kind
from normtune.data.reading.sources import Source, SourceRow, open_sources
from normtune.data.reading.tables import RowError
from normtune.data.records import Dataset, Kind, Problem
from normtune.data.split_names import split_name
from normtune.errors import InputError, did_you_mean

_NEEDED = {"image": "the image", "question": "the question", "answer": "the answer"}
FIELDS = ("image", "question", "answer", "id", "kind", "split", "options")  # all other columns become `meta`


def read(
    root: Path,
    *,
    format: str,
    name: str | None = None,
    strict: bool = True,
    columns: str | Mapping[str, str] | None = None,
    task: Literal["vqa", "report"] = "vqa",
    slices: int | None = None,
    montage: bool = False,
    image_root: Path | None = None,
    licence: str = "unknown",
    text_only: bool = False,
) -> Dataset:
    """Read a file or folder of rows.

    An image cell is a path, relative to the table or to `images/` beside it, or absolute; several paths as a list,
    as JSON or separated by `;` or `|`; or, in parquet and Arrow files, the encoded image. `kind` is open, closed or
    report; by default yes and no are closed and all other answers open. `split` is by default that of the file's
    name, else train. A report needs no question. A row with options is a choice: see
    `normtune.data.reading.choices` for the forms of options and answers. All other columns of text or numbers become
    `meta`.

    Args:
        root: a file, a folder, or for parquet a hub name owner/name.
        format: a key of `FORMATS`.
        name: the dataset's name; by default its format.
        strict: raise an error that names the bad rows; otherwise skip them and list them as problems. Bad rows of
            parquet files are always listed.
        columns: which columns to read, such as "image=scan,answer=report"; the others are found by their names.
        task: "report": answers without a question are reports.
        slices, montage: how volumes become images; see `normtune.data.images.volumes.expand_volumes`.
        image_root: folder that image paths are relative to.
        licence: licence of the data.
        text_only: keep rows with missing image files, and list the files.

    Raises:
        InputError: the file cannot be read in this format, has no such column or no usable row, or (strict) has a bad
            row.
    """
    reader = RowReader(name or format, text_only)
    stated = parse_columns(columns)
    if slices is None and not montage:
        from normtune.data.datasets.large_table import NotPlain, is_large, read_large  # pyarrow takes half a second

        if is_large(root, format):
            base = root if root.is_dir() else root.parent
            try:
                table = Rows(reader, format, base, strict and format != "parquet", licence)
                return read_large(table, root, format, task, stated, image_root)
            except NotPlain:
                reader = RowReader(name or format, text_only)
    try:
        base, sources = open_sources(root, format, reader.notes)
        table = Rows(reader, format, base, strict and format != "parquet", licence)
        for source in sources:
            table.add(source, stated, task)
    except InputError as error:
        raise InputError(f"{error} (Read as {format}: {FORMATS[format]}.)") from error
    return table.finish(image_root, slices, montage)


class Rows:
    """Collects the rows of the sources as examples."""

    IMAGE_FOLDERS = ("", "images", "image", "imgs")  # searched below the table's folder

    def __init__(
        self,
        reader: RowReader,
        format: str,
        base: Path,
        strict: bool,
        licence: str = "unknown",
        rows: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        self.reader, self.format, self.base, self.strict, self.licence = reader, format, base, strict, licence
        self.images = EmbeddedImages(base, rows=rows)
        self.errors: list[Problem] = []
        self.identified: dict[str, tuple[str, ...]] | None = None  # identifier of a DICOM file -> its image names

    def add(self, source: Source, stated: Columns, task: str) -> None:
        """Read the rows of a source. Raises `InputError` if a column is missing."""
        columns, is_report = self.columns_of(source, stated, task)
        for row in source.rows:
            try:
                self._read_row(source, row, columns, is_report)
            except RowError as error:
                self.errors.append(Problem(source.name, str(row.number), error.what, error.fix))
                self.reader.skip_unread(f"{source.stem}-{row.number}", source.split, error.what)

    def finish(self, image_root: Path | None, slices: int | None, montage: bool) -> Dataset:
        """Find the image files, and build the dataset.

        Raises:
            InputError: (strict) a row is bad or its image is missing; or no row can be used.
        """
        reader, images = self.reader, self.images
        if without_option := reader.resolve_answers():
            files = list(dict.fromkeys(file for file, _ in reader.locations.values()))
            self.errors = sorted(self.errors + without_option, key=lambda e: (files.index(e.file), int(e.row)))
        names = dict.fromkeys(name for example in reader.examples for name in example.images if name not in images)
        folder = image_root or find_image_folder(self.base, self.IMAGE_FOLDERS, names)
        images.folder = ImageFolder(folder)
        keys, notes = find_image_keys(folder, names, slices, montage)
        reader.notes += notes
        if keys:
            reader.examples = [
                replace(example, images=tuple(key for name in example.images for key in keys.get(name, (name,))))
                for example in reader.examples
            ]
        present = _Present(images, {key for keys_of in keys.values() for key in keys_of})
        if self.format == "parquet" or reader.text_only:
            reader.check_images(folder, embedded=present)
        else:
            self.errors += [
                Problem(
                    *reader.locations[example.id], f"image '{absent[0]}' is missing", f"Paths are relative to {folder}."
                )
                for example, absent in reader.skip_missing_images(folder, present)
            ]
        reader.report_bad_rows(self.errors, "line" if self.format == "jsonl" else "row", self.strict)
        reader.check_repeats()
        return reader.build_dataset(images, self.licence)

    def columns_of(self, source: Source, stated: Columns, task: str) -> tuple[Columns, bool]:
        """Which columns of a source are read, and whether all of its rows are reports."""
        columns = self._columns(source, stated, task)
        return columns, "kind" not in columns and (task == "report" or holds_reports(columns))

    def _columns(self, source: Source, stated: Columns, task: str) -> Columns:
        """Which columns of a source are read; the note shows those that were found by other names."""
        columns = find_columns(source.columns, stated, exact=self.format == "jsonl")
        identifier = identifier_of(columns["image"][0]) if "image" in columns else None
        if "image" not in columns or (identifier and len(columns["image"]) == 1):
            column = columns["image"][0] if identifier else identifier_column(source.columns)
            if column is not None and self.identified is None:
                self.identified = index_dicom(self.base, column)
            if column is not None and self.identified:
                columns = columns | {"image": (column,)}
        if not source.columns:
            return columns
        for role, what in _NEEDED.items():
            needless = role == "question" and ("kind" in columns or task == "report" or holds_reports(columns))
            if role in columns or needless:
                continue
            advice = " If the answers are reports, add --task report." if role == "question" else ""
            raise InputError(
                f"{source.name} has no column for {what}; its columns are {', '.join(source.columns)}. "
                f"Name it with --columns {role}=COLUMN.{advice}"
            )
        note = columns_note(columns)
        if any(names != (role,) for role, names in columns.items()) and note not in self.reader.notes:
            self.reader.notes.append(note)
        return columns

    def _read_row(self, source: Source, row: SourceRow, columns: Columns, is_report: bool) -> None:
        """Add a row to the examples. Raises `RowError` if it cannot be used."""
        cells = row.cells
        if isinstance(cells, RowError):
            raise cells
        if not isinstance(cells, dict):
            raise RowError("not a JSON object", 'Write {"image": ..., "question": ..., "answer": ...}.')
        stated = _optional_text(cells, columns, "kind")
        lenient = self.format == "parquet" or (stated and letters(columns["kind"][0]) == "answertype")
        kind: Kind | None = "report" if is_report else None
        if stated and not lenient:
            kind = known_kind(stated.lower())
        options = options_of_kind([cells.get(name) for name in columns.get("options", ())], kind)
        images = self._image_names(source, row, columns)
        needs_question = kind != "report" or _filled(cells, columns, "question")
        question = _text(cells, columns, "question") if needs_question else ""
        answer = _text(cells, columns, "answer")
        split = split_name(_optional_text(cells, columns, "split")) or source.split
        id = _optional_text(cells, columns, "id")
        if self.format == "parquet":
            id = f"{self.reader.name}-{id or f'{split}-{len(self.reader.locations)}'}"
        elif self.format == "jsonl" and id in self.reader.locations:
            raise RowError("its id is used by an earlier row", "Give each row its own id.")
        example = self.reader.start_row(source.name, str(row.number), id or f"{source.stem}-{row.number}")
        if options:
            self.reader.answers[example.id] = answer
            answer = options[0]  # until `RowReader.resolve_answers`
        elif stated and lenient:
            kind = example.read_kind(stated, answer)
        kind = kind or ("closed" if is_yes_no(answer) else "open")
        example.finish(images, question, answer, kind, split, self._meta(cells, columns), options=options)

    def _image_names(self, source: Source, row: SourceRow, columns: Columns) -> list[str]:
        """The row's images: keys of embedded ones, and normalised paths, so that one file has one key."""
        names: list[str] = []
        image_columns = columns.get("image", ("image",))
        for column in image_columns:
            if len(image_columns) > 1 and names and not _filled_cell(row.cells.get(column)):
                continue  # a row may have fewer views than there are columns
            value = row.cells.get(column)
            if column not in row.cells:
                _text(row.cells, {"image": (column,)}, "image")  # raises: the field is missing
            items = self._items(value)
            for index, item in enumerate(items):
                data = embedded_image(item)
                if data and row.location is not None:
                    names.append(self.images.add(data, row.location, column, index))
                    continue
                path = item.get("path") if isinstance(item, dict) else item
                text = _text({"image": os.fspath(path) if isinstance(path, Path) else path}, {}, "image")
                if self.identified and identifier_of(column):
                    if text not in self.identified:
                        what = f"no DICOM file has the value of {column}"
                        raise RowError(what, "Put the file into the folder, or correct the row.")
                    names += self.identified[text]
                    continue
                names.append(self.path_key(source, str(row.number), text, len(names) + 1))
        return names

    def _items(self, value: Any) -> list[Any]:
        """The images of a cell: a list, a text with a JSON list or several paths, or one image."""
        if isinstance(value, list | tuple):
            return list(value) or [None]
        if not isinstance(value, str) or self.format in ("jsonl", "parquet"):
            return [value]
        if value.lstrip().startswith("["):
            try:
                paths = json.loads(value)
            except ValueError:
                raise RowError("image is not a JSON list", 'Write ["a.png", "b.png"], or a.png;b.png.') from None
            return list(paths) or [None]
        parts = [part for part in re.split(r"[;|]", value) if part.strip()]
        return parts if len(parts) > 1 and not (self.base / value).is_file() else [value]

    def path_key(self, source: Source, row: str, path: str, number: int) -> str:
        """The key of an image file: its normalised path; `number` is the position of the image in its row.

        Raises:
            RowError, InputError: it is no path.
        """
        text = _text({"image": path}, {}, "image")
        check_image_path(f"image {number}", text)
        if self.format == "parquet":
            return image_key(source.name, row, text)
        text = text if self.format == "jsonl" else text.replace("\\", "/")
        return os.path.normpath(os.path.join(source.folder, text))

    def _meta(self, cells: dict[str, Any], columns: Columns) -> dict[str, str]:
        """The other columns of text or numbers."""
        names = {column: role for role, columns_of in columns.items() for column in columns_of}
        meta: dict[str, str] = {}
        for column, value in cells.items():
            role = names.get(column)
            if not _filled_cell(value) or not isinstance(value, str | int | float):
                continue
            if role not in FIELDS:
                meta[meta_name(role, column)] = str(value)
        return meta


def meta_name(role: str | None, column: str) -> str:
    """The name in `meta` of a column that is not one of `FIELDS`: the name of its role, if it has one."""
    return {"patient": "patient_id"}.get(role, role) if role else column


@dataclass(frozen=True)
class _Present:
    """The image keys that are no files to look for: embedded images, and files and volumes that were found."""

    images: EmbeddedImages
    keys: set[str]

    def __contains__(self, key: object) -> bool:
        return key in self.keys or key in self.images


def _filled_cell(value: Any) -> bool:
    return value is not None and value != "" and not (isinstance(value, float) and math.isnan(value))


def _filled(cells: Mapping[str, Any], columns: Columns, role: str) -> bool:
    return any(_filled_cell(cells.get(column)) for column in columns.get(role, ()))


def _optional_text(cells: Mapping[str, Any], columns: Columns, role: str) -> str:
    """The text of a role that may be missing or empty."""
    return _text(cells, columns, role) if _filled(cells, columns, role) else ""


def _text(cells: Mapping[str, Any], columns: Columns, role: str) -> str:
    """The text of a role that must be filled; the texts of several columns are joined.

    Raises:
        RowError: no column of the role is filled, or a cell is no text.
    """
    names = columns.get(role, (role,))
    if not any(name in cells for name in names):
        hint = did_you_mean(names[0], [key for key in cells if key not in FIELDS])
        what = f"field '{names[0]}' is missing{hint.replace('did you mean', 'is it')}"
        raise RowError(what, f"Add '{names[0]}'.")
    texts = []
    for name in names:
        try:
            text, _ = clean_text(cells.get(name), lines=role in ("question", "answer"))
        except InputError as error:
            raise RowError(f"{name} {error}", "Write it as text.") from error
        texts += [text] if text else []
    if not texts:
        what = f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} empty"
        raise RowError(what, "Fill it in, or remove the row.")
    return ("\n" if role == "question" else " ").join(texts)
