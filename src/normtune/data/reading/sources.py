"""Opens the files of every format of own data as rows: a dict of cells with the place that messages name.

One function for each format returns a `Source`. `normtune.data.datasets.table` turns its rows into examples.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normtune.data.formats import FORMATS, SUFFIXES, files_of_format, metadata_files, recognize, table_files
from normtune.data.reading.cells import split_of_file
from normtune.data.reading.embedded_images import RowLocation, arrow_table
from normtune.data.reading.tables import check_characters, delimited_rows, json_lines
from normtune.data.split_names import SPLITS, split_name
from normtune.errors import InputError
from normtune.runtime.files import read_json

if TYPE_CHECKING:
    import pyarrow as pa

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")  # owner/name
PEEK_ROWS = 1000  # the fields of the first rows of a JSON-lines file are its columns


@dataclass(frozen=True)
class SourceRow:
    """One row of a file."""

    number: int  # as messages name it
    cells: Any  # column -> value; or the `RowError` that makes the row unusable
    location: RowLocation | None = None  # where an image inside the file is read again


@dataclass(frozen=True)
class Source:
    """The rows of one file or sheet."""

    name: str  # in messages
    stem: str  # in the ids of rows without an id
    columns: list[str]
    rows: Iterable[SourceRow]
    split: str  # the split of rows that name none
    folder: str = ""  # image paths are relative to this folder below the root


def open_sources(root: Path, format: str, notes: list[str]) -> tuple[Path, list[Source]]:
    """Open the files of a dataset.

    Args:
        root: a file, a folder, or for parquet a hub name owner/name.
        format: a key of `normtune.data.formats.FORMATS`.
        notes: receives what was left out.

    Returns:
        The folder that image paths are relative to, and one source for each file, sheet or split.

    Raises:
        InputError: there is no such file, or it cannot be read in this format.
    """
    if format == "parquet":
        base, files = find_parquet_files(root)
        return base, [_parquet(file, file.relative_to(base).as_posix()) for file in files]
    if format == "arrow":
        return root, _arrow_folder(root)
    if format == "imagefolder":
        files = metadata_files(root) if root.is_dir() else [root]
        root = root if root.is_dir() else root.parent
        return root, [source for file in files for source in _metadata(root, file, notes)]
    if not root.is_dir():
        return root.parent, _OPENERS[format](root, notes)
    if format == "dicom":
        files = table_files(root)
        if len(files) != 1:
            names = ", ".join(file.name for file in files) or "none"
            raise InputError(f"{root}: format dicom needs one table in the folder, and there are {names}.")
        return root, _OPENERS[recognize(files[0])](files[0], notes)
    files = files_of_format(root, format)
    if not files:
        raise InputError(f"{root} holds no *.{format} file. Point --root at one.")
    return root, [source for file in files for source in _OPENERS[format](file, notes)]


def open_delimited(file: Path, format: str, notes: list[str]) -> Source:
    """A CSV or TSV file; see `open_sources`."""
    return _OPENERS[format](file, notes)[0]


def python_source(rows: Sequence[Mapping[str, Any]], split: str, first: int) -> Source:
    """Rows that are Python objects; the first has the number `first`."""
    columns = list(dict.fromkeys(str(column) for cells in islice(iter(rows), PEEK_ROWS) for column in cells))
    numbered = (SourceRow(number, dict(cells), (None, 0, number)) for number, cells in enumerate(rows, start=first))
    return Source("data", split, columns, numbered, split)


def parquet_rows(file: Path) -> Iterator[SourceRow]:
    """The rows of a parquet file, from 0, converted one by one: the images of a row group are not all objects at once.

    Raises:
        InputError: the file is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as parquet:
            number = 0
            for group in range(parquet.num_row_groups):
                for row, cells in enumerate(iter_rows(parquet.read_row_group(group))):
                    yield SourceRow(number, check_characters(cells), (file, group, row))
                    number += 1
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{file} is not a parquet file, or is damaged. Fetch it again.") from error


