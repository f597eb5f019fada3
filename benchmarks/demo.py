"""The tables and picture of the README: `normtune demo`, its small files kept.

python benchmarks/demo.py --out benchmarks/demo
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from record import record

from normtune.studies.demo import run_demo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results, text = run_demo(Path(folder))
        options.out.mkdir(parents=True, exist_ok=True)
        for name in ("table.md", "reports.md", "accuracy.png"):
            (options.out / name).write_bytes((Path(folder) / name).read_bytes())
    print(text)
    rows = [relative(row) for row in results.pop("rows")]
    results["reports"] = [relative(row) for row in results.pop("reports")]
    record(options.out / "results.json", "demo", rows, **results)


def relative(row: dict[str, Any]) -> dict[str, Any]:
    """A row without the folder that it was made in."""
    training = row["training"] and {name: v for name, v in row["training"].items() if name != "out"}
    dropped = ("out", "base", "adapter")
    evaluation = {name: v for name, v in row["evaluation"].items() if name not in dropped}
    return {"name": row["name"], "training": training, "evaluation": evaluation}


if __name__ == "__main__":
    main()
