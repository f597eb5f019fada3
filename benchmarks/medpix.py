"""Reports of real images: nano tuned on MedPix 2.0 with every recipe, and baselines without training.

    python benchmarks/medpix.py --root DIR --work DIR --out benchmarks/medpix.json

The target text is the caption that the medpix reader returns. Learning rates and numbers of passes are chosen
on the validation split by ROUGE-L: each recipe is trained for two passes at three (ln: five) rates and for
six passes at the best of them, and the best of these runs answers the test split, once. Finished cells are
kept in --work, where an interrupted benchmark resumes. nano was trained on phantoms only, spells most medical
words letter by letter, and has positions for 192 tokens, so that longer captions are truncated: the figures
describe the method at a very small model size.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from record import record

from normtune.data.records import Example
from normtune.data.registry import open_configured
from normtune.metrics.reports import report_table, text_pairs
from normtune.metrics.sum_metrics import INTERVALS, cluster_rows, metric_intervals
from normtune.runtime.number_format import format_interval, join_names
from normtune.runtime.text_table import markdown_table
from normtune.studies.plan import Cell, single_cell
from normtune.studies.run import run_cells

RATES = {
    "ln": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    "attention": (3e-4, 1e-3, 3e-3),
    "ffn": (3e-4, 1e-3, 3e-3),
    "full": (1e-4, 3e-4, 1e-3),
    "lora-8": (1e-3, 3e-3, 1e-2),
    "prefix": (1e-3, 3e-3, 1e-2),
}
SHORT, LONG = 2, 6  # passes over the training images
TOKENS = 190  # of the longest report that nano can generate
SELECTION_METRIC = "rouge_l/none"
BASELINES = ("most-frequent", "medoid", "retrieval")
COLUMNS = (  # heading, the name of the metric, and the factor that it is multiplied by
    ("BLEU-1", "bleu_1/none", 100),
    ("BLEU-4", "bleu_4/none", 100),
    ("ROUGE-L", "rouge_l/none", 100),
    ("METEOR (exact, stem)", "meteor_exact_stem/none", 100),
    ("METEOR 1.5", "meteor15/none", 100),
    ("CIDEr-D", "cider_d/none", 1),
    ("findings F1", "findings_rules_f1_micro_14", 100),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, required=True, help="MedPix's folder")
    parser.add_argument("--work", type=Path, required=True, help="folder of the finished cells")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--recipes", nargs="+", default=list(RATES))
    parser.add_argument("--limit", type=int, help="train on the first LIMIT images only")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--meteor15", type=Path, help="path of meteor-1.5.jar, for METEOR 1.5; needs Java")
    options = parser.parse_args()
    runs = search(options)
    best_runs = {recipe: max(runs[recipe], key=validation_score) for recipe in options.recipes}
    rows = test_runs(best_runs, options)
    print("\n" + table(rows))
    if options.out:
        search_rows = [search_row(row) for recipe in options.recipes for row in runs[recipe]]
        record(
            options.out,
            "medpix",
            rows,
            model="nano",
            limit=options.limit,
            target="the report of each image as the medpix reader gives it: MedPix 2.0's caption",
            tokens=f"references and predictions end at {TOKENS + 1} tokens, greedy; nano spells most words",
            chosen=f"rate and passes by {SELECTION_METRIC} on the validation split; the test split is answered once",
            intervals=INTERVALS,
            search=search_rows,
        )
        options.out.with_suffix(".md").write_text(table(rows), encoding="utf-8")


def search(options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """The validated runs of each recipe: SHORT passes at every rate, then LONG ones at the best rate."""
    runs: dict[str, list[dict[str, Any]]] = {recipe: [] for recipe in options.recipes}

    def run(cells: Sequence[Cell]) -> None:
        for row in run_cells(cells, options.work, workers=options.workers):
            recipe, rate, passes = row["name"].split("@")
            runs[recipe].append(row | {"lr": float(rate), "passes": int(passes)})
            print(
                f"{row['name']}: {SELECTION_METRIC} {100 * validation_score(row):.2f} on the validation split",
                flush=True,
            )

    run([training_cell(recipe, rate, SHORT, options) for recipe in options.recipes for rate in RATES[recipe]])
    best = {recipe: max(runs[recipe], key=validation_score)["lr"] for recipe in options.recipes}
    run([training_cell(recipe, best[recipe], LONG, options) for recipe in options.recipes])
    return runs


def validation_score(row: dict[str, Any]) -> float:
    """The score by which the best run is selected."""
    score: float = row["evaluation"]["metrics"][SELECTION_METRIC]["value"]
    return score


def training_cell(recipe: str, rate: float, passes: int, options: argparse.Namespace, *splits: str) -> Cell:
    """One training run and its evaluation on the validation split, and on further splits."""
    train = {**shared_options(options), "tune": recipe, "lr": rate, "epochs": passes, "limit": options.limit}
    evaluations = [evaluate_options(options, split) for split in ("validate", *splits)]
    return single_cell(f"{recipe}@{rate!r}@{passes}", train, *evaluations)


def shared_options(options: argparse.Namespace) -> dict[str, Any]:
    """The options of every training and evaluation."""
    return {"model": "nano", "data": "medpix", "root": options.root, "device": "cpu"}


def evaluate_options(options: argparse.Namespace, split: str) -> dict[str, Any]:
    """The options of an evaluation on one split."""
    return {**shared_options(options), "split": split, "max_new_tokens": TOKENS, "batch": 64}


def test_runs(best_runs: dict[str, dict[str, Any]], options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each baseline, the base and each recipe's best run, on the test split."""
    test = evaluate_options(options, "test")
    cells = [single_cell(f"test@{name}", None, {**test, "baseline": name}) for name in BASELINES]
    cells.append(single_cell("test@frozen", None, test))
    # the cell of the search with one more evaluation: its adapter is not trained again
    cells += [training_cell(name, row["lr"], row["passes"], options, "test") for name, row in best_runs.items()]
    results = {row["name"]: row for row in run_cells(cells, options.work, workers=options.workers)}
    examples = open_configured(cells[0].evaluations[0].config).split("test")
    recipes = [*BASELINES, "frozen", *best_runs]
    return [
        {
            "recipe": recipe,
            "training": training_row(best_runs[recipe]) if recipe in best_runs else None,
            "rows": len(examples),
            "split_hash": results[cell.recipe]["evaluation"]["split_hash"],
            "seconds_test": results[cell.recipe]["evaluation"]["seconds"],
            "metrics": by_case(examples, Path(results[cell.recipe]["evaluation"]["out"]), options.meteor15),
        }
        for recipe, cell in zip(recipes, cells, strict=True)
    ]


