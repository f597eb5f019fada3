"""Real datasets, where they lie beside the repository: none of them is part of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_BESIDE = Path(__file__).parents[2].parent / "shared" / "data"


def folder(name: str) -> Path:
    """The folder of one real dataset; the test is skipped where there is none."""
    root = Path(os.environ.get("NORMTUNE_DATA") or _BESIDE) / name
    if not root.is_dir():
        pytest.skip(f"no real data at {root}: set NORMTUNE_DATA to the folder that holds {name}/")
    return root


@pytest.fixture(scope="session")
def slake_root() -> Path:
    return folder("slake")


@pytest.fixture(scope="session")
def vqa_rad_root() -> Path:
    return folder("vqa-rad")


@pytest.fixture(scope="session")
def openi_root() -> Path:
    return folder("openi")


@pytest.fixture(scope="session")
def medpix_root() -> Path:
    return folder("medpix")
