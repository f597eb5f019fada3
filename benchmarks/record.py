"""The JSON record of a benchmark: its rows, with the versions and the machine that produced them."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

from normtune.runtime.environment import hardware, versions
from normtune.runtime.files import write_json


def record(path: Path, name: str, rows: list[dict[str, Any]], **about: Any) -> None:
    """Write `rows` with the date, the versions and the machine to `path`, and print the path."""
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
    print(f"Written: {path}")
