"""What five seeds of one recipe cost against one: time and memory.

    python benchmarks/seeds.py --slake DIR --out benchmarks/seeds.json

One seed runs alone with every core. Five seeds run as a study runs them: a process for each core, each with the base,
the pictures and the data of its own, and one thread. Both are repeated in turn, and medians are reported. Nothing of
the forward pass is shared, because the seeds' norms differ from the first layer on and each sees its own batches.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from record import record

from normtune.runtime.text_table import markdown_table
from normtune.runtime.worker_pool import count_cores
from normtune.studies.plan import Cell, single_cell
from normtune.studies.run import run_cells

SEEDS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slake", type=Path, help="SLAKE's folder; without it, phantoms")
    parser.add_argument("--tune", nargs="+", default=("ln", "lora-8"))
    parser.add_argument("--pairs", type=int, default=2400, help="training pairs, seen once")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    data = {"data": "slake", "root": options.slake} if options.slake else {"data": "phantom-b:20/0/4"}
    rounds: dict[tuple[str, int], list[dict[str, float]]] = {}
    for _ in range(options.rounds):
        for recipe in options.tune:
            for seeds in (1, SEEDS):
                rounds.setdefault((recipe, seeds), []).append(measure(recipe, seeds, data, options.pairs))
    rows = [summary(recipe, rounds[recipe, 1], rounds[recipe, SEEDS]) for recipe in options.tune]
    print(table(rows))
    if options.out:
        record(options.out, "seeds", rows, model="nano", pairs=options.pairs, seeds=SEEDS)
        options.out.with_suffix(".md").write_text(table(rows), encoding="utf-8")


def measure(recipe: str, seeds: int, data: dict[str, Any], pairs: int) -> dict[str, float]:
    """Train and evaluate this many seeds as a study does, in a new folder."""
    shared = {"model": "nano", "device": "cpu", **data}
    cells: list[Cell] = [
        single_cell(f"seed-{seed}", {**shared, "tune": recipe, "epochs": 1, "limit": pairs, "seed": seed}, shared)
        for seed in range(seeds)
    ]
    workers = min(seeds, count_cores())
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        results = list(run_cells(cells, Path(folder), workers=workers))
    peaks = [max(row["training"]["peak_memory_bytes"], row["evaluation"]["peak_memory_bytes"]) for row in results]
    return {"seconds": time.perf_counter() - started, "bytes": float(max(peaks) * workers)}


def summary(recipe: str, single: list[dict[str, float]], many: list[dict[str, float]]) -> dict[str, Any]:
    """Medians of both, and the median ratio of the rounds."""
    row: dict[str, Any] = {"recipe": recipe, "rounds": {"1": single, str(SEEDS): many}}
    for name in single[0]:
        row[name] = {
            "1": median(round_[name] for round_ in single),
            str(SEEDS): median(round_[name] for round_ in many),
            "ratio": median(b[name] / a[name] for a, b in zip(single, many, strict=True)),
        }
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table of seconds and memory."""
    lines = [
        [
            f"`{row['recipe']}`",
            *(f"{row['seconds'][key]:.1f}" for key in ("1", str(SEEDS))),
            f"{row['seconds']['ratio']:.2f}",
            *(f"{row['bytes'][key] / 2**20:,.0f}" for key in ("1", str(SEEDS))),
        ]
        for row in rows
    ]
    head = ["recipe", "s, 1 seed", f"s, {SEEDS} seeds", "ratio"]
    head += ["MiB, 1 seed", f"MiB, {SEEDS} seeds"]
    return "\n".join(markdown_table(head, lines, "lr")) + "\n"


if __name__ == "__main__":
    main()
