"""Reports of real images: nano tuned on MedPix 2.0 by every recipe, beside baselines that train nothing.

    python benchmarks/medpix.py --root DIR --work DIR --out benchmarks/medpix.json

The text to write is the caption that the reader gives. Learning rates and passes are chosen on the validation
split by ROUGE-L: every recipe is trained for two passes at three rates and for six at the best of them, and
the best of these four answers the test split, once. Cells that are done are kept under --work, and a run that
was stopped goes on. nano was trained on phantoms alone, has letters for most medical words, and 192 tokens of
room, so longer captions are cut: these are figures of the method at a very small size.
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
from normtune.data.splits import patients
from normtune.evaluation.config import EvaluateConfig
from normtune.metrics.reports import report_table, text_pairs
from normtune.metrics.statistics import RESAMPLES
from normtune.metrics.sum_metrics import intervals
from normtune.studies.demo_cells import Cell, run_cells
from normtune.training.config import TrainConfig

RATES = {
    "ln": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    "attention": (3e-4, 1e-3, 3e-3),
    "ffn": (3e-4, 1e-3, 3e-3),
    "full": (1e-4, 3e-4, 1e-3),
    "lora-8": (1e-3, 3e-3, 1e-2),
    "prefix": (1e-3, 3e-3, 1e-2),
}
SHORT, LONG = 2, 6  # passes over the training images
TOKENS = 190  # the longest report that nano can write
CHOSEN_BY = "rouge_l/none"
BASELINES = ("most-frequent", "medoid", "retrieval")
COLUMNS = (  # heading, the beginning of a metric's name, and what it is multiplied by
    ("BLEU-1", "bleu_1/none", 100),
    ("BLEU-4", "bleu_4/none", 100),
    ("ROUGE-L", "rouge_l/none", 100),
    ("METEOR", "meteor_", 100),
    ("CIDEr-D", "cider_d/none", 1),
    ("findings F1", "findings_rules_f1_micro_14", 100),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, required=True, help="the folder of MedPix")
    parser.add_argument("--work", type=Path, required=True, help="where finished cells are kept")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--recipes", nargs="+", default=list(RATES))
    parser.add_argument("--limit", type=int, help="train on the first so many images only")
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    trained = search(options)
    chosen = {recipe: max(trained[recipe], key=validated) for recipe in options.recipes}
    rows = test(chosen, options)
    print("\n" + table(rows))
    if options.out:
        tried = [tried_row(row) for recipe in options.recipes for row in trained[recipe]]
        record(
            options.out,
            "medpix",
            rows,
            model="nano",
            limit=options.limit,
            target="the report of each image as the medpix reader gives it: MedPix 2.0's caption",
            tokens=f"references and predictions end at {TOKENS + 1} tokens, greedy; nano spells most words",
            chosen=f"rate and passes by {CHOSEN_BY} on the validation split; the test split is answered once",
            intervals=f"95%, percentile bootstrap over cases, {RESAMPLES} resamples",
            search=tried,
        )
        options.out.with_suffix(".md").write_text(table(rows), encoding="utf-8")


def search(options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Every recipe's runs, each validated: SHORT passes at every rate, then LONG ones at the best rate."""
    found: dict[str, list[dict[str, Any]]] = {recipe: [] for recipe in options.recipes}

    def run(cells: Sequence[Cell]) -> None:
        for row in run_cells(cells, workers=options.workers, kept=options.work / "rows"):
            recipe, rate, passes = row["name"].split("@")
            found[recipe].append(row | {"lr": float(rate), "passes": int(passes)})
            print(
                f"{row['name']}: {CHOSEN_BY} {100 * validated(row):.2f} on the validation split", flush=True
            )

    run([training(recipe, rate, SHORT, options) for recipe in options.recipes for rate in RATES[recipe]])
    best = {recipe: max(found[recipe], key=validated)["lr"] for recipe in options.recipes}
    run([training(recipe, best[recipe], LONG, options) for recipe in options.recipes])
    return found


def validated(row: dict[str, Any]) -> float:
    """What a run is chosen by."""
    score: float = row["evaluation"]["metrics"][CHOSEN_BY]["value"]
    return score


def training(recipe: str, rate: float, passes: int, options: argparse.Namespace) -> Cell:
    """One run, validated."""
    name = f"{recipe}@{rate!r}@{passes}"
    adapter = options.work / "adapters" / name
    named = {"model": "nano", "data": "medpix", "root": options.root, "device": "cpu"}
    train = TrainConfig(tune=recipe, out=adapter, lr=rate, epochs=passes, limit=options.limit, **named)
    return Cell(name, train, evaluation(name, adapter, "validate", options))


