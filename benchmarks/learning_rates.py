"""The best learning rate of each method on hospital B's validation split; every run sees the same pairs.

    python benchmarks/learning_rates.py --out benchmarks/learning_rates.json

`normtune.methods.registry.LEARNING_RATES` has the best rate of each method; a test checks that it agrees with
the record. The test split is not used.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from record import record

from normtune.studies.plan import Cell, single_cell
from normtune.studies.run import run_cells

LOW, MIDDLE, HIGH = (1e-4, 3e-4, 1e-3, 3e-3), (1e-3, 3e-3, 1e-2, 3e-2), (3e-3, 1e-2, 3e-2, 1e-1)
HIGHEST = (1e-2, 3e-2, 1e-1, 3e-1)
RATES = {"ln": HIGH, "bias": HIGHEST, "ia3": HIGHEST, "prefix": MIDDLE, "ptuning": HIGHEST, "lora": MIDDLE}
RATES |= {"adapter": MIDDLE, "attention": LOW, "ffn": LOW, "full": LOW}
RATES |= {"vera": HIGHEST, "road": HIGHEST, "miss": LOW, "ssf": HIGH}
RATES |= dict.fromkeys(("beft", "gamma"), (3e-2, 1e-1, 3e-1, 1.0))
PRESETS_OF = {"lora": "lora-8", "vera": "vera(r=64)"}  # PEFT's default rank of VeRA is for wider models


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--images", type=int, default=160, help="training images")
    parser.add_argument("--validate", type=int, default=80, help="validation images")
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--methods", nargs="+", default=list(RATES))
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        cells = [cell(method, rate, options) for method in options.methods for rate in RATES[method]]
        rows = []
        for result in run_cells(cells, Path(directory), workers=options.workers):
            method, rate = result["name"].split("@")
            score = result["evaluation"]["metrics"]["global_exact"]
            rows.append(
                {
                    "method": method,
                    "lr": float(rate),
                    "accuracy": score["value"],
                    "interval": [score["low"], score["high"]],
                    "final_loss": result["training"]["final_loss"],
                }
            )
            print(f"{method:<10} lr {float(rate):.0e}: {100 * score['value']:.1f}%", flush=True)
    rows.sort(key=lambda row: (options.methods.index(row["method"]), row["lr"]))
    best = {method: best_rate(rows, method) for method in options.methods}
    print("best:", ", ".join(f"{method} {rate:g}" for method, rate in best.items()))
    if options.out:
        record(options.out, "learning_rates", rows, best=best, images=options.images, epochs=options.epochs)


def cell(method: str, rate: float, options: argparse.Namespace) -> Cell:
    """The training run of one method at one rate, and its evaluation on the validation split."""
    shared = {"model": "nano", "data": f"phantom-b:{options.images}/{options.validate}/0", "device": "cpu"}
    tune = PRESETS_OF.get(method, method)
    train = {**shared, "tune": tune, "lr": rate, "epochs": options.epochs}
    return single_cell(f"{method}@{rate!r}", train, {**shared, "split": "validate"})


def best_rate(rows: list[dict[str, Any]], method: str) -> float:
    """The rate with the highest accuracy; the lower one of two equally good rates."""
    method_rows = [row for row in rows if row["method"] == method]
    best = max(method_rows, key=lambda row: (row["accuracy"], -row["lr"]))
    rate: float = best["lr"]
    return rate


if __name__ == "__main__":
    main()
