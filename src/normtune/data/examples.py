"""An example, and sequences of examples that also give whole columns as arrays.

Work on all rows (counts, groups, splits, leaks) asks for columns, not for `Example` objects: ten million objects take
10 GB and half a minute. `Examples` answers from a list of objects, or from a `RowTable` of a large file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, Self, SupportsIndex, get_args, overload

import numpy as np
from numpy.typing import NDArray

from normtune.errors import InputError

Kind = Literal["open", "closed", "report", "choice"]
KINDS: tuple[Kind, ...] = get_args(Kind)
History = tuple[tuple[str, str], ...]  # earlier turns of a conversation: questions with their answers
Codes = tuple[NDArray[np.int32], list[Any]]  # index of each row's value (-1: none), and the values in first order

META = "meta:"  # "meta:NAME" is the column of a field of `meta`
MAX_OPTIONS = 26  # a letter of the alphabet for each
_FEW = 16  # a selection of less than this part of a table is read row by row


@dataclass(frozen=True)
class Example:
    """One question about an image (or one report request), with its reference answer."""

    id: str  # unique within the dataset; predictions are matched to examples by it
    images: tuple[str, ...]  # keys for Dataset.open_image; one for a question, one or two views for a report
    question: str  # may be empty for a report
    answer: str
    kind: Kind  # "closed" as the dataset labels it (see the reader's docstring); "choice" if there are options
    split: str  # "train", "validate" or "test", or another name that the files use
    meta: dict[str, str] = field(default_factory=dict, hash=False, compare=False)  # modality, organ, language, ...
    history: History = ()  # the turns before the question, which the model sees
    options: tuple[str, ...] = ()  # texts of the options of a choice, in order; `answer` is the text of the right one

    def __post_init__(self) -> None:
        if self.options or self.kind == "choice":
            check_options(self.kind, self.options, self.answer)

    @property
    def letter(self) -> str:
        """The letter of the right option of a choice: A for the first."""
        return option_letter(self.options.index(self.answer))


def check_options(kind: str, options: Sequence[str], answer: str) -> None:
    """Check that a row has options if and only if it is a choice, and that its answer is the text of one of them.

    Several options may have the same text: each of them is right if it equals the answer.

    Raises:
        InputError: the message names the problem and how to fix it, without the text of the row.
    """
    if kind != "choice":
        raise InputError(f"a row of kind {kind} has options. Give it the kind 'choice', or remove its options.")
    if not 2 <= len(options) <= MAX_OPTIONS:
        raise InputError(f"a choice has {len(options)} options. Give it 2 to {MAX_OPTIONS}.")
    if not all(options):
        empty = ", ".join(option_letter(index) for index, option in enumerate(options) if not option)
        raise InputError(f"option {empty} is empty. Fill it in, or remove it.")
    if answer not in options:
        raise InputError("the answer is none of the options. Write the text of the right option as the answer.")


def option_letter(index: int) -> str:
    """The letter of the option at this position: A for 0."""
    return chr(ord("A") + index)


def option_index(letter: str) -> int:
    """The position of the option with a letter, in upper or lower case."""
    return ord(letter.upper()) - ord("A")


def plain_option(text: str) -> str:
    """A text as options and answers are compared: case, blanks and a final full stop do not count."""
    return " ".join(text.casefold().split()).rstrip(".")


class Table(Protocol):
    """What `Examples` needs of a table, such as `normtune.data.row_table.RowTable`."""

    meta_columns: list[str]

    def __len__(self) -> int: ...
    def read_example(self, row: int, /) -> Example: ...
    def read_examples(self, rows: NDArray[np.int32] | None, /) -> Iterator[Example]: ...
    def texts(self, column: str, rows: NDArray[np.int32] | None, /) -> Iterator[str]: ...
    def codes(self, column: str, /) -> Codes: ...
    def numbers(self, column: str, function: Callable[[str], int], dtype: Any, /) -> NDArray[Any]: ...
    def with_column(self, column: str, codes: NDArray[np.int32], values: list[str], /) -> Table: ...


class Examples(Sequence[Example]):
    """Examples in an order. A list of them, or some rows of a table that makes each `Example` when it is asked for."""

    _items: list[Example]  # empty if there is a table
    _table: Table | None
    _rows: NDArray[np.int32] | None  # row numbers of the table, in order; None: all rows

    def __init__(self, source: Iterable[Example] | Table, rows: NDArray[Any] | None = None) -> None:
        """Hold a list of examples, other `Examples`, or rows of a table.

        Args:
            source: the examples, or a table.
            rows: row numbers of the table; None: all.
        """
        self._items, self._table, self._rows = [], None, None
        if isinstance(source, Examples):
            self._items, self._table, self._rows = source._items, source._table, source._rows
        elif isinstance(source, Iterable):
            self._items = list(source)
        else:
            self._table = source
            self._rows = None if rows is None else rows.astype(np.int32, copy=False)

    def __len__(self) -> int:
        if self._table is None:
            return len(self._items)
        return len(self._table) if self._rows is None else len(self._rows)

    @overload
    def __getitem__(self, index: SupportsIndex) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Self: ...
    def __getitem__(self, index: SupportsIndex | slice) -> Example | Self:
        if isinstance(index, slice):
            if self._table is None:
                return self._selection(self._items[index], None)
            return self.take(np.arange(*index.indices(len(self)), dtype=np.int32))
        if self._table is None:
            return self._items[index]
        row = range(len(self))[index]
        return self._table.read_example(row if self._rows is None else int(self._rows[row]))

    def __iter__(self) -> Iterator[Example]:
        return iter(self._items) if self._table is None else self._table.read_examples(self._rows)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __add__(self, other: Iterable[Example]) -> list[Example]:
        return [*self, *other]

    def __radd__(self, other: Iterable[Example]) -> list[Example]:
        return [*other, *self]

    def __repr__(self) -> str:
        return f"<Examples: {len(self):,}>" if self._table is not None else repr(self._items)

    def take(self, rows: NDArray[Any]) -> Self:
        """The examples at these positions, in this order."""
        if self._table is None:
            return self._selection([self._items[row] for row in rows.tolist()], None)
        return self._selection(self._table, rows if self._rows is None else self._rows[rows])

    def where(self, mask: NDArray[np.bool_]) -> Self:
        """The examples where `mask` is true; `self` if it is true everywhere."""
        return self if mask.all() else self.take(np.flatnonzero(mask))

    def _selection(self, source: list[Example] | Table, rows: NDArray[Any] | None) -> Self:
        """Other rows of the same source; `Split` keeps its dataset and name."""
        selected = self.__class__.__new__(self.__class__)
        selected.__dict__.update(self.__dict__)
        Examples.__init__(selected, source, rows)
        return selected

    def _as_list(self) -> list[Example] | None:
        """The examples as a list, if they are one or are a small part of a large table."""
        if self._table is None:
            return self._items
        few = self._rows is not None and len(self._rows) * _FEW < len(self._table)
        return list(self) if few else None

    @property
    def meta_columns(self) -> list[str]:
        """The fields of `meta`, in the order of their first occurrence in the files."""
        if self._table is None:
            return list(dict.fromkeys(name for example in self._items for name in example.meta))
        return list(self._table.meta_columns)

    def codes(self, column: str) -> Codes:
        """The values of a column as numbers.

        Args:
            column: images, kind, split, history, options, id, question, answer, or "meta:NAME".

        Returns:
            The index of each row's value, int32 [rows], and the values in the order of their first occurrence. Rows
            without that field of `meta` have the index -1.
        """
        items = self._as_list()
        if items is not None:
            index: dict[Any, int] = {}
            values = (_value(example, column) for example in items)
            numbers = [-1 if value is None else index.setdefault(value, len(index)) for value in values]
            return np.array(numbers, np.int32), list(index)
        assert self._table is not None
        codes, all_values = self._table.codes(column)
        return (codes, all_values) if self._rows is None else compact(codes[self._rows], all_values)

    def texts(self, column: str) -> Iterator[str]:
        """The text of each row: id, question, answer, kind or split."""
        if self._table is None:
            return (getattr(example, column) for example in self._items)
        return self._table.texts(column, self._rows)

    def numbers(self, column: str, function: Callable[[str], int], dtype: Any = np.int64) -> NDArray[Any]:
        """The number that `function` makes of each row's text, [rows]; it is called once for each distinct text.

        Args:
            column: id, question, answer, or "meta:NAME" (a missing field counts as "").
            function: text -> number.
            dtype: type of the numbers.
        """
        items = self._as_list()
        if items is not None:
            texts = [_value(example, column) or "" for example in items]
            number_of_text = {text: function(text) for text in dict.fromkeys(texts)}
            return np.array([number_of_text[text] for text in texts], dtype)
        assert self._table is not None
        numbers = self._table.numbers(column, function, dtype)
        return numbers if self._rows is None else numbers[self._rows]

    def hashes(self, column: str, normalize: Callable[[str], str] = str) -> NDArray[np.int64]:
        """A 64-bit hash of each row's text after `normalize`, [rows]; the same text has the same hash in this process.

        Two of ten million texts share a hash with a probability of 3e-6.
        """
        return self.numbers(column, hash if normalize is str else lambda text: hash(normalize(text)))

    def flags(self, column: str, condition: Callable[[Any], bool]) -> NDArray[np.bool_]:
        """Whether a condition holds for each row's value, [rows]; it is called once for each distinct value."""
        if column not in ("images", "kind", "split", "history", "options"):
            return self.numbers(column, condition, np.bool_)
        codes, values = self.codes(column)
        return np.array([*map(condition, values)], np.bool_)[codes]

    def with_column(self, column: str, codes: NDArray[Any], values: Sequence[str]) -> Self:
        """Examples with other values in one column.

        Args:
            column: split or "meta:NAME".
            codes: the index of each row's value, [rows]; -1 leaves out the field of `meta`.
        """
        if self._table is not None:
            names = list(dict.fromkeys(values))  # a table has each value once, and only values that rows have
            merged = np.array([*map(names.index, values), -1], np.int32)[codes]
            whole = np.full(len(self._table), -1, np.int32)
            whole[slice(None) if self._rows is None else self._rows] = merged
            return self._selection(self._table.with_column(column, *compact(whole, names)), self._rows)
        if not column.startswith(META):
            items = [replace(e, **{column: values[c]}) for e, c in zip(self._items, codes.tolist(), strict=True)]  # type: ignore[arg-type]
            return self._selection(items, None)
        name = column.removeprefix(META)
        return self._selection(
            [
                replace(example, meta=example.meta | {name: values[code]}) if code >= 0 else example
                for example, code in zip(self._items, codes.tolist(), strict=True)
            ],
            None,
        )