def evaluation(name: str, adapter: Path | None, split: str, options: argparse.Namespace) -> EvaluateConfig:
    """An adapter, or the base, on one split."""
    return EvaluateConfig(
        model="nano",
        data="medpix",
        root=options.root,
        split=split,
        adapter=adapter,
        out=options.work / "evaluations" / split / name,
        max_new_tokens=TOKENS,
        batch=64,
        device="cpu",
    )


def test(chosen: dict[str, dict[str, Any]], options: argparse.Namespace) -> list[dict[str, Any]]:
    """The test split by the baselines, by the base and by each recipe's chosen run: no text, no image."""
    cells = []
    for name in BASELINES:
        config = evaluation(name, None, "test", options)
        cells.append(Cell(f"test@{name}", None, config.model_copy(update={"baseline": name})))
    cells.append(Cell("test@frozen", None, evaluation("frozen", None, "test", options)))
    for row in chosen.values():
        adapter = options.work / "adapters" / row["name"]
        cells.append(Cell(f"test@{row['name']}", None, evaluation(row["name"], adapter, "test", options)))
    done = {row["name"]: row for row in run_cells(cells, workers=options.workers, kept=options.work / "rows")}
    examples = open_configured(cells[0].evaluate).split("test")
    recipes = [*BASELINES, "frozen", *chosen]
    return [
        {
            "recipe": recipe,
            "training": training_row(chosen[recipe]) if recipe in chosen else None,
            "rows": len(examples),
            "split_hash": done[cell.name]["evaluation"]["split_hash"],
            "seconds_test": done[cell.name]["evaluation"]["seconds"],
            "metrics": by_case(examples, cell.evaluate.out),
        }
        for recipe, cell in zip(recipes, cells, strict=True)
    ]


def by_case(examples: Sequence[Example], folder: Path) -> dict[str, Any]:
    """Every metric of the predictions in `folder`, with intervals that resample cases."""
    lines = (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    texts = {row["id"]: row["prediction"] for row in map(json.loads, lines)}
    case = patients(examples)
    cluster = {example.id: case[example.images[0]] for example in examples}
    metrics = report_table(text_pairs(examples, texts))
    found = {name: asdict(interval) for name, interval in intervals(metrics, cluster).items()}
    return {name: {**one, "cases": len(set(cluster.values()))} for name, one in found.items()}


def training_row(row: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a run."""
    kept = {name: value for name, value in row["training"].items() if name != "out"}
    return {"lr": row["lr"], "passes": row["passes"], **kept}


def tried_row(row: dict[str, Any]) -> dict[str, Any]:
    """One run of the search, in short."""
    training = {name: row["training"][name] for name in ("recipe", "steps", "seconds", "final_loss")}
    score = row["evaluation"]["metrics"][CHOSEN_BY]
    return {"lr": row["lr"], "passes": row["passes"], **training, "validation": score}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table, with 95% intervals over cases."""
    named = " | ".join(heading for heading, _, _ in COLUMNS)
    lines = [
        f"| recipe | trainable | % | rate | passes | seconds | peak MB | {named} |",
        "|---|--:|--:|--:|--:|--:|--:|" + "--:|" * len(COLUMNS),
    ]
    for row in rows:
        training = row["training"]
        fixed = ("0", "0", "–", "–", "–", "–")
        if training:
            fixed = (
                f"{training['trainable']:,}",
                f"{100 * training['share']:.3f}",
                f"{training['lr']:g}",
                str(training["passes"]),
                f"{training['seconds']:.0f}",
                f"{training['peak_memory_bytes'] / 2**20:.0f}",
            )
        scores = [
            " ".join(
                (
                    f"{factor * one['value']:.{digits}f}",
                    f"[{factor * one['low']:.{digits}f}, {factor * one['high']:.{digits}f}]",
                )
            )
            for one, factor, digits in (shown(row["metrics"], start, factor) for _, start, factor in COLUMNS)
        ]
        lines.append("| " + " | ".join((row["recipe"], *fixed, *scores)) + " |")
    return "\n".join(lines) + "\n"


def shown(metrics: dict[str, Any], start: str, factor: float) -> tuple[dict[str, float], float, int]:
    """The metric whose name begins so, its factor and its digits."""
    return (
        next(one for name, one in metrics.items() if name.startswith(start)),
        factor,
        1 if factor > 1 else 2,
    )


if __name__ == "__main__":
    main()
