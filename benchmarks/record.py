"""Write the JSON record of a benchmark: its rows, package versions and the machine that it ran on."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

from normtune.runtime.environment import hardware, versions
from normtune.runtime.files import write_json


def record(path: Path, name: str, rows: list[dict[str, Any]], **about: Any) -> None:
    """Write `rows` with the date, the versions and the machine to `path`, and print the path."""
    write_record(path, name, rows, **about)
    print(f"Written: {path}")


def write_record(path: Path, name: str, rows: list[dict[str, Any]], **about: Any) -> None:
    """Write the record without a message, for a benchmark that rewrites it as its rows arrive."""
    write_json(
        path,
        {
            "benchmark": name,
            "date": date.today().isoformat(),
            **about,
            "rows": rows,
            "versions": versions(),
            "machine": hardware(),
        },
    )
