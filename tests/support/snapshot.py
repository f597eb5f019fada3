"""Compares generated text with a committed snapshot file, and writes the file again on request."""

from __future__ import annotations

import json
from difflib import unified_diff
from pathlib import Path


def assert_matches_snapshot(file: Path, actual: str, source: str) -> None:
    """Check that two JSON texts have the same content. A failure shows the difference by lines.

    Args:
        file: the snapshot.
        actual: the text that is generated now.
        source: where it comes from, for the heading of the difference.
    """
    expected = file.read_text(encoding="utf-8")
    difference = unified_diff(expected.splitlines(), actual.splitlines(), file.name, source, lineterm="", n=9)
    assert json.loads(actual) == json.loads(expected), "\n".join(difference)


def write_snapshot(file: Path, text: str) -> None:
    """Replace the snapshot, after a change that is intended."""
    file.write_text(text, encoding="utf-8")
    print(f"Written: {file}")
