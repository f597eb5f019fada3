"""The demo: the embedded base `nano`, trained on hospital A, is adapted to hospital B with every recipe.

All recipes are trained to answer questions; a few are also trained to write reports. No download is needed.
"""

from __future__ import annotations

import os
import shutil
from contextlib import nullcontext
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any, Literal

from normtune.runtime.files import atomic_write, write_json, write_text
from normtune.runtime.number_format import format_interval
from normtune.runtime.text_table import markdown_table
from normtune.studies.console import ProgressBars
from normtune.studies.plan import Cell, single_cell
from normtune.studies.run import run_cells

PATIENCE = 3  # validations without a better score after which the training of a report recipe ends


@dataclass(frozen=True)
class DemoTask:
    """One task of the demo: what is trained for it, and the columns of its table."""

    task: Literal["vqa", "report"]
    recipes: tuple[str, ...]
    # heading, the beginning of a metric's name, and the factor that the metric is multiplied by
    columns: tuple[tuple[str, str, float], ...]
    epochs: float  # passes over the training examples; with `validation_images`, at most as many
    batch: int
    test_images: int  # the number of images that are evaluated
    validation_images: int = 0  # the number of images on which a training is validated; 0: it has a fixed length
    max_new_tokens: int | None = None

    def cell_name(self, recipe: str) -> str:
        """The name of a recipe's cell; it is unique over both tasks."""
        return recipe if self.task == "vqa" else f"report-{recipe}"


QUESTIONS = DemoTask(
    task="vqa",
    recipes=(
        *("frozen", "ln", "ln-vision", "ln-encoder+decoder", "attention", "ffn", "full"),
        *("lora-4", "lora-8", "prefix", "ia3"),
    ),
    columns=(("closed %", "closed_label", 100), ("open %", "open_exact", 100), ("global %", "global_exact", 100)),
    epochs=4,
    batch=24,
    test_images=120,
)
REPORTS = DemoTask(
    task="report",
    recipes=("frozen", "ln", "attention", "full", "lora-8"),
    columns=(
        ("BLEU-1", "bleu_1/none", 100),
        ("BLEU-4", "bleu_4/none", 100),
        ("ROUGE-L", "rouge_l/none", 100),
        ("METEOR (nltk)", "meteor_", 100),  # the variant with WordNet if it is installed, else without
        ("CIDEr-D", "cider_d/none", 1),
        ("findings F1", "findings_rules_f1_micro_14", 100),
    ),
    epochs=20,
    batch=4,  # an image has one report: with larger batches there would be few steps
    test_images=60,
    validation_images=40,
    max_new_tokens=64,  # longer than any report of hospital B
)


def run_demo(out: Path, *, images: int = 160, seed: int = 0, quiet: bool = False) -> tuple[dict[str, Any], str]:
    """Train and evaluate every recipe; write results.json, table.md, reports.md and accuracy.png to `out`.

    A recipe that is finished in `out`/cells is not trained again; `adapters` and `evaluations` have links by recipe.

    Args:
        images: the number of training images of hospital B.

    Returns:
        The results, and the text to print: both tables and the paths of the files.
    """
    tasks = (QUESTIONS, REPORTS)
    cells = [_make_cell(task, recipe, images, seed) for task in tasks for recipe in task.recipes]
    cells.reverse()  # short runs last, so that both processes finish at about the same time
    with nullcontext() if quiet else ProgressBars() as bars:
        rows = {row["name"]: row for row in run_cells(cells, out, workers=min(2, os.cpu_count() or 1), listener=bars)}
    for name, row in rows.items():
        _link(out / "evaluations" / name, row["evaluation"]["out"])
        if row["training"]:
            _link(out / "adapters" / name, row["training"]["out"])
    vqa_rows, report_rows = ([rows[task.cell_name(recipe)] for recipe in task.recipes] for task in tasks)
    base = "base 'nano' (hospital A) adapted to hospital B with"
    results = {
        "task": f"{base} {images} images, {QUESTIONS.epochs:g} passes over their questions",
        "report_task": f"{base} the reports of {images} images, until the validation score rises no more "
        f"(at most {REPORTS.epochs:g} passes)",
        "note": "synthetic phantoms; seconds and peak memory with two cells side by side, one thread each",
        "rows": vqa_rows,
        "reports": report_rows,
    }
    tables = {"table.md": table_markdown(vqa_rows), "reports.md": table_markdown(report_rows, REPORTS)}
    write_json(out / "results.json", results)
    for name, table in tables.items():
        write_text(out / name, table)
    plot_accuracy(vqa_rows, out / "accuracy.png")
    paths = "\n".join(f"  {out / name}" for name in ("results.json", *tables, "accuracy.png"))
    return results, (
        f"{results['task']}\n\n{tables['table.md']}\n{results['report_task']}\n\n{tables['reports.md']}\n"
        f"{results['note']}\nWritten:\n{paths}"
    )


