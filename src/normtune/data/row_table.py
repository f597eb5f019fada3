"""A table of rows in a memory-mapped file. `Examples` reads it instead of a list when a dataset is large.

A table has the columns id, images, question, answer, kind and split, one for each field of `meta`, and options if a row
is a choice, all of text; the keys of several images and the texts of options are joined by a NUL character. A reader
writes it in blocks of rows:

    writer = RowTableWriter()
    writer.add({"id": ids, "images": keys, ...})      # pyarrow arrays of one length, some 100,000 rows
    examples = Examples(writer.finish())

The file has no name, so that the system deletes it when the process ends, however it ends. It is in the folder for
temporary files (TMPDIR). Its pages count as memory of the process only while a column is read.
"""

from __future__ import annotations

import mmap
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import repeat
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from normtune.data.examples import META, Codes, Example, compact

COLUMNS = ("id", "images", "question", "answer", "kind", "split")
OPTIONS = "options"
SEPARATOR = "\0"  # between the keys of several images, and between options
_CACHED = ("images", "kind", "split")  # columns of which the codes are kept: every stage needs them
_READ_AT_ONCE = 4096  # rows that are converted to Python objects together
_READS = 10_000  # single rows that are read before the mapped pages are given back


class RowTableWriter:
    """Writes blocks of rows to a file without a name, and maps it."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="normtune-rows-")  # noqa: SIM115  `finish` closes it
        self._ends = [0]  # where each block ends in the file, in bytes
        self.rows = 0

    def add(self, columns: Mapping[str, pa.Array]) -> None:
        """Append rows.

        Args:
            columns: column -> texts, for `COLUMNS`, "meta:NAME" and `OPTIONS`. A null in a column of `meta` or in
                `OPTIONS` is a row without that field.
        """
        batch = pa.record_batch([*columns.values()], names=[*columns])
        if batch.num_rows:
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, batch.schema) as stream:
                stream.write_batch(batch)
            self._ends.append(self._ends[-1] + self._file.write(sink.getvalue()))
            self.rows += batch.num_rows

    def add_examples(self, examples: Sequence[Example]) -> None:
        """Append rows that are Python objects already, without earlier turns."""
        assert not any(example.history for example in examples), "a table has no column for earlier turns"
        if examples:
            metas = dict.fromkeys(name for example in examples for name in example.meta)
            columns = {name: [getattr(example, name) for example in examples] for name in COLUMNS}
            columns["images"] = [SEPARATOR.join(keys) for keys in columns["images"]]
            columns |= {META + name: [example.meta.get(name) for example in examples] for name in metas}
            if any(example.options for example in examples):
                columns[OPTIONS] = [SEPARATOR.join(example.options) or None for example in examples]
            self.add({name: pa.array(texts, pa.string()) for name, texts in columns.items()})

    def close(self) -> None:
        """Delete the file, if `finish` was not called."""
        self._file.close()

    def finish(self) -> RowTable:
        """The table of all blocks."""
        self._file.flush()
        with self._file:
            mapped = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ) if self.rows else None
        buffer = pa.py_buffer(b"" if mapped is None else mapped)
        blocks = [
            pa.ipc.open_stream(pa.BufferReader(buffer.slice(start, end - start))).read_next_batch()
            for start, end in zip(self._ends, self._ends[1:], strict=False)
        ]
        return RowTable(blocks, mapped)


class RowTable:
    """Rows in blocks of Arrow columns. `Examples` selects among them; see the module's docstring."""

    def __init__(self, blocks: Sequence[pa.RecordBatch], mapped: mmap.mmap | None = None) -> None:
        self.blocks, self._mapped = list(blocks), mapped
        # the first row of each block, and the number of all rows
        self.starts = np.cumsum([0, *(block.num_rows for block in self.blocks)])
        self._starts: list[int] = self.starts.tolist()  # for single rows
        self.meta_columns = list(
            dict.fromkeys(
                name.removeprefix(META) for block in self.blocks for name in block.schema.names if name.startswith(META)
            )
        )
        self._codes: dict[str, Codes] = {}  # the codes of the columns in `_CACHED`
        self._reads = 0

    def __len__(self) -> int:
        return self._starts[-1]

    def __reduce__(self) -> tuple[Any, ...]:
        return RowTable, (self.blocks,)  # the blocks are copied into the pickle

    def release(self) -> None:
        """Give the pages of the file back: they are read again when they are needed."""
        if self._mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
            with suppress(OSError):
                self._mapped.madvise(mmap.MADV_DONTNEED)

    def _column(self, column: str) -> Iterator[tuple[int, pa.Array]]:
        """(first row, texts) of each block; a field of `meta` that a block lacks is null in all of its rows."""
        for start, block in zip(self._starts, self.blocks, strict=False):
            has_column = column in block.schema.names
            yield start, block.column(column) if has_column else pa.nulls(block.num_rows, pa.string())
            self.release()

    def texts(self, column: str, rows: NDArray[np.int32] | None) -> Iterator[str]:
        """See `Examples.texts`."""
        if rows is not None and (np.diff(rows) <= 0).any():
            return (getattr(example, column) for example in self.read_examples(rows))
        return self._ascending_texts(column, rows)

    def _ascending_texts(self, column: str, rows: NDArray[np.int32] | None) -> Iterator[str]:
        for start, texts in self._column(column):
            if rows is not None:
                first, last = np.searchsorted(rows, [start, start + len(texts)])
                texts = texts.take(pa.array(rows[first:last] - start))
            for first in range(0, len(texts), _READ_AT_ONCE):
                yield from texts.slice(first, _READ_AT_ONCE).to_pylist()

    def codes(self, column: str) -> Codes:
        """See `Examples.codes`."""
        if column == "history":  # rows with earlier turns are not written to a table
            return np.zeros(len(self), np.int32), [()]
        if column not in self._codes:
            index: dict[str, int] = {}
            codes = np.empty(len(self), np.int32)
            for start, texts in self._column(column):
                texts = texts.fill_null("") if column == OPTIONS else texts
                encoded = texts.dictionary_encode()
                text_codes = [index.setdefault(text, len(index)) for text in encoded.dictionary.to_pylist()]
                codes[start : start + len(texts)] = _spread(np.array([*text_codes, -1], np.int32), encoded)
            values: list[Any] = list(index)
            if column in ("images", OPTIONS):
                values = [_split(joined) for joined in values]
            if column not in _CACHED:
                return codes, values
            self._codes[column] = codes, values
        return self._codes[column]

    def numbers(self, column: str, function: Callable[[str], int], dtype: Any) -> NDArray[Any]:
        """See `Examples.numbers`; equal texts of different blocks are computed once a block."""
        numbers = np.empty(len(self), dtype)
        for start, texts in self._column(column):
            encoded = texts.dictionary_encode()
            text_numbers = [*map(function, encoded.dictionary.to_pylist()), function("")]
            numbers[start : start + len(texts)] = _spread(np.array(text_numbers, dtype), encoded)
        return numbers

    def with_column(self, column: str, codes: NDArray[np.int32], values: list[str]) -> RowTable:
        """The same rows with other values in one column; see `Examples.with_column`. The other columns are shared."""
        blocks = []
        for start, block in zip(self._starts, self.blocks, strict=False):
            columns = dict(zip(block.schema.names, block.columns, strict=True))
            # only the values of the block: other methods look at each value of a block
            numbers, names = compact(codes[start : start + block.num_rows], values)
            texts = pa.DictionaryArray.from_arrays(pa.array(numbers, mask=numbers < 0), pa.array(names, pa.string()))
            columns[column] = texts
            blocks.append(pa.record_batch([*columns.values()], names=[*columns]))
        table = RowTable(blocks, self._mapped)
        if column.startswith(META):
            table.meta_columns = list(dict.fromkeys([*self.meta_columns, column.removeprefix(META)]))
        table._codes = {name: cached for name, cached in self._codes.items() if name != column}
        return table

    def read_example(self, row: int) -> Example:
        """One row."""
        self._reads += 1
        if self._reads % _READS == 0:
            self.release()
        number = bisect_right(self._starts, row) - 1
        return self._examples(self.blocks[number].slice(row - self._starts[number], 1))[0]

    def read_examples(self, rows: NDArray[np.int32] | None) -> Iterator[Example]:
        """The rows in this order; None: all."""
        if rows is None:
            for block in self.blocks:
                for first in range(0, block.num_rows, _READ_AT_ONCE):
                    yield from self._examples(block.slice(first, _READ_AT_ONCE))
                self.release()
            return
        for first in range(0, len(rows), _READ_AT_ONCE):
            yield from self._examples_at(rows[first : first + _READ_AT_ONCE])
        self._reads += len(rows)
        if self._reads > _READS:
            self._reads = 0
            self.release()

    def _examples_at(self, rows: NDArray[np.int32]) -> list[Example]:
        numbers = np.searchsorted(self.starts, rows, side="right") - 1
        examples: list[Any] = [None] * len(rows)
        for number in np.unique(numbers).tolist():
            positions = np.flatnonzero(numbers == number)
            block = self.blocks[number].take(pa.array(rows[positions] - self._starts[number]))
            for position, example in zip(positions.tolist(), self._examples(block), strict=True):
                examples[position] = example
        return examples

    def _examples(self, block: pa.RecordBatch) -> list[Example]:
        """The examples of a part of a block."""

        def column(name: str) -> list[Any]:
            return block.column(name).to_pylist() if name in block.schema.names else [None] * block.num_rows

        id, images, question, answer, kind, split = map(column, COLUMNS)
        keys, options = map(_split, images), map(_split, column(OPTIONS))
        metas = [(name, column(META + name)) for name in self.meta_columns]
        fields = ({name: texts[i] for name, texts in metas if texts[i] is not None} for i in range(block.num_rows))
        return list(map(Example, id, keys, question, answer, kind, split, fields, repeat(()), options))


def _split(joined: str | None) -> tuple[str, ...]:
    """The texts that `SEPARATOR` joins."""
    return tuple(joined.split(SEPARATOR)) if joined else ()


def _spread(text_values: NDArray[Any], encoded: pa.DictionaryArray) -> NDArray[Any]:
    """The value of each row, from the value of each distinct text and, last, of a missing text."""
    return text_values[encoded.indices.fill_null(len(text_values) - 1).to_numpy(zero_copy_only=False)]
