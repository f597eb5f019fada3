"""Digests of the rows and pictures that an adapter was trained on, without their text.

`training_rows.json` is in the folder of the adapter. `overlap` compares it with the rows of an evaluation.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from normtune.adapters.info import ROWS_FILE
from normtune.data.examples import Example, Examples, as_examples, image_keys
from normtune.data.pictures import DIGEST_BYTES, read_pictures
from normtune.data.records import Dataset
from normtune.errors import InputError
from normtune.runtime.files import atomic_write, read_json

_ROWS_AT_ONCE = 10_000  # that are hashed or written together
_TEXTS = 100_000  # texts in the cache of `plain`


@dataclass(frozen=True, eq=False)
class TrainingRows:
    """Digests of training rows and of their pictures."""

    digest: str  # of all rows in their order, exactly as they are trained on; part of a run's identity
    # hashes of the rows (pictures, question and answer; case and blanks do not count), sorted; 64-bit numbers,
    # [different rows]
    rows: NDArray[np.uint64]
    pictures: tuple[str, ...]  # hashes of the pictures' pixels, sorted

    def write(self, path: Path) -> None:
        """Write `training_rows.json`: the hashes as hexadecimal text, without all of them in memory as text."""
        with atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
            file.write(f'{{\n  "digest": "{self.digest}",\n  "rows": [')
            for start in range(0, len(self.rows), _ROWS_AT_ONCE):
                lines = (f'\n    "{number:016x}"' for number in self.rows[start : start + _ROWS_AT_ONCE].tolist())
                file.write(("," if start else "") + ",".join(lines))
            file.write("\n  ],\n" if len(self.rows) else "],\n")
            file.write(f'  "pictures": {json.dumps(self.pictures, indent=2).replace(chr(10), chr(10) + "  ")}\n}}\n')


@dataclass(frozen=True)
class Overlap:
    """How many of the evaluated rows and pictures an adapter was trained on. The names are JSON keys."""

    rows: int  # evaluated rows that are among the training rows
    rows_evaluated: int
    pictures: int  # evaluated pictures that are among the training pictures
    pictures_evaluated: int

    def __str__(self) -> str:
        return (
            f"{self.rows:,} of {self.rows_evaluated:,} rows and {self.pictures:,} of {self.pictures_evaluated:,} "
            "pictures were in the training data of the adapter"
        )


def hash_rows(dataset: Dataset, examples: Sequence[Example]) -> TrainingRows:
    """Compute the digests of examples; every picture is opened once.

    The names of files and the ids of rows do not count, so that a dataset may be moved.
    """
    examples = as_examples(examples)
    pictures = picture_hashes(dataset, examples)
    # rows of one image are trained as a group, so that the order of the images counts
    order = {key: f"{index}:{digest}" for index, (key, digest) in enumerate(pictures.items())}
    option_codes, options_of = examples.codes("options")
    options = ["".join(f"{text}\0" for text in of_row) for of_row in options_of]
    columns = map(examples.texts, ("kind", "question", "answer"))
    rows = zip(_contexts(examples, order), _iterate(option_codes), *columns, strict=True)
    lines = (f"{kind}\0{context}{q}\0{a}\0{options[code]}\n" for context, code, kind, q, a in rows)
    exact = hashlib.sha256()
    while text := "".join(islice(lines, _ROWS_AT_ONCE)):
        exact.update(text.encode("utf-8", "surrogatepass"))
    hashes = np.unique(_row_hashes(examples, pictures))
    return TrainingRows(exact.hexdigest(), hashes, tuple(sorted({*pictures.values()})))


def picture_hashes(dataset: Dataset, examples: Sequence[Example]) -> dict[str, str]:
    """Image key -> hash of the picture's size and pixels, in the order of the examples."""
    pictures = read_pictures(dataset, image_keys(as_examples(examples)))
    # a damaged file, or one that --text-only allows to be missing, is hashed by its name
    return {key: picture.digest or _hash(f"cannot be read: {key}").hex() for key, picture in pictures.items()}


def read_rows(adapter: Path) -> TrainingRows | None:
    """Read the digests of an adapter's training rows; None if its folder does not record them (version 0.1).

    Raises:
        InputError: a file of the adapter is damaged.
    """
    from normtune.adapters.storage import read_adapter_info  # here: it imports torch, and `compare` reads only counts

    recorded = (read_adapter_info(adapter).data or {}).get("rows_digest")
    path = adapter / ROWS_FILE
    if recorded is None or not path.is_file():
        return None
    stored = read_json(path)
    if not isinstance(stored, dict) or stored.get("digest") != recorded:
        raise InputError(f"{path} does not belong to the adapter beside it. Copy both again, or remove the file.")
    rows = np.array([int(text, 16) for text in stored["rows"]], np.uint64)
    return TrainingRows(recorded, rows, tuple(stored["pictures"]))


def overlap(adapter: Path, dataset: Dataset, examples: Sequence[Example]) -> Overlap | None:
    """Count the examples, and their pictures, that an adapter was trained on; None if it does not record its rows.

    Raises:
        InputError: a file of the adapter is damaged.
    """
    trained = read_rows(adapter)
    if trained is None:
        return None
    pictures = picture_hashes(dataset, examples)
    evaluated_pictures = {*pictures.values()}
    return Overlap(
        rows=int(np.isin(_row_hashes(as_examples(examples), pictures), trained.rows).sum()),
        rows_evaluated=len(examples),
        pictures=len(evaluated_pictures.intersection(trained.pictures)),
        pictures_evaluated=len(evaluated_pictures),
    )


def _row_hashes(examples: Examples, pictures: dict[str, str]) -> NDArray[np.uint64]:
    """A hash of the pictures and texts of each row, [rows]; earlier turns come first."""

    @lru_cache(_TEXTS)
    def plain(text: str) -> str:
        return " ".join(text.casefold().split())

    hashes = bytearray()
    columns = (map(plain, examples.texts(name)) for name in ("question", "answer"))
    for context, question, answer in zip(_contexts(examples, pictures, plain), *columns, strict=True):
        hashes += _hash(f"{context}{question}\0{answer}")
    return np.frombuffer(hashes, ">u8").astype(np.uint64)


def _contexts(
    examples: Examples, pictures: dict[str, str], as_text: Callable[[str], str] = lambda text: text
) -> Iterator[str]:
    """The beginning of each row's text: a text for each picture, then the earlier turns, each ended by a NUL.

    Args:
        pictures: image key -> its text.
        as_text: changes the texts of the turns.
    """
    codes, images = examples.codes("images")
    history_codes, histories = examples.codes("history")
    keys = ["".join(f"{pictures[key]}\0" for key in of_row) for of_row in images]
    turns = ["".join(f"{as_text(text)}\0" for turn in history for text in turn) for history in histories]
    for code, turn in zip(_iterate(codes), _iterate(history_codes), strict=True):
        yield keys[code] + turns[turn]


def _iterate(codes: NDArray[np.int32]) -> Iterator[int]:
    """The codes as integers, in blocks: a list of all codes would take as much memory as the rows."""
    for start in range(0, len(codes), _ROWS_AT_ONCE):
        yield from codes[start : start + _ROWS_AT_ONCE].tolist()


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=DIGEST_BYTES).digest()
