"""Checks the paths of image files that a dataset names, and finds the folder that they are in."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

from normtune.data.reading.tables import RowError
from normtune.errors import InputError

_URLS = ("http://", "https://", "s3://", "gs://")
_MAX_PATH = 1000  # characters; a longer text is the image itself, such as base64 without "data:"


def image_key(file: str, row: str, name: str) -> str:
    """An image's key: its path relative to the image folder, normalised so that one file has one key.

    Args:
        file, row: the place, for messages.
        name: the path in the file.

    Raises:
        InputError: the path is absolute or outside the folder, or the text is no path.
    """
    try:
        check_image_path("the image", name)
    except RowError as error:
        raise InputError(f"{file}, row {row}: {error.what}. {error.fix}") from error
    key = posixpath.normpath(name.replace("\\", "/")) if name else ""
    if key.startswith(("/", "../")) or key == ".." or ":" in key.split("/")[0]:
        what = "the image's path is outside the dataset's folder"
        raise InputError(f"{file}, row {row}: {what}. Write it relative to that folder.")
    return key


def check_image_path(image: str, path: str) -> None:
    """Check that a text can be the path of an image file. Messages do not contain it: it may be the image.

    Args:
        image: name of the image in messages, such as "image 1".

    Raises:
        RowError: the text is a URL, or too long for a path.
    """
    if path[:5].lower() == "data:":
        raise RowError(f"{image} is a data URL, not a file", "Save it as a file and write its path.")
    if path.lower().startswith(_URLS):
        raise RowError(f"{image} is a URL, not a file", "Download it and write its path.")
    if len(path) > _MAX_PATH:
        raise RowError(f"{image} is not a path", "Save it as a file and write its path.")


def find_image_folder(root: Path, subfolders: Sequence[str], names: Iterable[str]) -> Path:
    """Find the image folder: the first subfolder of root ("" is root itself) with one of the first 50 images.

    If no subfolder has any of them, the first subfolder.
    """
    first_names = list(islice(names, 50))
    for folder in (root / name for name in subfolders):
        if any((folder / name).is_file() for name in first_names):
            return folder
    return root / subfolders[0]


def missing_images(folder: Path, names: Iterable[str]) -> set[str]:
    """The names that are not files. Names are relative to `folder`, or absolute.

    Each directory is listed once, instead of a check file by file.
    """
    listings: dict[str, set[str]] = {}  # directory -> names of its files
    missing = set()
    for name in set(names):
        parent, file = os.path.split(os.path.normpath(os.path.join(folder, name)))
        if parent not in listings:
            try:
                with os.scandir(parent or ".") as entries:
                    listings[parent] = {entry.name for entry in entries if entry.is_file()}
            except (OSError, ValueError):  # ValueError: a NUL in the path
                listings[parent] = set()
        if file not in listings[parent]:
            missing.add(name)
    return missing
