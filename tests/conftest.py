from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from normtune import cli
from tests.support.tiny_miss import save_tiny_miss


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny MISS with random weights, on disk; tests must not write there."""
    return save_tiny_miss(tmp_path_factory.mktemp("base"))


@pytest.fixture
def run_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """A function that runs a command in this process and returns (exit status, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["normtune", *map(str, arguments)])
        capsys.readouterr()  # discard what was printed before the command
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, printed.out, printed.err

    return call
