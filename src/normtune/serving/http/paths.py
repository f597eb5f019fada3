"""Checks names from clients and turns them into paths: adapters below the adapter root, and review pages."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from normtune.adapters.hub import local_folder
from normtune.errors import InputError
from normtune.serving.http.errors import RequestRefused

NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}"  # an adapter's name, and each part of its folder's path
_NAME = re.compile(NAME_PATTERN, re.ASCII)
_PAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,119}\.html", re.ASCII)


def is_inside(path: Path, folder: Path) -> bool:
    """Return whether a path stays in a folder when all symbolic links are followed."""
    return path.resolve().is_relative_to(folder.resolve())


def adapter_folder(root: Path | None, name: str) -> Path:
    """Return the adapter folder `name` (`NAME` or `NAME/NAME`) below `root`.

    Raises:
        RequestRefused: there is no root (403), the name is not valid (400), or no such folder exists (404).
    """
    if root is None:
        raise RequestRefused(403, "this server does not register adapters. Start it with --adapter-root.")
    parts = name.split("/")
    if not 1 <= len(parts) <= 4 or not all(_NAME.fullmatch(part) for part in parts):
        raise RequestRefused(400, "give a folder below the adapter root, such as chest or run-3/chest.")
    folder = root.joinpath(*parts).resolve()
    if not is_inside(folder, root) or not folder.is_dir():
        raise RequestRefused(404, "no such folder below the adapter root.", code="folder_not_found")
    return folder


def check_adapter_name(name: str, where: str) -> None:
    """Check that a name is valid for an adapter.

    Args:
        where: its source, for the error message.

    Raises:
        InputError: it is not valid.
    """
    if not _NAME.fullmatch(name):
        raise InputError(f"{where}: not a valid adapter name. Use at most 64 letters, digits and the signs . _ + -")


def parse_adapter_options(options: Iterable[str]) -> dict[str, Path]:
    """Parse the values of `--adapter NAME=DIR`.

    Returns:
        The folder of each name.

    Raises:
        InputError: a value does not have this form, or a name is repeated.
    """
    adapters: dict[str, Path] = {}
    for option in options:
        name, equals, folder = option.partition("=")
        if not equals or not folder:
            raise InputError(f"--adapter {option}: use the form NAME=DIR.")
        check_adapter_name(name, f"--adapter {option}")
        if name in adapters:
            raise InputError(f"--adapter {name}: two adapters have this name. Rename one of them.")
        adapters[name] = local_folder(folder)
    return adapters


def find_adapters(root: Path) -> dict[str, Path]:
    """Return the adapter folders that are directly in `root`, by their names; links may leave it (`is_inside`).

    Raises:
        InputError: `root` is not a folder.
    """
    if not root.is_dir():
        raise InputError(f"--adapter-root {root} is not a folder. Give the folder that contains the adapters.")
    entries = sorted(entry for entry in root.iterdir() if not entry.name.startswith("."))
    names = ("adapter.json", "adapter_config.json")  # Normtune's and PEFT's
    return {entry.name: entry for entry in entries if any((entry / name).is_file() for name in names)}


def review_names(folder: Path | None) -> list[str]:
    """Return the names of the review pages in a folder."""
    if folder is None or not folder.is_dir():
        return []
    return sorted(entry.name for entry in folder.iterdir() if _is_page(folder, entry.name))


def review_page(folder: Path | None, name: str) -> Path:
    """Return the file of a review page.

    Raises:
        RequestRefused: 404, there is no page of that name.
    """
    if folder is None or not _is_page(folder, name):
        raise RequestRefused(404, "no such page.")
    return folder / name


def _is_page(folder: Path, name: str) -> bool:
    """Return whether `name` is an HTML file in this folder, and not a link that leaves it."""
    if not _PAGE.fullmatch(name):
        return False
    return is_inside(folder / name, folder) and (folder / name).is_file()
