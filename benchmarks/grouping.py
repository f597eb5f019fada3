"""Does grouping harm learning? The same pairs in as many steps, grouped under several caps or at random.

    python benchmarks/grouping.py --slake DIR --out benchmarks/grouping.json

A cap of 1 makes every question a group of its own, so that a batch is a random draw of pairs; larger caps put
questions of one image into one step. Everything else is the same: nano, the recipe, its learning rate, pairs,
steps, and the five seeds. Accuracy is the mean over seeds with Student's t interval; the difference from the
random order is of each question's mean score over the seeds, with an interval that resamples images.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from record import record

from normtune.cells import Cell, run_cells
from normtune.config import EvaluateConfig, TrainConfig
from normtune.metrics.stats import holm, mean_over_seeds, paired_difference
from normtune.metrics.vqa import scores
from normtune.results import read_run

METRIC = "global_exact"
ALL = 0  # no cap: all questions of an image in one group
CAPS = (1, 2, 4, 8, ALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slake", type=Path, help="measure on SLAKE too")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--recipes", nargs="+", default=["ln"])
    parser.add_argument("--caps", type=int, nargs="+", default=CAPS, help="0: no cap; 1: random order")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--images", type=int, default=160, help="training images of the phantoms")
    parser.add_argument("--epochs", type=int, default=4, help="passes over the phantoms")
    parser.add_argument("--slake-epochs", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    data: dict[str, dict[str, Any]] = {
        "phantom-b": {"data": f"phantom-b:{options.images}/0/120", "epochs": options.epochs}
    }
    if options.slake:
        data["slake"] = {"data": "slake", "root": options.slake, "epochs": options.slake_epochs}
    rows = []
    for name, named in data.items():
        for recipe in options.recipes:
            with tempfile.TemporaryDirectory() as folder:
                rows += measured(name, named, recipe, options, Path(folder))
    print("\n" + table(rows))
    if options.out:
        passes = {name: named["epochs"] for name, named in data.items()}
        record(options.out, "grouping", rows, model="nano", epochs=passes, seeds=options.seeds, metric=METRIC)
        options.out.with_suffix(".md").write_text(table(rows), encoding="utf-8")


def measured(
    name: str, named: dict[str, Any], recipe: str, options: argparse.Namespace, folder: Path
) -> list[dict[str, Any]]:
    """One row a cap: accuracy over the seeds, and the difference from the random order."""
    where = {(cap, seed): folder / f"{cap}-{seed}" for seed in range(options.seeds) for cap in options.caps}
    cells = [cell(named, recipe, cap, seed, path) for (cap, seed), path in where.items()]
    accuracy: dict[int, list[float]] = defaultdict(list)
    steps: dict[int, set[tuple[int, int]]] = defaultdict(set)
    for found in run_cells(cells, workers=options.workers):
        cap, seed = (int(word) for word in found["name"].split("-"))
        accuracy[cap].append(found["evaluation"]["metrics"][METRIC]["value"])
        steps[cap].add((found["training"]["steps"], found["training"]["pairs"]))
        print(f"{name} {recipe} {shown(cap)}, seed {seed}: {100 * accuracy[cap][-1]:.1f}%", flush=True)
    assert len({one for found in steps.values() for one in found}) == 1, (
        "as many pairs and steps in every run"
    )
    each = {cap: question_scores([where[cap, seed] for seed in range(options.seeds)]) for cap in options.caps}
    first = options.caps[0]
    cluster = each[first][1]
    against = {cap: paired_difference(each[first][0], each[cap][0], cluster) for cap in options.caps[1:]}
    corrected = holm({str(cap): paired.p for cap, paired in against.items()})
    ((taken, pairs),) = steps[first]
    rows = []
    for cap in options.caps:
        row = {"dataset": name, "recipe": recipe, "cap": cap, "steps": taken, "pairs": pairs}
        row |= {
            "accuracy": asdict(mean_over_seeds(accuracy[cap])),
            "by_seed": accuracy[cap],
            "difference": None,
        }
        if cap in against:
            row["difference"] = asdict(against[cap]) | {"p_holm": corrected[str(cap)]}
        rows.append(row)
    return rows


def cell(named: dict[str, Any], recipe: str, cap: int, seed: int, path: Path) -> Cell:
    """One cap and seed, trained and evaluated on the test split."""
    given = {key: value for key, value in named.items() if key != "epochs"}
    train = TrainConfig(
        model="nano",
        tune=recipe,
        out=path / "adapter",
        epochs=named["epochs"],
        cap=cap or None,
        seed=seed,
        resume=False,
        device="cpu",
        **given,
    )
    evaluate = EvaluateConfig(model="nano", adapter=train.out, out=path / "scores", device="cpu", **given)
    return Cell(f"{cap}-{seed}", train, evaluate)


def question_scores(folders: Sequence[Path]) -> tuple[dict[str, float], dict[str, tuple[str, ...]]]:
    """Each question's mean score over runs, and its image."""
    total: dict[str, float] = defaultdict(float)
    cluster: dict[str, tuple[str, ...]] = {}
    for folder in folders:
        examples, texts, metrics = read_run(folder / "scores")
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
