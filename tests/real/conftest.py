"""Folders of real datasets, which are not part of the repository."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# The default folder of the datasets; NORMTUNE_DATA names another one.
_DEFAULT = Path(__file__).parents[2].parent / "shared" / "data"


def dataset_folder(name: str) -> Path:
    """Return the folder of a real dataset; skip the test if there is none."""
    root = Path(os.environ.get("NORMTUNE_DATA") or _DEFAULT) / name
    if not root.is_dir():
        pytest.skip(f"no real data at {root}: set NORMTUNE_DATA to the folder that contains {name}/")
    return root


@pytest.fixture(scope="session")
def slake_root() -> Path:
    return dataset_folder("slake")


@pytest.fixture(scope="session")
def vqa_rad_root() -> Path:
    return dataset_folder("vqa-rad")


@pytest.fixture(scope="session")
def openi_root() -> Path:
    return dataset_folder("openi")


@pytest.fixture(scope="session")
def medpix_root() -> Path:
    return dataset_folder("medpix")