def _make_cell(task: DemoTask, recipe: str, images: int, seed: int) -> Cell:
    """The cell that trains a recipe on hospital B and evaluates it there; `frozen` trains nothing."""
    data = f"phantom-b:{images}/{task.validation_images}/{task.test_images}"
    shared = {"model": "nano", "data": data, "task": task.task, "device": "cpu"}
    train = {**shared, "tune": recipe, "epochs": task.epochs, "batch": task.batch, "seed": seed}
    if task.validation_images:
        # every second pass: a validation takes about a quarter of a pass
        train |= {"validate_every": 2 * ceil(images / task.batch), "patience": PATIENCE}
    evaluate = {**shared, "max_new_tokens": task.max_new_tokens}
    return single_cell(task.cell_name(recipe), None if recipe == "frozen" else train, evaluate)


def _link(link: Path, target: str) -> None:
    """Link to a folder of a cell; a link or folder of an earlier run is replaced."""
    if link.is_dir() and not link.is_symlink():
        shutil.rmtree(link)
    link.unlink(missing_ok=True)
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(os.path.relpath(target, link.parent.absolute()))


def plot_accuracy(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot accuracy with its 95% interval against the trainable share, one point for each recipe, as PNG.

    The share has a log scale. The frozen base is a dashed line with its interval as a band.
    """
    from matplotlib.figure import Figure  # not pyplot, which would look for a display

    figure = Figure(figsize=(7.2, 4.4), dpi=150)
    axes = figure.subplots()
    trained = sorted((row for row in rows if row["training"]), key=lambda row: row["training"]["share"])
    # labels alternate above and below the points, so that neighbours do not overlap
    labelled_below = {row["name"] for row in trained[1::2]}
    for row in rows:
        score = row["evaluation"]["metrics"]["global_exact"]
        value, low, high = (100 * score[key] for key in ("value", "low", "high"))
        if row["training"] is None:
            axes.axhline(value, linestyle="--", color="0.45", label=row["name"])
            axes.axhspan(low, high, color="0.9", zorder=0)
            continue
        share = 100 * row["training"]["share"]
        axes.errorbar(share, value, yerr=[[value - low], [high - value]], fmt="o", capsize=3)
        offset = (5, -11) if row["name"] in labelled_below else (5, 5)
        axes.annotate(row["name"], (share, value), xytext=offset, textcoords="offset points", fontsize=8)
    axes.set_xscale("log")
    axes.set_xlabel("trained share of the model (%)")
    axes.set_ylabel("answers exactly right (%)")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.tight_layout()
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png")


def table_markdown(rows: list[dict[str, Any]], task: DemoTask = QUESTIONS) -> str:
    """One row for each recipe: trainable parameters and %, passes, seconds, memory, scores with intervals.

    The memory is the peak of the process, and the part of it above the loaded base. Seconds are of the training steps.
    """
    lines = []
    for row in rows:
        training = row["training"]
        costs = ("0", "0", "0", "0", "–", "–")
        if training:
            costs = (
                f"{training['trainable']:,}",
                f"{100 * training['share']:.3f}",
                f"{training['passes']:.0f}",
                f"{training['seconds']:.0f}",
                f"{training['peak_memory_bytes'] / 2**20:.0f}",
                f"{training['peak_above_base_bytes'] / 2**20:.0f}",
            )
        metrics = row["evaluation"]["metrics"]
        scores = [
            # the first metric with a name that begins as the column says
            format_interval(
                next(metric for name, metric in metrics.items() if name.startswith(start)),
                scale=factor,
                digits=1 if factor > 1 else 2,
            )
            for _, start, factor in task.columns
        ]
        lines.append([row["name"].removeprefix("report-"), *costs, *scores])
    costs_header = ["trainable", "%", "passes", "seconds", "peak MiB", "above base MiB"]
    header = ["recipe", *costs_header, *(heading for heading, _, _ in task.columns)]
    return "\n".join(markdown_table(header, lines)) + "\n"