def iter_rows(table: pa.Table) -> Iterator[dict[str, Any]]:
    """Yield the rows of an Arrow table as dicts."""
    columns = {name: table.column(name) for name in table.column_names}
    return ({name: column[row].as_py() for name, column in columns.items()} for row in range(table.num_rows))


def arrow_files(root: Path) -> list[tuple[str, Path]]:
    """(split, file) of each Arrow file of a folder that `save_to_disk` wrote: one dataset, or a folder for each split.

    Raises:
        InputError: the folder is no such folder.
    """
    splits: dict[str, Path] = {"train": root}
    if (root / "dataset_dict.json").is_file():
        stated = read_json(root / "dataset_dict.json")
        names = stated.get("splits") if isinstance(stated, dict) else None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            file = root / "dataset_dict.json"
            raise InputError(f"{file} names no splits. Write the dataset again with save_to_disk.")
        splits = {split_name(name): root / name for name in names}
    files = []
    for split, folder in splits.items():
        state = read_json(folder / "state.json")
        stated = state.get("_data_files") if isinstance(state, dict) else None
        if not isinstance(stated, list):
            raise InputError(f"{folder / 'state.json'} names no data files. Write the dataset again with save_to_disk.")
        files += [(split, folder / str(dict(item).get("filename"))) for item in stated if isinstance(item, dict)]
    return files


def find_parquet_files(root: Path) -> tuple[Path, list[Path]]:
    """Find the parquet files of a dataset; a dataset on the hub is downloaded.

    Args:
        root: a parquet file, a folder, or a hub name owner/name.

    Returns:
        The folder that image paths are relative to, and the parquet files in it and its subfolders.

    Raises:
        InputError: there is no parquet file, or the download fails.
    """
    if root.is_file():
        return root.parent, [root]
    if not root.exists():
        root = _from_hub(root)
    files = sorted(path for path in root.rglob("*.parquet") if path.is_file())
    if not files:
        raise InputError(f"{root} has no *.parquet file. Point --root at the folder that has them.")
    return root, files


