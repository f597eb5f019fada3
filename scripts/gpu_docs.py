"""Writes the GPU measurements of benchmarks/gpu.json into docs/speed.md, and their table to benchmarks/gpu.md.

    PYTHONPATH=src python scripts/gpu_docs.py

The page keeps its text; only the lines between the two markers are replaced.
"""

from __future__ import annotations

import json
import sys
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from gpu import table  # noqa: E402

PAGE, RECORD = ROOT / "docs" / "speed.md", ROOT / "benchmarks" / "gpu.json"
BEGIN = "<!-- from benchmarks/gpu.json, by scripts/gpu_docs.py -->\n"
END = "<!-- end -->\n"


def measurements(record: dict[str, Any]) -> str:
    """The lines of the page that a record determines: when, on what, and the table of all measurements."""
    day = date.fromisoformat(record["date"])
    versions = record["versions"]
    about = (
        f"Measured on {day:%d %B %Y} on one {record['machine']['accelerator']} with torch {versions['torch']}, "
        f"transformers {versions['transformers']} and PEFT {versions['peft']}:\n\n"
    )
    return about + table(record["rows"], record["tiny"])


def update(page: str, record: dict[str, Any]) -> str:
    """The page with the lines between its markers replaced."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + measurements(record) + END + after


def main() -> None:
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    RECORD.with_suffix(".md").write_text(table(record["rows"], record["tiny"]), encoding="utf-8")
    PAGE.write_text(update(PAGE.read_text(encoding="utf-8"), record), encoding="utf-8")


if __name__ == "__main__":
    main()
