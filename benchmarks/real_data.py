"""Real questions: nano tuned on SLAKE (English) and VQA-RAD (split by image), and a question-only baseline.

    python benchmarks/real_data.py --slake DIR --vqa-rad DIR --out benchmarks/real_data.json

Every recipe sees the same pairs as often, at its method's default learning rate. The question-only baseline
answers with the commonest training answer to that question, else to its first two words. nano was trained on
phantoms alone: these are figures of the method at a very small size, not of the state of the art.
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
from normtune.studies.demo_cells import Cell, run_cells
from normtune.training.config import TrainConfig

RECIPES = ("frozen", "ln", "lora-8", "full")
SHOWN = ("closed_label", "closed_yes_no", "open_exact", "open_recall", "global_exact")


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
    rows = [baseline(name, named) for name, named in data.items()]
    with tempfile.TemporaryDirectory() as folder:
        cells = [
            cell(name, named, recipe, options.epochs, Path(folder))
            for name, named in data.items()
            for recipe in options.recipes
        ]
        for found in run_cells(cells, workers=options.workers):
            name, recipe = found["name"].split("/")
            training = found["training"] and {k: v for k, v in found["training"].items() if k != "out"}
            row = {"dataset": name, "recipe": recipe, "training": training}
            rows.append(row | scores(found["evaluation"]))
            print(line(rows[-1]), flush=True)
    order = ["question-only", *options.recipes]
    rows.sort(key=lambda row: (list(data).index(row["dataset"]), order.index(row["recipe"])))
    print("\n" + table(rows))
    if options.out:
        record(options.out, "real_data", rows, epochs=options.epochs, model="nano")
        options.out.with_suffix(".md").write_text(table(rows), encoding="utf-8")


def baseline(name: str, named: dict[str, Any]) -> dict[str, Any]:
    """The answers that the questions alone give."""
    dataset = open_configured(EvaluateConfig(model="nano", out=Path("unused"), **named))
    test = dataset.split("test")
    found = score_vqa(test, QuestionOnly.fit(dataset.split("train")).predict(test))
    row = {"dataset": name, "recipe": "question-only", "training": None, "rows": len(test)}
    row["metrics"] = {metric: asdict(found[metric]) for metric in SHOWN}
    print(line(row), flush=True)
    return row


def cell(name: str, named: dict[str, Any], recipe: str, epochs: float, folder: Path) -> Cell:
    """One recipe on one dataset."""
    adapter = folder / name / recipe
    train = None
    if recipe != "frozen":
        train = TrainConfig(
            model="nano", tune=recipe, out=adapter, epochs=epochs, resume=False, device="cpu", **named
        )
    scored = folder / f"{name}-{recipe}"
    evaluate = EvaluateConfig(
        model="nano", adapter=adapter if train else None, out=scored, device="cpu", **named
    )
    return Cell(f"{name}/{recipe}", train, evaluate)


def scores(evaluation: dict[str, Any]) -> dict[str, Any]:
    """What is kept of an evaluation: no question, answer or image."""
    return {
        "rows": evaluation["rows"],
        "metrics": {metric: evaluation["metrics"][metric] for metric in SHOWN},
        "split_hash": evaluation["split_hash"],
    }


def line(row: dict[str, Any]) -> str:
    """One row in words."""
    return f"{row['dataset']:<8} {row['recipe']:<14} " + "  ".join(
        f"{metric} {100 * row['metrics'][metric]['value']:.1f}" for metric in SHOWN
    )


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table, with 95% intervals."""
    named = " | ".join(f"`{metric}`" for metric in SHOWN)
    lines = [
        f"| dataset | recipe | trainable % | {named} |",
        "|---|---|--:|" + "--:|" * len(SHOWN),
    ]
    for row in rows:
        training = row["training"]
        share = f"{100 * training['share']:.3f}" if training else "–"
        cells = [
            f"{100 * one['value']:.1f} [{100 * one['low']:.1f}, {100 * one['high']:.1f}]"
            for one in (row["metrics"][metric] for metric in SHOWN)
        ]
        lines.append("| " + " | ".join((row["dataset"], row["recipe"], share, *cells)) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
