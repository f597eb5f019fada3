"""Rows that are in memory: a pandas data frame, a `datasets.Dataset`, a list of dicts, or a torch dataset.

Neither pandas nor datasets nor torch is imported: the objects are recognised by their methods.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from normtune.data.datasets.table import Rows
from normtune.data.reading.columns import parse_columns
from normtune.data.reading.row_reader import RowReader
from normtune.data.reading.sources import python_source
from normtune.data.records import Dataset
from normtune.data.split_names import split_name
from normtune.errors import InputError

_FIELDS = ("image", "question", "answer")  # what a row that is a tuple holds


def read(data: Any, **options: Any) -> Dataset:
    """Read rows that are in memory.

    Args:
        data: the rows, or a dict of them by split, such as a `datasets.DatasetDict`. A row is a dict, or a tuple
            (image, question, answer). Images are paths, opened images or encoded bytes. The rows of a torch dataset are
            read once for their texts; its images are read again when they are used.
        options: those of `read_rows`.

    Raises:
        InputError: the object holds no rows, or see `read_rows`.
    """
    if isinstance(data, Mapping):
        return read_rows({split_name(str(split)): _rows(rows) for split, rows in data.items()}, **options)
    return read_rows({"train": _rows(data)}, **options)


def read_rows(
    rows: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    strict: bool = True,
    columns: str | Mapping[str, str] | None = None,
    task: Literal["vqa", "report"] = "vqa",
    slices: int | None = None,
    montage: bool = False,
    text_only: bool = False,
) -> Dataset:
    """Read rows that are Python objects: split -> rows. Images may also be opened images; see `read`.

    Raises:
        InputError: a column is missing, or (strict) a row is bad.
    """
    reader, stated = RowReader("data", text_only), parse_columns(columns)
    # one split is not copied: its rows may be decoded each time that they are read
    members = next(iter(rows.values())) if len(rows) == 1 else _Joined(list(rows.values()))
    table = Rows(reader, "data", Path(), strict, rows=members)
    first = 0
    for split, members in rows.items():
        table.add(python_source(members, split, first), stated, task)
        first += len(members)
    return table.finish(None, slices, montage)


@dataclass(frozen=True)
class _Joined(Sequence[Mapping[str, Any]]):
    """Several sequences one after the other."""

    parts: list[Sequence[Mapping[str, Any]]]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, index: Any) -> Any:
        for part in self.parts:
            if index < len(part):
                return part[index]
            index -= len(part)
        raise IndexError(index)


def _rows(data: Any) -> Sequence[Mapping[str, Any]]:
    if hasattr(data, "to_dict") and hasattr(data, "columns"):  # a pandas data frame
        return data.to_dict("records")  # type: ignore[no-any-return]
    if not hasattr(data, "__len__") or not hasattr(data, "__getitem__") or isinstance(data, str | bytes):
        raise InputError(
            f"{type(data).__name__} holds no rows. Give a name, a path, a data frame, a datasets.Dataset, a list of "
            "dicts, or a dataset of dicts with a length."
        )
    features = getattr(data, "features", None) or {}  # a datasets.Dataset has features
    return _Rows(data, {name: feature.names for name, feature in features.items() if hasattr(feature, "names")})


@dataclass(frozen=True)
class _Rows(Sequence[Mapping[str, Any]]):
    """The items of a dataset as dicts."""

    data: Any
    labels: Mapping[str, Sequence[str]]  # column -> names of its classes

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: Any) -> Any:
        if index >= len(self.data):  # a torch dataset need not raise IndexError
            raise IndexError(index)
        item = self.data[index]
        if isinstance(item, tuple) and len(item) == len(_FIELDS):
            return dict(zip(_FIELDS, item, strict=True))
        if not isinstance(item, Mapping):
            what = "a dict, nor a tuple of image, question and answer"
            raise InputError(f"row {index}: the item is a {type(item).__name__}, neither {what}.")
        names = {c: labels[item[c]] for c, labels in self.labels.items() if isinstance(item.get(c), int)}
        return {**item, **names} if names else item
