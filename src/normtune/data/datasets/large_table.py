"""Reads large JSONL, CSV, TSV and parquet files of rows in blocks of columns, into a memory-mapped table.

`normtune.data.datasets.table` defines what a row means. This module applies the same functions once to each distinct
value of a column of a block, and not to each cell: the examples are the same. If a block has a row that is not plain
(an empty cell, an unknown kind, text that is not JSON ...), the functions of `table` read its rows one by one and list
what is wrong. To read another format in blocks, add it to `_BLOCKS`: a function that yields a `Block` for some
100,000 rows; `column_texts` does the rest.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from normtune.data.datasets.table import FIELDS, Rows, meta_name
from normtune.data.examples import META, Examples, combine_hashes, image_keys, repeated_rows
from normtune.data.formats import FORMATS, files_of_format
from normtune.data.images.files import ImageFolder
from normtune.data.reading.blocks import Block, NotPlain, delimited_blocks, jsonl_blocks, parquet_blocks
from normtune.data.reading.cells import clean_text, is_yes_no, language_tag
from normtune.data.reading.choices import Style, read_options, right_options
from normtune.data.reading.columns import Columns, letters
from normtune.data.reading.image_names import find_image_keys
from normtune.data.reading.image_paths import find_image_folder, missing_images
from normtune.data.reading.row_reader import known_kind
from normtune.data.reading.sources import Source
from normtune.data.reading.tables import RowError
from normtune.data.records import Dataset, Problem
from normtune.data.row_table import OPTIONS, SEPARATOR, RowTableWriter
from normtune.data.split_names import split_name
from normtune.errors import InputError

LARGE_BYTES = 64 * 2**20  # smaller files are read row by row, as lists
_LARGE_ROWS = 300_000  # parquet files count by rows: they are compressed, and a row may take ten bytes
_MAX_LISTED = 10_000  # repeated rows that are listed one by one; the others are counted
_SEVERAL = r"[;|]|^\s*\["  # a cell of CSV files that may have several paths
_NUMBERS = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean)
_ERRORS = (
    InputError,
    pa.ArrowException,
    KeyError,
    TypeError,
    ValueError,
    OverflowError,
    RecursionError,
)  # a block that is not plain


def is_large(root: Path, format: str) -> bool:
    """Whether the files of a format are large, and this module can read them."""
    if format not in _BLOCKS or not root.exists():
        return False
    files = _files(root, format)
    if format == "jsonl" and any(file.suffix == ".gz" for file in files):
        return False  # blocks of compressed lines cannot be read
    if sum(file.stat().st_size for file in files) >= LARGE_BYTES:
        return True
    return format == "parquet" and sum(map(_parquet_rows, files)) >= _LARGE_ROWS


def read_large(rows: Rows, root: Path, format: str, task: str, stated: Columns, image_root: Path | None) -> Dataset:
    """Read files as `normtune.data.datasets.table.read` does.

    Raises:
        NotPlain: they must be read row by row.
        InputError: (strict) a row is bad or its image is missing; or no row can be used.
    """
    with closing(RowTableWriter()) as writer:
        reader = _BlockReader(rows, writer)
        try:
            for file in _files(root, format):
                name = file.relative_to(root).as_posix() if root.is_dir() else file.name
                for block in _BLOCKS[format](file, name, rows.reader.notes):
                    reader.add(block, stated, task)
        except InputError as error:
            raise InputError(f"{error} (Read as {format}: {FORMATS[format]}.)") from error
        return reader.finish(image_root)


class _BlockReader:
    """Writes blocks to a table, and then checks what concerns all rows: ids, images, repeated rows."""

    def __init__(self, rows: Rows, writer: RowTableWriter) -> None:
        self.rows, self.reader, self.writer = rows, rows.reader, writer
        self.places: list[tuple[int, str, int | None]] = []  # first row of the table, file, its number there

    def add(self, block: Block, stated: Columns, task: str) -> None:
        """Read one block."""
        columns, is_report = self.rows.columns_of(block.source, stated, task)
        if self.rows.identified:
            raise NotPlain
        try:
            texts = column_texts(block, columns, self.rows, is_report, first_id=self.writer.rows)
        except _ERRORS:
            if self.rows.format == "parquet":  # its default ids number the rows of all files
                raise NotPlain from None
            self.places.append((self.writer.rows, block.source.name, None))
            self.rows.add(replace(block.source, rows=block.rows()), stated, task)
            known = set(self.reader.styles)
            self.rows.errors += self.reader.resolve_answers()
            _check_styles(known, set(self.reader.styles))
            self.writer.add_examples(self.reader.examples)
            self.reader.examples = []
            return
        self.places.append((self.writer.rows, block.source.name, block.first))
        self.writer.add(texts)

    def finish(self, image_root: Path | None) -> Dataset:
        """Check the rows and build the dataset, in the same steps as `table.Rows.finish`."""
        examples = Examples(self.writer.finish())
        reader, images = self.reader, self.rows.images
        keys = image_keys(examples)
        folder = image_root or find_image_folder(self.rows.base, self.rows.IMAGE_FOLDERS, keys)
        images.folder = ImageFolder(folder)
        missing = missing_images(folder, keys)
        if find_image_keys(folder, keys, None, False, missing)[0]:  # volumes, or names without their ending
            raise NotPlain
        repeated_ids = _later_ones(examples.hashes("id"))
        if len(repeated_ids) and self.rows.format != "jsonl":  # they get new ids
            raise NotPlain
        what, fix = "its id is used by an earlier row", "Give each row its own id."
        bad = dict.fromkeys(repeated_ids.tolist(), (what, what, fix))
        if missing and (self.rows.format == "parquet" or reader.text_only):
            raise NotPlain  # listed by file
        for row in np.flatnonzero(examples.flags("images", lambda keys: not missing.isdisjoint(keys))).tolist():
            name = next(name for name in examples[row].images if name in missing)
            what = f"image '{name}' is missing"
            bad.setdefault(row, ("image is missing", what, f"Paths are relative to {folder}."))
        files = {file: number for number, file in enumerate(dict.fromkeys(file for _, file, _ in self.places))}
        errors = self.rows.errors
        for row in sorted(bad, key=lambda row: (bad[row][0] == "image is missing", row)):
            reason, what, fix = bad[row]
            errors.append(Problem(*self._place(examples, row), what, fix))
            reader.skip(examples[row], reason)
        errors.sort(key=lambda error: (error.what.startswith("image '"), files[error.file], int(error.row)))
        reader.report_bad_rows(self.rows.errors, "line" if self.rows.format == "jsonl" else "row", self.rows.strict)
        usable = np.ones(len(examples), np.bool_)
        usable[list(bad)] = False
        self._list_repeats(examples, np.flatnonzero(usable))
        return reader.build_dataset(images, self.rows.licence, examples.where(usable))

    def _list_repeats(self, examples: Examples, usable: NDArray[np.int64]) -> None:
        """List each row with the same image, question and answer as an earlier row of its split."""
        rows = combine_hashes(examples.hashes("question"), examples.hashes("answer"))
        rows = combine_hashes(rows, examples.codes("split")[0], examples.codes("images")[0])
        repeats = usable[_later_ones(rows if len(usable) == len(rows) else rows[usable])].tolist()
        what = "same image, question and answer as an earlier row"
        fix = "Kept, as in published counts. Remove the row if it should count once."
        for row in repeats[:_MAX_LISTED]:
            self.reader.problems.append(Problem(*self._place(examples, row), what, fix))
        if len(repeats) > _MAX_LISTED:
            more = f"{what}: {len(repeats) - _MAX_LISTED} rows more"
            self.reader.problems.append(Problem(self._place(examples, repeats[_MAX_LISTED])[0], "", more, fix))

    def _place(self, examples: Examples, row: int) -> tuple[str, str]:
        """(file, row) of a row of the table, for messages."""
        start, file, first = self.places[bisect_right(self.places, row, key=lambda place: place[0]) - 1]
        if first is None:
            return self.reader.locations[examples[row].id]
        return file, str(first + row - start)


def column_texts(block: Block, columns: Columns, rows: Rows, is_report: bool, first_id: int) -> dict[str, pa.Array]:
    """The columns of a block as `RowTableWriter.add` takes them; the same texts as `Rows.read_row` makes of the cells.

    Args:
        is_report: whether all rows are reports.
        first_id: the number of the first row, in parquet files without ids.

    Raises:
        One of `_ERRORS`: a row needs more than this.
    """
    cells = block.cells()
    count, source, format = cells.num_rows, block.source, rows.format
    column_of = {role: names[0] for role, names in columns.items()}
    if any(len(names) > 1 for role, names in columns.items() if role != "options"):
        raise KeyError("several columns of one role are joined row by row")

    def column(role: str) -> pa.Array | None:
        name = column_of.get(role, role if role in ("image", "question", "answer") else None)
        return _combined(cells.column(name)) if name in cells.column_names else None

    def text(value: Any, lines: bool = False) -> str:
        if type(value) is str and value.isprintable() and value == value.strip():
            return value  # as `clean_text` would, for most texts
        return clean_text(value, lines=lines)[0]

    def needed(role: str) -> pa.Array:
        array = column(role)
        if array is None or not _holds_texts(array):
            raise KeyError(role)
        return _filled(array if _is_clean(array) else mapped(array, lambda value: text(value, lines=True)))

    def optional(role: str, function: Callable[[str], str]) -> pa.Array:
        """`function` of the texts; null where the cell is empty."""
        array = column(role)
        if array is None or pa.types.is_null(array.type):
            return pa.nulls(count, pa.string())
        if not _holds_texts(array):
            raise KeyError(role)

        if function is str and _is_clean(array):
            return pc.replace_with_mask(array, pc.equal(array, ""), pa.scalar(None, pa.string()))

        def make(value: Any) -> str | None:
            cleaned = text(value)
            return function(cleaned) if cleaned else None

        return mapped(array, make)

    answer = needed("answer")
    question = column("question")
    question = pa.repeat(pa.scalar(""), count) if is_report and question is None else needed("question")
    by_answer = mapped(answer, lambda value: "report" if is_report else "closed" if is_yes_no(value) else "open")
    lenient = format == "parquet" or letters(column_of.get("kind", "kind")) == "answertype"
    kind = optional("kind", _stated_kind if lenient else lambda word: known_kind(word.lower()))
    split = pc.coalesce(optional("split", split_name), pa.scalar(source.split))
    numbers = pa.array(np.arange(block.first, block.first + count)).cast(pa.string())
    options: pa.Array | None = None
    if "options" in columns:
        options, answer, kind = _choices(cells, columns["options"], answer, kind, lenient, rows)
    elif pc.any(pc.equal(kind, "choice")).as_py():
        raise ValueError("a choice has no options")
    id = optional("id", str)
    if format == "parquet":
        numbers = pa.array(np.arange(first_id, first_id + count)).cast(pa.string())
        id = pc.coalesce(id, pc.binary_join_element_wise(split, numbers, "-"))
        id = pc.binary_join_element_wise(pa.scalar(rows.reader.name), id, "-")
    else:
        id = pc.coalesce(id, pc.binary_join_element_wise(pa.scalar(source.stem), numbers, "-"))
    texts = {"id": id, "images": _images(column("image"), source, rows), "question": question, "answer": answer}
    texts |= {"kind": pc.coalesce(kind, by_answer), "split": split}
    texts |= {} if options is None else {OPTIONS: options}
    roles = {name: role for role, names in columns.items() for name in names}
    for name in cells.column_names:
        role, array = roles.get(name), _combined(cells.column(name))
        if role not in FIELDS and _holds_texts(array):
            key = meta_name(role, name)
            make: Callable[[str], str] = language_tag if key == "language" else str
            texts[META + key] = mapped(array, partial(_meta_text, make=make))
    return texts


def _choices(
    cells: pa.Table, names: tuple[str, ...], answer: pa.Array, kind: pa.Array, lenient: bool, rows: Rows
) -> tuple[pa.Array, pa.Array, pa.Array]:
    """The joined options of each row (null: none), its answer (for a choice, the text of an option) and its kind.

    Raises:
        NotPlain: the answers name options in another way than in earlier blocks.
        InputError, ValueError: a row has a fault, or a kind that contradicts its options.
    """
    columns = [cells.column(name).to_pylist() for name in names]
    options = [read_options(row_cells) for row_cells in zip(*columns, strict=True)]
    texts, kinds = answer.to_pylist(), kind.to_pylist()
    choices = [row for row, row_options in enumerate(options) if row_options]
    answers, styles = right_options((options[row], texts[row]) for row in choices)
    for row, right in zip(choices, answers, strict=True):
        if isinstance(right, RowError):
            raise right
        if kinds[row] not in (None, "choice") and not lenient:
            raise ValueError("kind")
        texts[row], kinds[row] = right, "choice"
    if any(kinds[row] == "choice" and not row_options for row, row_options in enumerate(options)):
        raise ValueError("options")
    _check_styles(set(rows.reader.styles), set(styles))
    rows.reader.styles += styles
    joined = [SEPARATOR.join(row_options) or None for row_options in options]
    return pa.array(joined, pa.string()), pa.array(texts, pa.string()), pa.array(kinds, pa.string())


def _check_styles(known: set[Style], new: set[Style]) -> None:
    """Check that answers name options in one way in all blocks: which one it is follows from all rows of a file."""
    if known and new and known != new:
        raise NotPlain


def mapped(array: pa.Array, function: Callable[[Any], str | None]) -> pa.Array:
    """`function` of each value, called once for each distinct one; null stays null."""
    encoded = array.dictionary_encode()
    values = encoded.dictionary.to_pylist()
    texts = list(map(function, values))
    return array if texts == values else pa.array(texts, pa.string()).take(encoded.indices)


def _is_clean(array: pa.Array) -> bool:
    """Whether `clean_text` changes none of these texts: they are printable ASCII without blanks around them."""
    if not pa.types.is_string(array.type):
        return False
    trimmed = pc.equal(pc.ascii_trim_whitespace(array), array)
    return bool(pc.all(pc.and_(pc.ascii_is_printable(array), trimmed)).as_py() is not False)


def _meta_text(value: Any, make: Callable[[str], str]) -> str | None:
    """As `Rows` makes fields of `meta`: empty texts and NaN are left out."""
    return None if value == "" or value != value else make(str(value))


def _stated_kind(word: str) -> str:
    if word.upper() not in ("OPEN", "CLOSED"):
        raise ValueError(word)
    return word.lower()


def _images(array: pa.Array | None, source: Source, rows: Rows) -> pa.Array:
    """The keys of each row, joined."""

    def key(value: Any) -> str:
        return rows.path_key(source, "0", value, 1)

    if array is not None and pa.types.is_string(array.type):
        if rows.format not in ("jsonl", "parquet") and pc.any(pc.match_substring_regex(array, _SEVERAL)).as_py():
            raise KeyError("several images in a cell")
        return _filled(mapped(array, key))
    if array is None or not pa.types.is_list(array.type) or rows.format != "jsonl":
        raise NotPlain  # images inside the file
    if array.null_count or (pc.list_value_length(array).to_numpy() == 0).any():
        raise KeyError("image")
    keys = pa.ListArray.from_arrays(array.offsets, _filled(mapped(array.values, key)))
    return pc.binary_join(keys, SEPARATOR)


def _filled(array: pa.Array) -> pa.Array:
    if array.null_count or pc.any(pc.equal(array, "")).as_py():
        raise ValueError("an empty cell")
    return array


def _holds_texts(array: pa.Array) -> bool:
    return pa.types.is_string(array.type) or any(is_number(array.type) for is_number in _NUMBERS)


def _combined(column: pa.ChunkedArray) -> pa.Array:
    column = column.cast(pa.string()) if pa.types.is_large_string(column.type) else column
    combined = column.combine_chunks()
    return combined if isinstance(combined, pa.Array) else pa.concat_arrays(combined.chunks)


def _later_ones(hashes: NDArray[np.int64]) -> NDArray[np.int64]:
    """The rows with the hash of an earlier row, in order."""
    rows = repeated_rows(hashes)
    order = rows[np.argsort(hashes[rows], kind="stable")]
    equal = hashes[order[1:]] == hashes[order[:-1]]
    return np.sort(order[1:][equal])


def _files(root: Path, format: str) -> list[Path]:
    if root.is_file():
        return [root]
    if format == "parquet":
        return sorted(file for file in root.rglob("*.parquet") if file.is_file())
    return files_of_format(root, format)


def _parquet_rows(file: Path) -> int:
    try:
        return int(pq.read_metadata(file).num_rows)
    except (pa.ArrowException, OSError):  # reading the rows raises an InputError
        return 0


_BLOCKS: dict[str, Callable[[Path, str, list[str]], Iterator[Block]]] = {
    "jsonl": jsonl_blocks,
    "parquet": parquet_blocks,
    "csv": delimited_blocks("csv"),
    "tsv": delimited_blocks("tsv"),
}
