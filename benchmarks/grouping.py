"""Does grouping harm learning? The same pairs in as many steps, grouped under several caps or at random.

    python benchmarks/grouping.py --slake DIR --work DIR --out benchmarks/grouping.json

A cap of 1 makes every question a group of its own, so that a batch is a random draw of pairs; larger caps put
questions of one image into one step. Everything else is the same: nano, the recipe, its learning rate, pairs,
steps, and the five seeds. (An arm such as 0x2 has twice the passes, for which grouping more than pays.)
Accuracy is the mean over seeds with Student's t interval; the difference from the random order is of each
question's mean score over the seeds, with an interval that resamples images. Runs are kept under --work: a
study that was stopped goes on.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from record import record

from normtune.evaluation.config import EvaluateConfig
from normtune.evaluation.results import read_run
from normtune.metrics.answers import scores
from normtune.metrics.statistics import holm, mean_over_seeds
from normtune.metrics.sum_metrics import mean_metric, paired
from normtune.runtime.files import read_json
from normtune.studies.demo_cells import Cell, run_cells
from normtune.training.config import TrainConfig

METRIC = "global_exact"
ALL = 0  # no cap: all questions of an image in one group
ARMS, SLAKE_ARMS = ("1", "2", "4", "8", "0"), ("1", "4", "0", "0x2")
RESULT = Path("adapter") / "train_result.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slake", type=Path, help="measure on SLAKE too")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="where the runs are kept")
    parser.add_argument("--recipes", nargs="+", default=["ln"])
    parser.add_argument(
        "--arms", nargs="+", default=ARMS, help="caps; 1 is the random order and comes first, 0 is no cap"
    )
    parser.add_argument("--slake-arms", nargs="+", default=SLAKE_ARMS, help="0x2: no cap, twice the passes")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--images", type=int, default=160, help="training images of the phantoms")
    parser.add_argument("--epochs", type=int, default=4, help="passes over the phantoms")
    parser.add_argument("--slake-epochs", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    phantoms = {"data": f"phantom-b:{options.images}/0/120", "device": "cpu"}
    studies = [Study("phantom-b", phantoms, options.epochs, arms(options.arms))]
    if options.slake:
        slake = {"data": "slake", "root": options.slake, "device": "cpu"}
        studies.append(Study("slake", slake, options.slake_epochs, arms(options.slake_arms)))
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
class Arm:
    """At most `cap` questions of an image together (0: all), and how many times the study's passes."""

    cap: int
    passes: int = 1

    @property
    def name(self) -> str:
        return str(self.cap) if self.passes == 1 else f"{self.cap}x{self.passes}"

    def __str__(self) -> str:
        how = {1: "random order", ALL: "all of an image"}.get(self.cap, f"at most {self.cap} of an image")
        return how if self.passes == 1 else f"{how}, {self.passes} times the passes"


def arms(words: Sequence[str]) -> list[Arm]:
    return [Arm(*(int(number) for number in word.split("x"))) for word in words]


@dataclass(frozen=True)
class Study:
    """One dataset (and the options that name it), its passes, and the arms; the first is the random order."""

    name: str
    options: dict[str, Any]
    epochs: int
    arms: Sequence[Arm]


def measured(study: Study, recipe: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row an arm: accuracy over the seeds, and the difference from the random order."""
    folder = options.work / f"{study.name}-{recipe}"
    where = {arm: [folder / f"{arm.name}-{seed}" for seed in range(options.seeds)] for arm in study.arms}
    missing = [
        cell(study, recipe, arm, seed, where[arm][seed])
        for seed in range(options.seeds)
        for arm in study.arms
        if not (where[arm][seed] / "scores" / "metrics.json").is_file()
    ]
    for found in run_cells(missing, workers=options.workers):
        value = found["evaluation"]["metrics"][METRIC]["value"]
        print(f"{study.name} {recipe} {found['name']}: {100 * value:.1f}%", flush=True)
    scored = {arm: question_scores(paths) for arm, paths in where.items()}
    first, *others = study.arms
    images = scored[first][1]
    against = {
        arm.name: paired(mean_metric(scored[first][0]), mean_metric(scored[arm][0]), images) for arm in others
    }
    corrected = holm({name: one.p for name, one in against.items()})
    rows = []
    taken = set()
    for arm, paths in where.items():
        runs = [read_json(path / RESULT) for path in paths]
        taken |= {(run["steps"] / arm.passes, run["pairs"] / arm.passes) for run in runs}
        accuracy = [read_json(path / "scores" / "metrics.json")["metrics"][METRIC]["value"] for path in paths]
        row = {"dataset": study.name, "recipe": recipe, "cap": arm.cap, "passes": arm.passes * study.epochs}
        row |= {"arm": str(arm), "steps": runs[0]["steps"], "pairs": runs[0]["pairs"]}
        row |= {"accuracy": asdict(mean_over_seeds(accuracy)), "by_seed": accuracy, "difference": None}
        if arm.name in against:
            row["difference"] = asdict(against[arm.name]) | {"p_holm": corrected[arm.name]}
        rows.append(row)
    assert len(taken) == 1, "as many pairs and steps a pass in every run"
    return rows


def cell(study: Study, recipe: str, arm: Arm, seed: int, path: Path) -> Cell:
    """One arm and seed, trained and evaluated on the test split."""
    train = TrainConfig(
        model="nano",
        tune=recipe,
        out=path / "adapter",
        epochs=study.epochs * arm.passes,
        cap=arm.cap or None,
        seed=seed,
        **study.options,
    )
    evaluate = EvaluateConfig(model="nano", adapter=train.out, out=path / "scores", **study.options)
    return Cell(f"{arm}, seed {seed}", train, evaluate)


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


def table(rows: list[dict[str, Any]]) -> str:
    """Accuracy and difference in %, with 95% intervals."""
    lines = [
        "| dataset | recipe | questions of an image together | accuracy % | less random order | p (Holm) |",
        "|---|---|---|--:|--:|--:|",
    ]
    for row in rows:
        value, low, high = (100 * row["accuracy"][end] for end in ("value", "low", "high"))
        cells = [row["dataset"], row["recipe"], row["arm"], f"{value:.1f} [{low:.1f}, {high:.1f}]"]
        if found := row["difference"]:
            value, low, high = (100 * found[end] for end in ("difference", "low", "high"))
            cells += [f"{value:+.1f} [{low:+.1f}, {high:+.1f}]", f"{found['p_holm']:.2f}"]
        else:
            cells += ["–", "–"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