def as_examples(examples: Iterable[Example]) -> Examples:
    """Wrap a list of examples; `Examples` are returned as they are."""
    return examples if isinstance(examples, Examples) else Examples(examples)


def image_keys(examples: Examples) -> list[str]:
    """The keys of all images in the order of their first occurrence, each once."""
    return list(dict.fromkeys(key for keys in examples.codes("images")[1] for key in keys))


def count_values(codes: NDArray[np.int32], values: Sequence[str]) -> dict[str, int]:
    """Value -> number of rows, in the order of the values; rows without a value do not count."""
    return dict(zip(values, np.bincount(codes + 1, minlength=len(values) + 1)[1:].tolist(), strict=True))


def history_hashes(examples: Examples, normalize: Callable[[str], str] = str) -> NDArray[np.int64]:
    """A hash of the earlier turns of each row, [rows]."""
    codes, histories = examples.codes("history")
    texts = (tuple(normalize(text) for turn in history for text in turn) for history in histories)
    return np.array([*map(hash, texts)], np.int64)[codes]


def option_hashes(examples: Examples) -> NDArray[np.int64]:
    """A hash of the options of each row, [rows]; their order does not count."""
    codes, options = examples.codes("options")
    return np.array([hash(tuple(sorted(texts))) for texts in options], np.int64)[codes]