def _from_hub(root: Path) -> Path:
    hub_name = root.as_posix()
    if not _HUB_NAME.fullmatch(hub_name):
        raise InputError(f"{root} does not exist. Give --root a parquet file, a folder, or a hub name owner/name.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_name, repo_type="dataset", allow_patterns=["*.parquet"]))
    except Exception as error:  # the hub's client raises a dozen types, from no network to an unknown name
        raise InputError(
            f"{hub_name} is not a local folder, and its download from the hub failed "
            f"({type(error).__name__}). Check the name, or give --root a folder with its parquet files."
        ) from error


def stem_of(file: Path) -> str:
    return Path(file.name.removesuffix(".gz")).stem


def _split(file: Path) -> str:
    """The split that the name of a file begins with, else train; its folder does not count."""
    return split_of_file(Path(stem_of(file)))


def _delimited(delimiter: str | None) -> Callable[[Path, list[str]], list[Source]]:
    def open_file(file: Path, notes: list[str]) -> list[Source]:
        columns, rows = delimited_rows(file, delimiter)
        _check_header(file, columns)
        filled = _without_blank(rows, file, notes)
        return [Source(file.name, stem_of(file), [c for c in columns if c], filled, _split(file))]

    return open_file


def _check_header(file: Path, columns: Sequence[str]) -> None:
    repeated = sorted({column for column in columns if column and columns.count(column) > 1})
    if repeated:
        raise InputError(f"{file.name}, row 1: column '{repeated[0]}' occurs twice. Give each column its own name.")
    if not any(columns):
        raise InputError(f"{file.name}, row 1: no column has a name. Write the names of the columns in the first row.")


def _without_blank(rows: Iterable[tuple[int, Any]], file: Path, notes: list[str]) -> Iterator[SourceRow]:
    """Leave out the rows without any filled cell, and count them."""
    blank = 0
    for number, cells in rows:
        if isinstance(cells, dict) and not any(value not in (None, "") for value in cells.values()):
            blank += 1
        else:
            yield SourceRow(number, cells)  # decoded from UTF-8: there is no half of a surrogate pair
    if blank:
        notes.append(f"{file.name}: {blank} blank rows left out")


def _workbook(file: Path, notes: list[str]) -> list[Source]:
    """The first sheet of a workbook; or, if sheets are named as splits are, each of these."""
    try:
        import openpyxl
    except ImportError as error:
        raise InputError(
            f"{file.name}: an .xlsx file needs openpyxl. Install normtune[xlsx], or save the sheet as CSV (UTF-8)."
        ) from error
    try:
        book = openpyxl.load_workbook(file, read_only=True, data_only=True)
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror or 'damaged'}. Check --root.") from error
    except Exception as error:  # zipfile, XML and openpyxl's own errors
        raise InputError(
            f"{file.name} is not an .xlsx workbook that can be read: damaged, protected by a password, or of another "
            "format. Save it again as .xlsx, or as CSV (UTF-8)."
        ) from error
    sheets = [sheet for sheet in book.worksheets if split_name(sheet.title) in SPLITS] or book.worksheets[:1]
    if others := [sheet.title for sheet in book.worksheets if sheet not in sheets]:
        notes.append(f"{file.name}: sheets that are not read: {', '.join(others)}")
    sources = []
    for sheet in sheets:
        rows = _filled_rows(file, sheet)
        _, header = next(rows, (0, ()))
        if not header:
            raise InputError(f"{file.name}: sheet '{sheet.title}' is empty. Fill it, or delete it.")
        columns = ["" if value is None else str(value).strip() for value in header]
        _check_header(file, columns)
        named = [column for column in columns if column]
        sources.append(_part(file, sheet.title, len(sheets) > 1, named, _sheet_rows(columns, rows)))
    return sources


def _part(file: Path, part: str, several: bool, columns: list[str], rows: Iterable[SourceRow]) -> Source:
    """One of `several` sheets or lists of a file. A part that is named "test" has the rows of the test split."""
    split = split_name(part) if split_name(part) in SPLITS else _split(file)
    name, stem = (f"{file.name} ({part})", f"{stem_of(file)}-{part}") if several else (file.name, stem_of(file))
    return Source(name, stem, columns, rows, split)


def _filled_rows(file: Path, sheet: Any) -> Iterator[tuple[int, Sequence[Any]]]:
    """Yield (row number from 1, values) of the rows of a sheet that are not blank."""
    try:
        for number, values in enumerate(sheet.iter_rows(values_only=True), start=1):
            if any(value not in (None, "") for value in values):
                yield number, values
    except Exception as error:  # damaged XML inside the workbook
        raise InputError(f"{file.name}: sheet '{sheet.title}' is damaged. Save the workbook again.") from error


def _sheet_rows(columns: Sequence[str], rows: Iterable[tuple[int, Sequence[Any]]]) -> Iterator[SourceRow]:
    for number, values in rows:
        cells = {name: _plain(value) for name, value in zip(columns, values, strict=False) if name}
        yield SourceRow(number, check_characters(cells))


