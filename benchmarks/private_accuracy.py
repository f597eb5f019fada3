"""What privacy costs in accuracy: norms, LoRA and full training of nano on a phantom at several epsilons.

    python benchmarks/private_accuracy.py --out FILE.json

Each image with three of its questions is a unit. Every recipe trains with two learning rates, its default and a third
of it; the better one at seed 0 is repeated with the other seeds. The choice of the rate is not part of epsilon here: it
is made with test rows of a public dataset. A stopped run continues after its last row, if --out is the same.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from record import write_record

import normtune
from normtune.data.examples import Examples
from normtune.data.groups import group_by_image
from normtune.data.records import Dataset
from normtune.methods.registry import LEARNING_RATES
from normtune.runtime.files import read_json
from normtune.runtime.text_table import markdown_table

RECIPES = {"ln": "ln", "lora-8": "lora", "full": "full"}  # recipe -> method of its default rate
EPSILONS = (1.0, 3.0, 8.0, math.inf)
ORDER = (3.0, math.inf, 1.0, 8.0)  # of the runs
QUESTIONS = 3  # of an image
OPTIONS: dict[str, Any] = {"batch": 60, "accumulate": 3, "dp_delta": 1e-4, "dp_clip": 0.1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=700, help="images of hospital B (default %(default)s)")
    parser.add_argument("--steps", type=int, default=8, help="steps of a run (default %(default)s)")
    parser.add_argument("--test", type=int, default=600, help="test questions (default %(default)s)")
    parser.add_argument("--seeds", type=int, default=2, help="seeds of the better rate (default %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file; the table is written next to it as .md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dataset, model = few_questions(options.images), normtune.load("nano", dtype="float32", device="cpu")
    rows: list[dict[str, Any]] = []
    if options.out and options.out.is_file():
        rows = read_json(options.out)["rows"]
    for run in runs(rows, options.seeds):
        rows.append(run | train_and_score(model, dataset, run, options))
        print(rows[-1], flush=True)
        if options.out:
            about = {"model": "nano", "data": f"phantom-b:{options.images}", "questions": QUESTIONS, **OPTIONS}
            write_record(options.out, "private_accuracy", rows, steps=options.steps, **about)
            options.out.with_suffix(".md").write_text(table(rows), encoding="utf-8")
    print("\n" + table(rows))


def few_questions(images: int) -> Dataset:
    """Hospital B with some questions of each training image."""
    dataset = normtune.open_dataset(f"phantom-b:{images}")
    rows = [example for group in group_by_image(dataset.train) for example in group[:QUESTIONS]]
    return replace(dataset, examples=Examples([*rows, *dataset.test]), options={})


def runs(rows: list[dict[str, Any]], seeds: int) -> Iterator[dict[str, Any]]:
    """The runs that have no row: the base, then both rates at seed 0, then the better rate with the other seeds."""

    def missing(**run: Any) -> Iterator[dict[str, Any]]:
        if not any(all(row[name] == value for name, value in run.items()) for row in rows):
            yield run

    yield from missing(recipe="base", epsilon=None, rate=None, seed=None)
    cells = [(recipe, str(epsilon)) for epsilon in ORDER for recipe in RECIPES]
    for recipe, epsilon in cells:
        for factor in (1, 3):
            rate = LEARNING_RATES[RECIPES[recipe]] / factor
            yield from missing(recipe=recipe, epsilon=epsilon, rate=rate, seed=0)
    for seed in range(1, seeds):
        for recipe, epsilon in cells:
            yield from missing(recipe=recipe, epsilon=epsilon, rate=better_rate(rows, recipe, epsilon), seed=seed)


def better_rate(rows: list[dict[str, Any]], recipe: str, epsilon: str) -> float:
    of_cell = [row for row in rows if (row["recipe"], row["epsilon"], row["seed"]) == (recipe, epsilon, 0)]
    return float(max(of_cell, key=lambda row: row["global_exact"])["rate"])


def train_and_score(model: Any, dataset: Dataset, run: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    evaluation = {"split": "test", "limit": options.test, "progress": False}
    with TemporaryDirectory() as folder:
        if run["recipe"] == "base":
            return {"global_exact": normtune.evaluate(model, dataset, **evaluation).metrics["global_exact"].value}
        trained = normtune.train(
            model, dataset, tune=run["recipe"], lr=run["rate"], seed=run["seed"], dp_epsilon=float(run["epsilon"]),
            max_steps=options.steps, out=Path(folder) / "out", progress=False, **OPTIONS,
        )  # fmt: skip
        assert trained.privacy is not None
        privacy = {name: trained.privacy[name] for name in ("noise_multiplier", "sampling_rate", "units")}
        result = normtune.evaluate(model, dataset, adapter=trained.out, **evaluation).metrics["global_exact"]
    return {"global_exact": result.value, "low": result.low, "high": result.high, "pairs": trained.pairs, **privacy}


def table(rows: list[dict[str, Any]]) -> str:
    """Accuracy at the better rate: the mean over seeds, and that of each seed."""
    lines = []
    for recipe in RECIPES:
        line = [recipe]
        for epsilon in map(str, EPSILONS):
            of_cell = [row for row in rows if (row["recipe"], row["epsilon"]) == (recipe, epsilon)]
            if not of_cell:
                line.append("–")
                continue
            rate = better_rate(rows, recipe, epsilon)
            values = [100 * row["global_exact"] for row in of_cell if row["rate"] == rate]
            line.append(f"{statistics.mean(values):.1f} ({', '.join(f'{value:.1f}' for value in values)})")
        lines.append(line)
    base = [100 * row["global_exact"] for row in rows if row["recipe"] == "base"]
    header = ["recipe", *(f"epsilon {epsilon:g}" for epsilon in EPSILONS)]
    note = f"\nglobal exact in %, mean (each seed); the base without training: {base[0]:.1f}\n" if base else ""
    return "\n".join(markdown_table(header, lines, "lrrrr")) + "\n" + note


if __name__ == "__main__":
    main()
