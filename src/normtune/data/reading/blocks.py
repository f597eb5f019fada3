"""Reads JSONL, CSV, TSV and parquet files in blocks of some 10,000 rows, as columns."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from normtune.data.reading.cells import split_of_file
from normtune.data.reading.sources import (
    PEEK_ROWS,
    Source,
    SourceRow,
    check_characters,
    fields_of,
    iter_rows,
    open_delimited,
    split_of_jsonl,
    stem_of,
)
from normtune.data.reading.tables import parse_json_lines
from normtune.errors import InputError

_BLOCK_BYTES = 8 * 2**20  # size of a block of a JSONL file
_BLOCK_ROWS = 50_000  # rows of a block of a parquet, CSV or TSV file
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_SCAN: Callable[[str, int], tuple[Any, int]] = getattr(json.JSONDecoder(), "scan_once")  # noqa: B009 (not in stubs)


class NotPlain(Exception):
    """The files must be read row by row."""


@dataclass(frozen=True)
class Block:
    """Some rows of a file."""

    source: Source  # without its rows
    first: int  # the number of the first row in messages
    cells: Callable[[], pa.Table]
    rows: Callable[[], Iterator[SourceRow]]  # the same rows one by one


def jsonl_blocks(file: Path, name: str, notes: list[str]) -> Iterator[Block]:
    """The blocks of a file of JSON lines."""
    with file.open("rb") as lines:
        first = b"".join(islice(lines, PEEK_ROWS)).removeprefix(_BYTE_ORDER_MARK)
        fields = fields_of(SourceRow(*row) for row in parse_json_lines(first, 1))
        source, number = Source(file.name, stem_of(file), fields, (), split_of_jsonl(file)), 1
        lines.seek(0)
        while data := lines.read(_BLOCK_BYTES) + lines.readline():
            if number == 1:
                data = data.removeprefix(_BYTE_ORDER_MARK)

            def rows(data: bytes = data, number: int = number) -> Iterator[SourceRow]:
                return (SourceRow(line, cells) for line, cells in parse_json_lines(data, number))

            count = data.count(b"\n") + (not data.endswith(b"\n"))
            yield Block(source, number, partial(_json_table, data), rows)
            number += count


def _json_table(data: bytes) -> pa.Table:
    """The columns of some lines. (pyarrow's own JSON reader ends the process on some damaged files.)

    Raises:
        ValueError, TypeError: some lines are blank, are not JSON or hold no object, or a column has several types.
    """
    lines = data.removesuffix(b"\n").decode("utf-8").split("\n")
    try:
        parsed = list(map(_SCAN, lines, repeat(0)))  # what `json.loads` calls, for lines without blanks around them
    except StopIteration:
        raise ValueError("a line is not JSON") from None
    if any(type(row) is not dict or end != len(line) for (row, end), line in zip(parsed, lines, strict=True)):
        raise TypeError("a line is not a JSON object")
    rows = [row for row, _ in parsed]
    shapes = {*map(tuple, rows)}
    if len(shapes) == 1:
        names, by_column = list(shapes.pop()), zip(*map(dict.values, rows), strict=True)
    else:
        names = list(dict.fromkeys(chain.from_iterable(rows)))
        by_column = zip(*([row.get(name) for name in names] for row in rows), strict=True)
    columns = {}
    for name, values in zip(names, by_column, strict=True):
        types = {*map(type, values)} - {type(None)}
        if len(types) > 1:
            raise TypeError(name)
        if dict not in types:
            columns[name] = pa.array(values)
    return pa.table(columns)


def delimited_blocks(format: str) -> Callable[[Path, str, list[str]], Iterator[Block]]:
    """The function that reads the blocks of a CSV or TSV file."""

    def read_blocks(file: Path, name: str, notes: list[str]) -> Iterator[Block]:
        source = open_delimited(file, format, notes)
        rows = iter(source.rows)
        while block := list(islice(rows, _BLOCK_ROWS)):
            yield Block(replace(source, rows=()), block[0].number, partial(_text_table, source, block), block.__iter__)

    return read_blocks


def _text_table(source: Source, rows: Sequence[SourceRow]) -> pa.Table:
    """The columns of some rows of text.

    Raises:
        ValueError: a row is bad, or a blank one was left out between them.
    """
    if rows[-1].number - rows[0].number != len(rows) - 1 or not all(isinstance(row.cells, dict) for row in rows):
        raise ValueError("rows of another number or kind")
    return pa.table({name: pa.array([row.cells[name] for row in rows], pa.string()) for name in source.columns})


def parquet_blocks(file: Path, name: str, notes: list[str]) -> Iterator[Block]:
    """The blocks of a parquet file; `name` is its name in messages."""
    try:
        with pq.ParquetFile(file) as parquet:
            if any(map(holds_images, parquet.schema_arrow.types)):
                raise NotPlain  # before a block with the images of 50,000 rows is read
            source = Source(name, stem_of(file), list(parquet.schema_arrow.names), (), split_of_file(file))
            number = 0
            for batch in parquet.iter_batches(_BLOCK_ROWS):
                table = pa.Table.from_batches([batch])

                def cells(table: pa.Table = table) -> pa.Table:
                    return table

                def rows(table: pa.Table = table, number: int = number) -> Iterator[SourceRow]:
                    numbered = enumerate(iter_rows(table), start=number)
                    return (SourceRow(row, check_characters(row_cells)) for row, row_cells in numbered)

                yield Block(source, number, cells, rows)
                number += table.num_rows
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{file} is not a parquet file, or is damaged. Fetch it again.") from error


def holds_images(type: pa.DataType) -> bool:
    """Whether a column has images themselves, not their names."""
    if pa.types.is_list(type) and pa.types.is_string(type.value_type):
        return False  # options, or names of several images
    return pa.types.is_binary(type) or pa.types.is_large_binary(type) or pa.types.is_nested(type)
