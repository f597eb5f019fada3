"""Reads the rows of CSV and JSON-lines files; errors name the file and the row."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

from normtune.data.reading.cells import has_half_character
from normtune.errors import InputError
from normtune.runtime.files import read_json

_PEEK_LINES = 16  # that show the delimiter of a CSV file
_LARGE_BYTES = 64 * 2**20  # smaller files are read at once
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class RowError(InputError):
    """One row cannot be used: what is wrong with it, and how to fix it.

    A `harmless` row is correct, but of a kind that is not read: it is skipped and listed.
    """

    def __init__(self, what: str, fix: str, *, harmless: bool = False) -> None:
        super().__init__(what)
        self.what, self.fix, self.harmless = what, fix, harmless


def file_bytes(path: Path) -> bytes:
    """The bytes of a file; a file with a name that ends in .gz is decompressed.

    Raises:
        InputError: the file is missing, unreadable or a damaged archive.
    """
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if path.suffix == ".gz" else data
    except (OSError, EOFError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "damaged"
        raise InputError(f"cannot read {path}: {reason}. Check --root.") from error
    except Exception as error:  # zlib.error has no common base with the others
        raise InputError(f"cannot read {path}: damaged. Fetch it again.") from error


def json_lines(file: Path) -> Iterator[tuple[int, Any]]:
    """Yield (line number from 1, JSON value or `RowError`) for every line that is not blank.

    Raises:
        InputError: the file cannot be read.
    """
    yield from parse_json_lines(file_bytes(file).removeprefix(_BYTE_ORDER_MARK), 1)


def parse_json_lines(data: bytes, first: int) -> Iterator[tuple[int, Any]]:
    """Yield (line number, JSON value or `RowError`) for every line that is not blank; the first line is `first`."""
    for number, line in enumerate(data.split(b"\n"), start=first):
        if not line.strip():
            continue
        try:
            yield number, check_characters(json.loads(line))
        except UnicodeDecodeError:
            yield number, RowError("not UTF-8 text", "Save the file as UTF-8.")
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "too deep"
            yield number, RowError(f"not valid JSON ({reason})", "Write one JSON object a line.")


def check_characters(cells: Any) -> Any:
    """The row itself, or a `RowError` if one of its texts contains half of a surrogate pair."""
    if has_half_character(cells):
        return RowError("a text contains half of a surrogate pair", "Write the whole character, or remove it.")
    return cells


def json_rows(file: Path, name: str, dataset: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (number from 1, row) of a published file that holds a JSON list; a row that is no object is empty.

    Args:
        name: the file's name in messages.
        dataset: the dataset's name in messages.

    Raises:
        InputError: the file cannot be read, or holds no list.
    """
    rows = read_json(file)
    if not isinstance(rows, list):
        raise InputError(f"{file} holds no list of rows. Use {dataset}'s original {name}.")
    return ((number, cells if isinstance(cells, dict) else {}) for number, cells in enumerate(rows, start=1))


def json_objects(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, object) for every line that is not blank, of a published file.

    A fault is an error here, as a published file should have none: it is damaged or of another layout.

    Raises:
        InputError: the file cannot be read, or a line is not a JSON object.
    """
    for line, cells in json_lines(file):
        if isinstance(cells, RowError):
            raise InputError(f"{file.name}, row {line}: {cells.what}. {cells.fix}")
        if not isinstance(cells, dict):
            raise InputError(f"{file.name}, row {line}: not a JSON object. Fetch the file again.")
        yield line, cells


def csv_rows(file: Path, needed: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield (row number, column -> cell) for the rows of a published .csv or .csv.gz file.

    Args:
        needed: columns that the file must have.

    Yields:
        Row numbers as a spreadsheet shows them: the header is row 1.

    Raises:
        InputError: the file cannot be read or is not CSV, a column is missing, or a row has too many or too
            few cells.
    """
    header, rows = delimited_rows(file, ",")
    missing = [column for column in needed if column not in header]
    if missing:
        raise InputError(
            f"{file.name}, row 1: no column {', '.join(missing)}; its columns are {', '.join(header)}. "
            "Use the file as released, or rename its columns."
        )
    for number, cells in rows:
        if isinstance(cells, RowError):
            raise InputError(f"{file.name}, row {number}: {cells.what}. {cells.fix}")
        yield number, cells


def delimited_rows(
    file: Path, delimiter: str | None = None
) -> tuple[list[str], Iterator[tuple[int, dict[str, str] | RowError]]]:
    """The header of a CSV or TSV file, and its rows as (row number, column -> cell, or `RowError`).

    Args:
        file: the file, which may end in .gz.
        delimiter: the character between cells; None: the most frequent of comma, semicolon and tab in the header.

    Raises:
        InputError: the file cannot be read, is empty or is not UTF-8 text. Quotes that do not match raise it while
            rows are read.
    """
    lines = _text_lines(file)
    first = "".join(islice(lines, _PEEK_LINES))
    if "\0" in first[:4096]:
        raise InputError(f"{file.name} is not a text file: it holds zero bytes. Save it as CSV in UTF-8.")
    first_line = first.lstrip("\r\n").partition("\n")[0]
    delimiter = delimiter or max(",;\t", key=first_line.count)
    text = chain(io.StringIO(first, newline=""), lines)
    rows = _parsed_rows(file, csv.reader(text, delimiter=delimiter, strict=True))
    _, header = next(rows, (0, []))
    if not header:
        raise InputError(f"{file.name} is empty. Fill it, or fetch it again.")

    def as_cells() -> Iterator[tuple[int, dict[str, str] | RowError]]:
        for number, cells in rows:
            if len(cells) == len(header):
                yield number, dict(zip(header, cells, strict=True))
            else:
                what = f"{len(cells)} cells for {len(header)} columns"
                yield number, RowError(what, "Quote cells that contain the separator.")

    return header, as_cells()


def _text_lines(file: Path) -> Iterator[str]:
    """The lines of a text file, with their ends; a large file that is not compressed is never in memory as a whole.

    Raises:
        InputError: the file cannot be read, or is not UTF-8 text.
    """
    try:
        if file.suffix == ".gz" or not file.is_file() or file.stat().st_size < _LARGE_BYTES:
            yield from io.StringIO(file_bytes(file).removeprefix(_BYTE_ORDER_MARK).decode("utf-8"), newline="")
            return
        with open(file, encoding="utf-8-sig", newline="") as lines:
            yield from lines
    except UnicodeDecodeError as error:
        raise InputError(f"{file.name} is not UTF-8 text. Save it as UTF-8.") from error
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}. Check --root.") from error


def _parsed_rows(file: Path, reader: Iterator[list[str]]) -> Iterator[tuple[int, list[str]]]:
    """Yield (row number from 1, cells) of the rows that are not blank. Raises `InputError` if a quote is not closed."""
    number = 0
    try:
        for number, cells in enumerate(reader, start=1):
            if cells:
                yield number, cells
    except csv.Error as error:
        what = f"not valid CSV ({error})"
        raise InputError(f"{file.name}, row {number + 1}: {what}. Correct its quotes, or fetch it again.") from error


def find_table(root: Path, *names: str) -> Path | None:
    """The first file in `root` with one of these names, also with .gz; a name may be a glob pattern."""
    for name in names:
        for pattern in (name, f"{name}.gz"):
            files = sorted(path for path in root.glob(pattern) if path.is_file())
            if files:
                return files[0]
    return None
