"""What tests of the engine share."""

from __future__ import annotations

from pathlib import Path

import pytest

from normtune.models.family import Family
from normtune.models.loading import load


@pytest.fixture
def family(base: Path) -> Family:
    """A tiny MISS, loaded anew."""
    return load(str(base))
