"""Short training runs that differ only in their seed: the scores that `statistics_checks` splits into groups.

    python benchmarks/statistics_runs.py --slake DIR --out benchmarks/statistics_runs.json

nano is tuned on the first 480 question-answer pairs of SLAKE (English) for three passes, with every recipe and every
seed, and answers the test split. The record has the number of right answers of each test image and no text.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from record import record

from normtune.evaluation.compare import compute_metrics
from normtune.evaluation.results import read_evaluation
from normtune.studies.plan import Cell, single_cell
from normtune.studies.run import run_cells

METRIC = "global_exact"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slake", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", type=Path, help="folder of the finished runs; default: a temporary folder")
    parser.add_argument("--recipes", nargs="+", default=["ln", "lora-8"])
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=480, help="training pairs")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--test-pairs", type=int, help="evaluate only this many pairs of the test split")
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cells = [cell(recipe, seed, options) for recipe in options.recipes for seed in range(options.seeds)]
        results = {}
        for result in run_cells(cells, options.work or Path(folder), workers=options.workers):
            results[result["name"]] = scores_by_image(Path(result["evaluation"]["out"]))
            counts = results[result["name"]]
            print(f"{result['name']}: {100 * sum(counts['right']) / sum(counts['questions']):.1f}%", flush=True)
    rows = [
        {"recipe": recipe, "seed": seed, "right": results[f"{recipe}@{seed}"]["right"]}
        for recipe in options.recipes
        for seed in range(options.seeds)
    ]
    if options.out:
        questions = next(iter(results.values()))["questions"]
        about = {"pairs": options.pairs, "epochs": options.epochs, "metric": METRIC, "questions": questions}
        record(options.out, "statistics_runs", rows, model="nano", data="slake", **about)


def cell(recipe: str, seed: int, options: argparse.Namespace) -> Cell:
    """The training run of one recipe with one seed, and its evaluation."""
    shared = {"model": "nano", "data": "slake", "root": options.slake, "device": "cpu"}
    train = {**shared, "tune": recipe, "seed": seed, "epochs": options.epochs, "limit": options.pairs}
    return single_cell(f"{recipe}@{seed}", train, {**shared, "limit": options.test_pairs})


def scores_by_image(folder: Path) -> dict[str, list[Any]]:
    """The number of questions and of right answers of each image, images in the order of the test split."""
    evaluation = read_evaluation(folder)
    scores = compute_metrics(evaluation)[METRIC].by_row()
    images = dict.fromkeys(example.images for example in evaluation.examples)
    right, questions = (dict.fromkeys(images, 0) for _ in range(2))
    for example in evaluation.examples:
        questions[example.images] += 1
        right[example.images] += int(scores[example.id])
    return {"questions": list(questions.values()), "right": list(right.values())}


if __name__ == "__main__":
    main()
