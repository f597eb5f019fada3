"""Fixtures for the tests of the serving engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from normtune.models.family import Family
from normtune.models.loading import load


@pytest.fixture
def family(base: Path) -> Family:
    """Load a tiny MISS model; every test gets its own."""
    return load(str(base))
