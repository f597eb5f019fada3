"""Which folders a client may name: adapters below the adapter root, and pages of reviews; no others."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from normtune.errors import InputError
from normtune.serving.http.errors import RequestRefused

NAME = r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}"  # of an adapter, and of each step to its folder
_STEP = re.compile(NAME, re.ASCII)
_PAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,119}\.html", re.ASCII)


def adapter_folder(root: Path | None, name: str) -> Path:
    """The folder `name` (`NAME` or `NAME/NAME`) below `root`.

    Raises:
        Refused: there is no root (403), the name is not one (400), or there is no such folder inside (404).
    """
    if root is None:
        raise RequestRefused(403, "adapters are not registered here. Start the server with --adapter-root.")
    steps = name.split("/")
    if not 1 <= len(steps) <= 4 or not all(_STEP.fullmatch(step) for step in steps):
        raise RequestRefused(400, "the folder is a name below the adapter root, as chest or run-3/chest.")
    inside = root.resolve()
    found = inside.joinpath(*steps).resolve()
    if not found.is_relative_to(inside) or not found.is_dir():  # a link may lead out of the root
        raise RequestRefused(404, "there is no such folder below the adapter root.", code="folder_not_found")
    return found


def check_name(name: str, where: str) -> None:
    """Whether an adapter may be called so; `where` the name stands is told.

    Raises:
        InputError: it may not.
    """
    if not _STEP.fullmatch(name):
        raise InputError(
            f"{where}: no name of an adapter. Use letters, digits, dots, dashes, _ and +, 64 at most."
        )


def named_adapters(options: Iterable[str]) -> dict[str, Path]:
    """`NAME=DIR`, one an adapter, as folders by name.

    Raises:
        InputError: not of that form, or a name is there twice.
    """
    found: dict[str, Path] = {}
    for option in options:
        name, equals, folder = option.partition("=")
        if not equals or not folder:
            raise InputError(f"--adapter {option}: give NAME=DIR.")
        check_name(name, f"--adapter {option}")
        if name in found:
            raise InputError(f"--adapter {name}: two adapters of that name. Give each its own.")
        found[name] = Path(folder)
    return found


def adapters_below(root: Path) -> dict[str, Path]:
    """The adapters that lie in a folder, by the names of their folders.

    Raises:
        InputError: there is no such folder.
    """
    if not root.is_dir():
        raise InputError(
            f"--adapter-root {root} is no folder. Give the one that holds the adapters' folders."
        )
    seen = sorted(one for one in root.iterdir() if not one.name.startswith("."))
    return {one.name: one for one in seen if (one / "adapter.json").is_file()}


def review_names(folder: Path | None) -> list[str]:
    """Names of the pages in a folder of reviews."""
    if folder is None or not folder.is_dir():
        return []
    return sorted(one.name for one in folder.iterdir() if _is_page(folder, one.name))


def review_page(folder: Path | None, name: str) -> Path:
    """The file of a page.

    Raises:
        Refused: 404, there is none of that name.
    """
    if folder is None or not _is_page(folder, name):
        raise RequestRefused(404, "there is no such page.")
    return folder / name


def _is_page(folder: Path, name: str) -> bool:
    """Whether `name` is an HTML file of this folder, not a link out of it."""
    if not _PAGE.fullmatch(name):
        return False
    file = (folder / name).resolve()
    return file.is_relative_to(folder.resolve()) and file.is_file()
