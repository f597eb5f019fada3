"""The tables and the plot of the README: runs `normtune demo` and keeps its small files.

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
        for file_name in ("table.md", "reports.md", "accuracy.png"):
            (options.out / file_name).write_bytes((Path(folder) / file_name).read_bytes())
    print(text)
    rows = [remove_paths(row) for row in results.pop("rows")]
    results["reports"] = [remove_paths(row) for row in results.pop("reports")]
    record(options.out / "results.json", "demo", rows, **results)


def remove_paths(row: dict[str, Any]) -> dict[str, Any]:
    """A row without the paths of the temporary folder."""
    training = row["training"] and {key: value for key, value in row["training"].items() if key != "out"}
    path_fields = ("out", "base", "adapter")
    evaluation = {key: value for key, value in row["evaluation"].items() if key not in path_fields}
    return {"name": row["name"], "training": training, "evaluation": evaluation}


if __name__ == "__main__":
    main()