def _plain(value: Any) -> Any:
    """A cell of a sheet: whole numbers without a decimal point, dates and truth values as text."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return str(value) if isinstance(value, bool) or not isinstance(value, str | int | float | None) else value


def _json_lines(file: Path, notes: list[str]) -> list[Source]:
    rows = (SourceRow(number, cells) for number, cells in json_lines(file))
    first = list(islice(rows, PEEK_ROWS))
    return [Source(file.name, stem_of(file), fields_of(first), chain(first, rows), split_of_jsonl(file))]


def fields_of(rows: Iterable[SourceRow]) -> list[str]:
    return list(dict.fromkeys(name for row in rows if isinstance(row.cells, dict) for name in row.cells))


def split_of_jsonl(file: Path) -> str:
    name = split_name(stem_of(file))
    return name if name in SPLITS else "train"


def _json(file: Path, notes: list[str]) -> list[Source]:
    """A list of objects; an object with one such list; or an object with a list for each split."""
    value = read_json(file)
    if isinstance(value, dict):
        lists = {name: rows for name, rows in value.items() if isinstance(rows, list)}
        by_split = {name: rows for name, rows in lists.items() if split_name(name) in SPLITS}
        if not by_split and len(lists) != 1:
            raise InputError(f"{file} holds no list of rows. Write [{{...}}, {{...}}], or one list for each split.")
        if left_out := [name for name in value if name not in (by_split or lists)]:
            notes.append(f"{file.name}: fields that are not read: {', '.join(left_out)}")
        lists = by_split or lists
    elif isinstance(value, list):
        lists = {"": value}
    else:
        raise InputError(f"{file} holds no list of rows. Write [{{...}}, {{...}}].")
    sources = []
    for name, rows in lists.items():
        numbered = [SourceRow(number, check_characters(cells)) for number, cells in enumerate(rows, start=1)]
        sources.append(_part(file, name, len(lists) > 1, fields_of(numbered), numbered))
    return sources


def _parquet(file: Path, name: str) -> Source:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        columns = list(pq.read_schema(file).names)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{file} is not a parquet file, or is damaged. Fetch it again.") from error
    return Source(name, stem_of(file), columns, parquet_rows(file), split_of_file(file))


def _metadata(root: Path, file: Path, notes: list[str]) -> list[Source]:
    """The metadata table of an image folder; its image paths are relative to its own folder."""
    folder = file.parent.relative_to(root).as_posix()
    folder = "" if folder == "." else folder
    split = split_of_file(file.relative_to(root))
    sources = [_parquet(file, file.name)] if file.suffix == ".parquet" else _OPENERS[SUFFIXES[file.suffix]](file, notes)
    name = file.relative_to(root).as_posix()
    return [Source(name, split, source.columns, source.rows, split, folder) for source in sources]


def _arrow_folder(root: Path) -> list[Source]:
    sources, counts = [], dict.fromkeys(SPLITS, 0)
    for split, file in arrow_files(root):
        table = arrow_table(file)
        first = counts.get(split, 0)
        counts[split] = first + table.num_rows
        rows = arrow_rows(file, first)
        name = file.relative_to(root).as_posix()
        sources.append(Source(name, split, list(table.column_names), rows, split))
    return sources


def arrow_rows(file: Path, first: int = 0) -> Iterator[SourceRow]:
    """The rows of an Arrow file, numbered from `first`; numbers of classes become their names.

    Raises:
        InputError: the file is missing or damaged.
    """
    labels = _class_labels(file.parent)
    for row, cells in enumerate(iter_rows(arrow_table(file))):
        for column, names in labels.items():
            value = cells.get(column)
            if isinstance(value, int) and 0 <= value < len(names):
                cells[column] = names[value]
        yield SourceRow(first + row, check_characters(cells), (file, 0, row))


def _class_labels(folder: Path) -> dict[str, list[str]]:
    """Column -> names of its classes, for the columns that hold class numbers (`ClassLabel`)."""
    try:
        features = json.loads((folder / "dataset_info.json").read_bytes()).get("features")
    except (OSError, ValueError, AttributeError):
        return {}
    if not isinstance(features, dict):
        return {}
    return {
        name: [str(label) for label in feature["names"]]
        for name, feature in features.items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and isinstance(feature.get("names"), list)
    }


_OPENERS: dict[str, Callable[[Path, list[str]], list[Source]]] = {
    "csv": _delimited(None),
    "tsv": _delimited("\t"),
    "xlsx": _workbook,
    "json": _json,
    "jsonl": _json_lines,
}
assert _OPENERS.keys() < FORMATS.keys()
