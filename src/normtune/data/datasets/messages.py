"""Data in the ecosystem's shapes: `messages` with `images`, ShareGPT's and LLaVA-Med's `conversations`."""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from normtune.data.images.files import ImageFolder
from normtune.data.reading.cells import SPLITS, is_yes_no, split_name, split_of_file
from normtune.data.reading.conversations import Pair, conversation
from normtune.data.reading.row_reader import Row, RowReader, image_folder
from normtune.data.reading.tables import Fault, json_lines
from normtune.data.records import Dataset, Example, Kind, Problem
from normtune.errors import InputError, did_you_mean
from normtune.runtime.files import read_json

if TYPE_CHECKING:
    from normtune.data.reading.parquet_files import ParquetImages

_FIELDS = ("messages", "conversations", "images", "image", "id", "kind", "split", "domain")
_KINDS: tuple[Kind, ...] = ("open", "closed", "report")
_IMAGE_FOLDERS = ("", "images", "image")
_SHOWN = 5  # bad rows named in one error
_URLS = ("http://", "https://", "data:", "s3://", "gs://")


def read(
    root: Path,
    *,
    strict: bool = True,
    image_root: Path | None = None,
    licence: str = "unknown",
    text_only: bool = False,
) -> Dataset:
    """Read a file, or all *.jsonl, *.json and *.parquet files of a folder; one conversation a row.

    See `normtune.data.reading.conversations.conversation` for a row's shape. Each pair of turns becomes one question of the
    images shown up to it, answered without the turns before it, as they share the image and nothing else; a
    later pair that refers back to earlier turns (`turns.refers_back`) is left out and listed, and the
    survey's notes count both. Rows without an image are left out and listed.

    Optional fields: `id`, `kind` (open, closed, report; without it yes and no are closed), `split` (without
    it the file's name decides, then train); LLaVA-Med's `domain` becomes the modality, further fields of text
    or numbers become `meta`. Ids are the row's id, with `-turn2` and so on for later pairs; as such files use
    an image's id again for its next conversation, ids that come again are numbered and listed.

    Args:
        strict: raise an error that names the bad rows; otherwise they are left out and listed as problems.
        image_root: what image paths are relative to; by default the file's folder, or images/ in it.

    Raises:
        InputError: there is no such file, no usable row, or (strict) a bad row.
    """
    files = _files(root)
    reading = RowReader("messages", text_only)
    base = root if root.is_dir() else root.parent
    taken = _Taken(base.absolute(), _opener(base, files))
    for file in files:
        for number, cells, place in _rows(reading, file, named=len(files) == 1):
            try:
                _read_row(reading, taken, file, number, cells, place)
            except Fault as fault:
                taken.faults.append(Problem(file.name, str(number), fault.what, fault.mend))
                reading.left_out.append(
                    Example(f"{file.stem}-{number}", (), "", "", "open", split_of_file(file))
                )
    if strict and taken.faults:
        raise InputError(_told(taken.faults))
    reading.problems += taken.faults
    names = (name for example in reading.examples for name in example.images if name not in taken.inside)
    folder = image_root or image_folder(base, _IMAGE_FOLDERS, names)
    reading.check_images(folder, inside=taken.inside)
    reading.check_repeats()
    reading.notes += taken.notes()
    return reading.dataset(_Opener(taken.parquet, ImageFolder(folder)), licence)


@dataclass
class _Taken:
    """What became of the rows so far."""

    base: Path  # absolute
    parquet: ParquetImages | None
    conversations: int = 0
    pairs: int = 0
    dependent: int = 0
    faults: list[Problem] = field(default_factory=list)

    @property
    def inside(self) -> ParquetImages | tuple[()]:
        return self.parquet if self.parquet is not None else ()

    def notes(self) -> list[str]:
        notes = [
            f"{self.conversations} conversations of {self.pairs} pairs of turns: each pair is one question "
            "of its image, answered without the turns before it"
        ]
        if self.dependent:
            notes.append(f"{self.dependent} pairs left out, as they refer back to earlier turns")
        return notes


@dataclass(frozen=True)
class _Opener:
    """Images inside of parquet files by key, others by path."""

    parquet: ParquetImages | None
    folder: Callable[[str], Image.Image]

    def __call__(self, key: str) -> Image.Image:
        return self.parquet(key) if self.parquet is not None and key in self.parquet else self.folder(key)


def _files(root: Path) -> list[Path]:
    if not root.is_dir():
        return [root]
    files = [*sorted(root.glob("*.jsonl")), *sorted(root.glob("*.json")), *sorted(root.rglob("*.parquet"))]
    if not files:
        raise InputError(f"{root} holds no *.jsonl, *.json or *.parquet file. Point --root at one.")
    return files


def _opener(base: Path, files: list[Path]) -> ParquetImages | None:
    if not any(file.suffix == ".parquet" for file in files):
        return None
    from normtune.data.reading.parquet_files import ParquetImages  # pyarrow takes half a second

    return ParquetImages(base)


_Place = tuple[Path, int, int] | None  # file, row group, row in it, of a parquet file


