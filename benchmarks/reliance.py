"""Does a tuned nano use the image? SLAKE (English) and phantoms with the real, blank, noise and other images.

    python benchmarks/reliance.py --slake DIR --out benchmarks/reliance.json

It evaluates the frozen nano, `ln` and `full`, trained for 10 passes on SLAKE and for 4 passes on 160 phantoms of
hospital B as in the demo. `normtune.evaluation.image_reliance` describes what replaces the images and defines "earned".
Runs in --work with the same options are not repeated.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from record import record

from normtune.evaluation.config import CONTROLS
from normtune.runtime.number_format import format_interval, format_percent
from normtune.runtime.text_table import markdown_table
from normtune.studies.plan import Cell, single_cell
from normtune.studies.run import run_cells

RECIPES = ("frozen", "ln", "full")
NAMES = {"slake": "SLAKE", "phantom-b": "the phantoms of hospital B"}
METRIC = "global_exact"  # the metric of the table; the record also has closed and open answers
FIELDS = ("rows", "images", "split_hash", "reliance")  # recorded: no question, answer or image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slake", type=Path, help="SLAKE's folder; without it only phantoms are used")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", type=Path, help="folder for adapters and rows (default: they are not kept)")
    parser.add_argument("--epochs", type=float, default=10, help="passes over SLAKE")
    parser.add_argument("--phantoms", default="phantom-b:160/0/120")
    parser.add_argument("--phantom-epochs", type=float, default=4)
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    data: dict[str, tuple[dict[str, Any], float]] = {}
    if options.slake:
        data["slake"] = {"data": "slake", "root": options.slake}, options.epochs
    data["phantom-b"] = {"data": options.phantoms}, options.phantom_epochs
    with tempfile.TemporaryDirectory() as folder:
        work = options.work or Path(folder)
        cells = [
            cell(name, data_options, recipe, epochs)
            for name, (data_options, epochs) in data.items()
            for recipe in RECIPES
        ]
        rows = []
        for result in run_cells(cells, work, workers=options.workers):
            name, recipe = result["name"].split("/")
            row = {"dataset": name, "recipe": recipe, "trainable": training_size(result["training"])}
            rows.append(row | {field: result["evaluation"][field] for field in FIELDS})
            print(table(rows[-1:]), flush=True)
    rows.sort(key=lambda row: (list(data).index(row["dataset"]), RECIPES.index(row["recipe"])))
    print("\n" + table(rows) + "\n" + conclusion(rows))
    if options.out:
        epochs = {name: data_epochs for name, (_, data_epochs) in data.items()}
        record(options.out, "reliance", rows, epochs=epochs, phantoms=options.phantoms, model="nano")
        options.out.with_suffix(".md").write_text(table(rows), encoding="utf-8")


def cell(name: str, data_args: dict[str, Any], recipe: str, epochs: float) -> Cell:
    """The training run of one recipe on one dataset, and its evaluation with and without the images."""
    shared = {"model": "nano", "device": "cpu", **data_args}
    train = None if recipe == "frozen" else {**shared, "tune": recipe, "epochs": epochs}
    return single_cell(f"{name}/{recipe}", train, {**shared, "controls": ",".join(CONTROLS)})


def training_size(training: dict[str, Any] | None) -> dict[str, Any] | None:
    """The number and share of trained values, with pairs and steps; None for the frozen base."""
    return training and {name: training[name] for name in ("trainable", "share", "pairs", "steps")}


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table with one row per kind of image, with 95% intervals."""
    lines = []
    for row in rows:
        metrics = {control: result["metrics"][METRIC] for control, result in row["reliance"].items()}
        first_cells = [row["dataset"], row["recipe"]]
        real = format_interval(next(iter(metrics.values()))["real"])
        lines.append([*first_cells, "real", real, "", "", ""])
        for control, metric in metrics.items():
            cells = [
                format_interval(metric["replaced"]),
                format_interval(metric["difference"], sign="+"),
                f"{metric['difference']['p_holm']:.4f}",
                format_interval(metric["earned"]) if metric["earned"] else "–",
            ]
            lines.append([*first_cells, control, *cells])
    header = ["dataset", "recipe", "image", f"`{METRIC}`", "real - replaced", "p (Holm)", "earned by the image, %"]
    return "\n".join(markdown_table(header, lines, "lllr")) + "\n"


def conclusion(rows: list[dict[str, Any]]) -> str:
    """What tuning adds, and how much of it needs the image, in points of the metric, for each dataset."""
    sentences = []
    for dataset in dict.fromkeys(row["dataset"] for row in rows):
        metrics = {
            row["recipe"]: row["reliance"]["blank"]["metrics"][METRIC] for row in rows if row["dataset"] == dataset
        }
        gains = {
            image: format_percent(metrics["full"][image]["value"] - metrics["frozen"][image]["value"], 0)
            for image in ("real", "replaced")
        }
        before, after = (format_percent(metrics[recipe]["difference"]["value"], 0) for recipe in ("frozen", "full"))
        sentences.append(
            f"On {NAMES[dataset]}, `full` gains {gains['real']} points over `frozen` with the image and "
            f"{gains['replaced']} with a blank one: the image's contribution grows from {before} to {after} points."
        )
    most = max(control["metrics"][METRIC]["earned"]["value"] for row in rows for control in row["reliance"].values())
    return " ".join(
        [*sentences, f"The largest share of a score that is lost without the image is {format_percent(most, 0)}%."]
    )


if __name__ == "__main__":
    main()