def by_case(examples: Sequence[Example], folder: Path, meteor15: Path | None) -> dict[str, Any]:
    """Every metric of the predictions in `folder`, with intervals clustered by case."""
    lines = (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    texts = {row["id"]: row["prediction"] for row in map(json.loads, lines)}
    cluster = cluster_rows(examples)
    metrics = report_table(text_pairs(examples, texts), meteor15=meteor15)
    intervals = {name: asdict(interval) for name, interval in metric_intervals(metrics, cluster).items()}
    return {name: {**values, "cases": len(set(cluster.values()))} for name, values in intervals.items()}


def training_row(row: dict[str, Any]) -> dict[str, Any]:
    """The fields of a run for the record."""
    fields = {name: value for name, value in row["training"].items() if name != "out"}
    return {"lr": row["lr"], "passes": row["passes"], **fields}


def search_row(row: dict[str, Any]) -> dict[str, Any]:
    """The main fields of one run of the search."""
    training = {name: row["training"][name] for name in ("recipe", "steps", "seconds", "final_loss")}
    score = row["evaluation"]["metrics"][SELECTION_METRIC]
    return {"lr": row["lr"], "passes": row["passes"], **training, "validation": score}


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table of the rows, with 95% intervals over cases."""
    columns = [column for column in COLUMNS if all(column[1] in row["metrics"] for row in rows)]
    lines = []
    for row in rows:
        training = row["training"]
        training_cells = ("0", "0", "–", "–", "–", "–")
        if training:
            training_cells = (
                f"{training['trainable']:,}",
                f"{100 * training['share']:.3f}",
                f"{training['lr']:g}",
                f"{training['passes']:g}",
                f"{training['seconds']:.0f}",
                f"{training['peak_memory_bytes'] / 2**20:.0f}",
            )
        scores = [
            format_interval(row["metrics"][name], scale=factor, digits=1 if factor > 1 else 2)
            for _, name, factor in columns
        ]
        lines.append([row["recipe"], *training_cells, *scores])
    header = ["recipe", "trainable", "%", "rate", "passes", "seconds", "peak MB", *(column[0] for column in columns)]
    return "\n".join(markdown_table(header, lines)) + "\n"


def conclusion(rows: list[dict[str, Any]]) -> str:
    """Which recipes score above the base by ROUGE-L, and how far all of them are from use, in %."""

    def percent(recipe: str, metric: str) -> float:
        value: float = 100 * metrics[recipe][metric]["value"]
        return value

    metrics = {row["recipe"]: row["metrics"] for row in rows}
    recipes = [row["recipe"] for row in rows if row["training"]]
    better = [name for name in recipes if percent(name, SELECTION_METRIC) > percent("frozen", SELECTION_METRIC)]
    best = max(recipes, key=lambda name: percent(name, SELECTION_METRIC))
    findings = "findings_rules_f1_micro_14"
    fewer = [name for name in recipes if percent(name, findings) < percent("most-frequent", findings)]
    meteor = [f"{percent(best, metric):.1f}" for metric in ("meteor_exact_stem/none", "meteor15/none")]
    others = join_names([f"`{name}`" for name in recipes if name not in better])
    bleu = max(percent(name, "bleu_4/none") for name in recipes)
    return (
        f"By ROUGE-L, {join_names([f'`{name}`' for name in better])} score above the base without tuning "
        f"({percent('frozen', SELECTION_METRIC):.1f}), `{best}` highest ({percent(best, SELECTION_METRIC):.1f}), and "
        f"{others} below it. No recipe is clinically useful: BLEU-4 is at most {bleu:.1f}, and the most frequent text "
        f"has a findings F1 of {percent('most-frequent', findings):.1f}, above {len(fewer)} of {len(recipes)} recipes. "
        f"METEOR 1.5 of `{best}` is {meteor[1]} where `meteor_exact_stem` is {meteor[0]}."
    )


if __name__ == "__main__":
    main()