def _rows(reading: RowReader, file: Path, named: bool) -> Iterator[tuple[int, Any, _Place]]:
    """(row number from 1, the row or why it is none, its place in a parquet file)."""
    if file.suffix == ".parquet":
        yield from _parquet_rows(file)
    elif file.suffix == ".jsonl":
        for number, cells in json_lines(file):
            yield number, cells, None
    else:
        rows = read_json(file)
        if isinstance(rows, list):
            yield from ((number, cells, None) for number, cells in enumerate(rows, start=1))
        elif named:
            raise InputError(f"{file} holds no list of rows. Write a list of conversations, or JSON lines.")
        else:  # such as LLaMA-Factory's dataset_info.json
            reading.problems.append(Problem(file.name, "", "holds no list of rows", "Not read."))


def _parquet_rows(file: Path) -> Iterator[tuple[int, Any, _Place]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from normtune.data.reading.parquet_files import table_rows

    try:
        with pq.ParquetFile(file) as parquet:
            number = 0
            for group in range(parquet.num_row_groups):
                for within, cells in enumerate(table_rows(parquet.read_row_group(group))):
                    number += 1
                    yield number, cells, (file, group, within)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{file} is no parquet file, or is damaged. Fetch it again.") from error


def _read_row(reading: RowReader, taken: _Taken, file: Path, number: int, cells: Any, place: _Place) -> None:
    if isinstance(cells, Fault):
        raise cells
    if not isinstance(cells, dict):
        raise Fault("not a JSON object", 'Write {"messages": [...], "images": [...]}.')
    found = conversation(cells)
    kind, split, id = _kind(cells), _split(cells, file), _id(cells, file, number)
    column = "images" if cells.get("images") else "image"
    keys = [_key(taken, image, place, column, index) for index, image in enumerate(found.images)]
    taken.conversations += 1
    taken.pairs += len(found.pairs)
    for pair in found.pairs:
        later = f", turn {pair.turn}" if pair.turn > 1 else ""
        row = reading.row(file.name, f"{number}{later}", f"{id}-turn{pair.turn}" if later else id)
        answer = row.prose("answer", pair.answer)
        said: Kind = kind or ("closed" if is_yes_no(answer) else "open")
        if pair.refers_back:
            taken.dependent += 1
            _leave_out(reading, row, pair, keys, said, split)
            continue
        row.finish(
            keys[: pair.images], row.prose("question", pair.question), answer, said, split, _meta(cells)
        )


def _leave_out(reading: RowReader, row: Row, pair: Pair, keys: list[str], kind: Kind, split: str) -> None:
    row.problem("refers back to earlier turns", "Left out: write the question so that it stands alone.")
    images = tuple(keys[: pair.images])
    reading.left_out.append(Example(row.id, images, pair.question, pair.answer, kind, split))


def _key(taken: _Taken, image: Any, place: _Place, column: str, index: int) -> str:
    """The key of an image: the SHA-1 of its bytes, or its path below the folder of images."""
    data = image.get("bytes") if isinstance(image, dict) else image
    if isinstance(data, bytes) and taken.parquet is not None and place is not None:
        return taken.parquet.add(data, place, column, index)
    path = image.get("path") if isinstance(image, dict) else image
    if not isinstance(path, str) or not path.strip():
        raise Fault(f"image {index + 1} is no path", "Write its path.")
    path = path.strip()
    if path.startswith(_URLS):
        raise Fault(f"image {index + 1} is a URL, not a file", "Fetch it and write its path.")
    if Path(path).is_absolute() and Path(path).is_relative_to(taken.base):
        path = Path(path).relative_to(taken.base).as_posix()
    key = posixpath.normpath(path.replace("\\", "/"))
    if key.startswith(("/", "../")) or key == "..":
        what = f"the path of image {index + 1} leads out of the folder of images"
        raise Fault(what, "Write it relative to the file, or to images/ beside it.")
    return key


def _kind(cells: dict[str, Any]) -> Kind | None:
    word = cells.get("kind")
    if word in (None, ""):
        return None
    for kind in _KINDS:
        if kind == word:
            return kind
    raise Fault(f"kind is unknown{did_you_mean(str(word), _KINDS)}", f"Known kinds: {', '.join(_KINDS)}.")


def _split(cells: dict[str, Any], file: Path) -> str:
    word = cells.get("split")
    if word in (None, ""):
        return split_of_file(file)
    name = split_name(str(word))
    if name not in SPLITS:
        raise Fault(f"split is unknown{did_you_mean(name, SPLITS)}", f"Known splits: {', '.join(SPLITS)}.")
    return name


def _id(cells: dict[str, Any], file: Path, number: int) -> str:
    id = cells.get("id")
    return str(id) if isinstance(id, str | int) and str(id).strip() else f"{file.stem}-{number}"


def _meta(cells: dict[str, Any]) -> dict[str, str]:
    extra = {key: value for key, value in cells.items() if key not in _FIELDS}
    meta = {key: str(value) for key, value in extra.items() if isinstance(value, str | int | float)}
    domain = cells.get("domain")  # LLaVA-Med's {"chest_xray": true, "mri": false, ...}
    if isinstance(domain, dict):
        meta.setdefault("modality", ", ".join(str(name) for name, holds in domain.items() if holds is True))
    return meta


def _told(faults: list[Problem]) -> str:
    shown = " ".join(f"{fault.file}, row {fault.row}: {fault.message}" for fault in faults[:_SHOWN])
    more = f" And {len(faults) - _SHOWN} more bad rows." if len(faults) > _SHOWN else ""
    return shown + more
