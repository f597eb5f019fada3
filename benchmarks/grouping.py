"""Does grouping harm learning? The same pairs in as many steps, grouped under several caps or at random.

    python benchmarks/grouping.py --slake DIR --work DIR --out benchmarks/grouping.json

A cap of 1 makes every question a group of its own, so that a batch is a random draw of pairs; larger caps put
questions of one image into one step. Everything else is the same: nano, the recipe, its learning rate, pairs,
steps, and the five seeds. Accuracy is the mean over seeds with Student's t interval; the difference from the
random order is of each question's mean score over the seeds, with an interval that resamples images. Runs are
kept under --work: a study that was stopped goes on.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from record import record

from normtune.cells import Cell, run_cells
from normtune.config import EvaluateConfig, TrainConfig
from normtune.files import read_json
from normtune.metrics.stats import holm, mean_over_seeds, paired_difference
from normtune.metrics.vqa import scores
from normtune.results import read_run

METRIC = "global_exact"
ALL = 0  # no cap: all questions of an image in one group
CAPS = (1, 2, 4, 8, ALL)
RESULT = Path("adapter") / "train_result.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slake", type=Path, help="measure on SLAKE too")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="where the runs are kept")
    parser.add_argument("--recipes", nargs="+", default=["ln"])
    parser.add_argument("--caps", type=int, nargs="+", default=CAPS, help="0: no cap; 1: random order, first")
    parser.add_argument("--slake-caps", type=int, nargs="+", default=(1, 4, ALL))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--images", type=int, default=160, help="training images of the phantoms")
    parser.add_argument("--epochs", type=int, default=4, help="passes over the phantoms")
    parser.add_argument("--slake-epochs", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    phantoms = {"data": f"phantom-b:{options.images}/0/120", "device": "cpu"}
    studies = [Study("phantom-b", phantoms, options.epochs, options.caps)]
    if options.slake:
        slake = {"data": "slake", "root": options.slake, "device": "cpu"}
        studies.append(Study("slake", slake, options.slake_epochs, options.slake_caps))
    rows = []
    for study in studies:
        for recipe in options.recipes:
            rows += measured(study, recipe, options)
    print("\n" + table(rows))
    if options.out:
        passes = {study.name: study.epochs for study in studies}
        record(options.out, "grouping", rows, model="nano", epochs=passes, seeds=options.seeds, metric=METRIC)
        options.out.with_suffix(".md").write_text(table(rows), encoding="utf-8")


@dataclass(frozen=True)
class Study:
    """One dataset (and the options that name it), its passes, and the caps that are tried; the first is 1."""

    name: str
    options: dict[str, Any]
    epochs: int
    caps: Sequence[int]


def measured(study: Study, recipe: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a cap: accuracy over the seeds, and the difference from the random order."""
    folder = options.work / f"{study.name}-{recipe}"
    where = {(seed, cap): folder / f"{cap}-{seed}" for seed in range(options.seeds) for cap in study.caps}
    missing = [
        cell(study, recipe, cap, seed, path)
        for (seed, cap), path in where.items()
        if not (path / "scores" / "metrics.json").is_file()
    ]
    for found in run_cells(missing, workers=options.workers):
        value = found["evaluation"]["metrics"][METRIC]["value"]
        print(f"{study.name} {recipe} {found['name']}: {100 * value:.1f}%", flush=True)
    taken = {(one["steps"], one["pairs"]) for one in (read_json(p / RESULT) for p in where.values())}
    assert len(taken) == 1, "as many pairs and steps in every run"
    ((steps, pairs),) = taken
    each = {cap: [where[seed, cap] / "scores" for seed in range(options.seeds)] for cap in study.caps}
    scored = {cap: question_scores(folders) for cap, folders in each.items()}
    first = study.caps[0]
    against = {
        cap: paired_difference(scored[first][0], scored[cap][0], scored[cap][1]) for cap in study.caps[1:]
    }
    corrected = holm({str(cap): paired.p for cap, paired in against.items()})
    rows = []
    for cap, folders in each.items():
        accuracy = [read_json(folder / "metrics.json")["metrics"][METRIC]["value"] for folder in folders]
        row = {"dataset": study.name, "recipe": recipe, "cap": cap, "steps": steps, "pairs": pairs}
        row |= {"accuracy": asdict(mean_over_seeds(accuracy)), "by_seed": accuracy, "difference": None}
        if cap in against:
            row["difference"] = asdict(against[cap]) | {"p_holm": corrected[str(cap)]}
        rows.append(row)
    return rows


def cell(study: Study, recipe: str, cap: int, seed: int, path: Path) -> Cell:
    """One cap and seed, trained and evaluated on the test split."""
    train = TrainConfig(
        model="nano",
        tune=recipe,
        out=path / "adapter",
        epochs=study.epochs,
        cap=cap or None,
        seed=seed,
        **study.options,
    )
    evaluate = EvaluateConfig(model="nano", adapter=train.out, out=path / "scores", **study.options)
    return Cell(f"{shown(cap)}, seed {seed}", train, evaluate)


def question_scores(folders: Sequence[Path]) -> tuple[dict[str, float], dict[str, tuple[str, ...]]]:
    """Each question's mean score over runs, and its image."""
    total: dict[str, float] = defaultdict(float)
    cluster: dict[str, tuple[str, ...]] = {}
    for folder in folders:
        examples, texts, metrics = read_run(folder)
        cluster |= {example.id: example.images for example in examples}
        for id, score in scores(examples, texts, normalisation=metrics["normalisation"])[METRIC].items():
            total[id] += score / len(folders)
    return dict(total), cluster


def shown(cap: int) -> str:
    return {1: "random order", ALL: "all of an image"}.get(cap, f"at most {cap} of an image")


def table(rows: list[dict[str, Any]]) -> str:
    """Accuracy and difference in %, with 95% intervals."""
    lines = [
        "| dataset | recipe | questions of an image together | accuracy % | less random order | p (Holm) |",
        "|---|---|---|--:|--:|--:|",
    ]
    for row in rows:
        value, low, high = (100 * row["accuracy"][end] for end in ("value", "low", "high"))
        cells = [row["dataset"], row["recipe"], shown(row["cap"]), f"{value:.1f} [{low:.1f}, {high:.1f}]"]
        if found := row["difference"]:
            value, low, high = (100 * found[end] for end in ("difference", "low", "high"))
            cells += [f"{value:+.1f} [{low:+.1f}, {high:+.1f}]", f"{found['p_holm']:.2f}"]
        else:
            cells += ["–", "–"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
