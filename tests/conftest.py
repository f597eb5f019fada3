from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.tiny_miss import save_tiny_miss


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny MISS with random weights, on disk; tests must not write there."""
    return save_tiny_miss(tmp_path_factory.mktemp("base"))