def combine_hashes(*columns: NDArray[Any]) -> NDArray[np.int64]:
    """One hash of several columns of hashes or codes, [rows]."""
    result = np.zeros(len(columns[0]), np.int64)
    for column in columns:
        result *= np.int64(0x369DEA0F31A53F85)  # odd: no bits are lost; overflow wraps
        result += column
    return result


def is_in(hashes: NDArray[np.int64], others: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether each hash is among others; `np.isin` takes ten times the memory of its arguments."""
    if not len(others):
        return np.zeros(len(hashes), np.bool_)
    others = np.sort(others)
    others = others[np.append(True, others[1:] != others[:-1])]
    places = np.searchsorted(others, hashes)
    places[places == len(others)] = 0
    return others[places] == hashes


def repeated_rows(hashes: NDArray[np.int64]) -> NDArray[np.int64]:
    """The rows with a hash that occurs more than once, in order."""
    ordered = np.sort(hashes)
    return np.flatnonzero(is_in(hashes, ordered[1:][ordered[1:] == ordered[:-1]]))


def _value(example: Example, column: str) -> Any:
    if column.startswith(META):
        return example.meta.get(column[len(META) :])
    return getattr(example, column)


def compact(codes: NDArray[np.int32], values: Sequence[Any]) -> Codes:
    """Codes of only those values that occur, which are then in the order of their first occurrence.

    Example: the codes [2, -1, 0, 2] of the values [a, b, c] become [0, -1, 1, 0] of the values [c, a].
    """
    first = np.full(len(values) + 1, len(codes), np.int64)  # first row of each value; the last entry is for -1
    first[codes[::-1]] = np.arange(len(codes))[::-1]  # backwards: the first row of a value is assigned last
    used = np.argsort(first[:-1], kind="stable")[: int((first[:-1] < len(codes)).sum())]
    new = np.full(len(values) + 1, -1, np.int32)
    new[used] = np.arange(len(used))
    return new[codes], [values[index] for index in used.tolist()]
