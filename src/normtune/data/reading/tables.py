"""Rows of the file kinds that datasets come in (CSV, JSON lines), with the row's number for every fault."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from normtune.errors import InputError

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Fault(InputError):
    """Why one row cannot be used, and how to mend it."""

    def __init__(self, what: str, mend: str) -> None:
        super().__init__(what)
        self.what, self.mend = what, mend


def file_bytes(path: Path) -> bytes:
    """The bytes of a file, unpacked where its name ends in .gz.

    Raises:
        InputError: it is missing, unreadable or a damaged archive.
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
    """(line number from 1, its JSON value or a `Fault`) of every line that is not blank.

    Raises:
        InputError: the file cannot be read.
    """
    for number, line in enumerate(file_bytes(file).removeprefix(_BYTE_ORDER_MARK).split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except UnicodeDecodeError:
            yield number, Fault("not UTF-8 text", "Save the file as UTF-8.")
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "too deep"
            yield number, Fault(f"not valid JSON ({reason})", "Write one JSON object a line.")


def json_objects(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of every line that is not blank, in files that others have made.

    Raises:
        InputError: the file cannot be read, or a line is no JSON object.
    """
    for line, cells in json_lines(file):
        if isinstance(cells, Fault):
            raise InputError(f"{file.name}, row {line}: {cells.what}. {cells.mend}")
        if not isinstance(cells, dict):
            raise InputError(f"{file.name}, row {line}: not a JSON object. Fetch the file again.")
        yield line, cells


def csv_rows(file: Path, needed: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """(row number as a spreadsheet shows it, cells by column) of a CSV file; .csv.gz is unpacked.

    Raises:
        InputError: the file cannot be read or is no CSV, a column is missing, or a row has too many or too
            few cells.
    """
    try:
        text = file_bytes(file).removeprefix(_BYTE_ORDER_MARK).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{file.name} is not UTF-8 text. Save it as UTF-8.") from error
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    number = 0
    try:
        for number, cells in enumerate(reader, start=1):
            if not header:
                header = cells
                lacking = [column for column in needed if column not in header]
                if lacking:
                    there = ", ".join(header)
                    raise InputError(
                        f"{file.name}, row 1: no column {', '.join(lacking)}; its columns are {there}. "
                        "Use the file as it was released, or rename them."
                    )
            elif cells:
                if len(cells) != len(header):
                    what = f"{len(cells)} cells, where there are {len(header)} columns"
                    raise InputError(f"{file.name}, row {number}: {what}. Put quotes around its text.")
                yield number, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        what = f"no valid CSV ({error})"
        raise InputError(f"{file.name}, row {number + 1}: {what}. Fetch the file again.") from error
    if not header:
        raise InputError(f"{file.name} is empty. Fetch the file again.")


def find_table(root: Path, *names: str) -> Path | None:
    """The first of the files that is there, as it is or with .gz; a name may be a pattern."""
    for name in names:
        for pattern in (name, f"{name}.gz"):
            found = sorted(path for path in root.glob(pattern) if path.is_file())
            if found:
                return found[0]
    return None
