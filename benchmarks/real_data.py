"""Accuracy of nano tuned on SLAKE (English) and VQA-RAD (split by image), and of a question-only baseline.

    python benchmarks/real_data.py --slake DIR --vqa-rad DIR --out benchmarks/real_data.json

Every recipe sees the same pairs equally often, at the default learning rate of its method. The question-only
baseline answers with the most frequent training answer to the same question, or else to questions with the
same first two words. nano was trained on phantoms only: the figures describe the method at a very small model
size, not the state of the art.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from record import record

from normtune.data.registry import open_configured
from normtune.evaluation.baselines import QuestionOnly
from normtune.evaluation.config import EvaluateConfig
from normtune.metrics.answers import score_vqa
from normtune.runtime.number_format import format_interval
from normtune.runtime.text_table import markdown_table
from normtune.studies.plan import Cell, single_cell
from normtune.studies.run import run_cells

RECIPES = ("frozen", "ln", "lora-8", "full")
METRICS = ("closed_label", "closed_yes_no", "open_exact", "open_recall", "global_exact")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slake", type=Path, required=True)
    parser.add_argument("--vqa-rad", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--epochs", type=float, default=10)
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    data: dict[str, dict[str, Any]] = {
        "slake": {"data": "slake", "root": options.slake},
        "vqa-rad": {"data": "vqa-rad", "root": options.vqa_rad, "image_disjoint": True},
    }
    rows = [baseline_row(name, data_options) for name, data_options in data.items()]
    with tempfile.TemporaryDirectory() as folder:
        cells = [
            cell(name, data_options, recipe, options.epochs)
            for name, data_options in data.items()
            for recipe in options.recipes
        ]
        for result in run_cells(cells, Path(folder), workers=options.workers):
            name, recipe = result["name"].split("/")
            training = result["training"] and {k: v for k, v in result["training"].items() if k != "out"}
            row = {"dataset": name, "recipe": recipe, "training": training}
            rows.append(row | select_fields(result["evaluation"]))
            print(format_row(rows[-1]), flush=True)
    order = ["question-only", *options.recipes]
    rows.sort(key=lambda row: (list(data).index(row["dataset"]), order.index(row["recipe"])))
    print("\n" + table(rows))
    if options.out:
        record(options.out, "real_data", rows, epochs=options.epochs, model="nano")
        options.out.with_suffix(".md").write_text(table(rows), encoding="utf-8")


def baseline_row(name: str, data_options: dict[str, Any]) -> dict[str, Any]:
    """The row of the baseline that reads only the question."""
    dataset = open_configured(EvaluateConfig(model="nano", out=Path("unused"), **data_options))
    test = dataset.split("test")
    metrics = score_vqa(test, QuestionOnly.fit(dataset.split("train")).predict(test))
    row = {"dataset": name, "recipe": "question-only", "training": None, "rows": len(test)}
    row["metrics"] = {metric: asdict(metrics[metric]) for metric in METRICS}
    print(format_row(row), flush=True)
    return row


def cell(name: str, data_options: dict[str, Any], recipe: str, epochs: float) -> Cell:
    """The training run and the evaluation of one recipe on one dataset."""
    shared = {"model": "nano", "device": "cpu", **data_options}
    train = None if recipe == "frozen" else {**shared, "tune": recipe, "epochs": epochs}
    return single_cell(f"{name}/{recipe}", train, shared)


def select_fields(evaluation: dict[str, Any]) -> dict[str, Any]:
    """The fields of an evaluation for the record: no question, answer or image."""
    return {
        "rows": evaluation["rows"],
        "metrics": {metric: evaluation["metrics"][metric] for metric in METRICS},
        "split_hash": evaluation["split_hash"],
    }


def format_row(row: dict[str, Any]) -> str:
    """A row as one line of text."""
    return f"{row['dataset']:<8} {row['recipe']:<14} " + "  ".join(
        f"{metric} {100 * row['metrics'][metric]['value']:.1f}" for metric in METRICS
    )


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table of the rows, with 95% intervals."""
    lines = []
    for row in rows:
        training = row["training"]
        share = f"{100 * training['share']:.3f}" if training else "–"
        lines.append([row["dataset"], row["recipe"], share, *(format_interval(row["metrics"][m]) for m in METRICS)])
    header = ["dataset", "recipe", "trainable %", *(f"`{metric}`" for metric in METRICS)]
    return "\n".join(markdown_table(header, lines, "llr")) + "\n"


if __name__ == "__main__":
    main()
