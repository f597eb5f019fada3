"""Digests of the rows and pictures that an adapter was trained on, without their text.

`training_rows.json` is in the folder of the adapter. `overlap` compares it with the rows of an evaluation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from normtune.adapters.info import ROWS_FILE
from normtune.data.pictures import DIGEST_BYTES, read_pictures
from normtune.data.records import Dataset, Example
from normtune.errors import InputError
from normtune.runtime.files import read_json


@dataclass(frozen=True)
class TrainingRows:
    """Digests of training rows and of their pictures.

    Attributes:
        digest: of all rows in their order, exactly as they are trained on; part of a run's identity.
        rows: hashes of the rows (pictures, question and answer; case and blanks do not count), sorted.
        pictures: hashes of the pictures' pixels, sorted.
    """

    digest: str
    rows: tuple[str, ...]
    pictures: tuple[str, ...]


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
    pictures = picture_hashes(dataset, examples)
    order = {key: str(index) for index, key in enumerate(pictures)}  # rows of one image are trained as a group
    exact = hashlib.sha256()
    for example in examples:
        keys = [f"{order[key]}:{pictures[key]}" for key in example.images]
        exact.update("\0".join([example.kind, *keys, *_texts(example), "\n"]).encode("utf-8", "surrogatepass"))
    rows = {_row_hash(example, pictures) for example in examples}
    return TrainingRows(exact.hexdigest(), tuple(sorted(rows)), tuple(sorted({*pictures.values()})))


def picture_hashes(dataset: Dataset, examples: Sequence[Example]) -> dict[str, str]:
    """Image key -> hash of the picture's size and pixels, in the order of the examples."""
    pictures = read_pictures(dataset, (key for example in examples for key in example.images))
    # a damaged file, or one that --text-only allows to be missing, is hashed by its name
    return {
        key: picture.digest or _hash(f"cannot be read: {key}".encode("utf-8", "surrogatepass"))
        for key, picture in pictures.items()
    }


def overlap(adapter: Path, dataset: Dataset, examples: Sequence[Example]) -> Overlap | None:
    """Count the examples, and their pictures, that an adapter was trained on.

    Returns:
        The counts, or None if the adapter's folder does not record its training rows (adapters of version 0.1).

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
    pictures = picture_hashes(dataset, examples)
    trained_rows, trained_pictures = set(stored["rows"]), set(stored["pictures"])
    evaluated_pictures = {*pictures.values()}
    return Overlap(
        rows=sum(_row_hash(example, pictures) in trained_rows for example in examples),
        rows_evaluated=len(examples),
        pictures=len(evaluated_pictures & trained_pictures),
        pictures_evaluated=len(evaluated_pictures),
    )


def _row_hash(example: Example, pictures: dict[str, str]) -> str:
    texts = [" ".join(text.casefold().split()) for text in _texts(example)]
    return _hash("\0".join([*(pictures[key] for key in example.images), *texts]).encode("utf-8", "surrogatepass"))


def _texts(example: Example) -> list[str]:
    """The texts of an example, earlier turns first."""
    return [text for turn in (*example.history, (example.question, example.answer)) for text in turn]


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).hexdigest()
