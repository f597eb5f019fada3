"""The main job on the embedded default: hospital A's nano base, adapted to hospital B by every recipe.

Questions are answered with every recipe, and reports written with a few.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from normtune.evaluation.config import EvaluateConfig
from normtune.runtime.files import write_json, write_text
from normtune.studies.demo_cells import Cell, run_cells
from normtune.training.config import TrainConfig


@dataclass(frozen=True)
class Job:
    """One table: what is trained, and what is shown of it.

    Attributes:
        columns: heading, the beginning of a metric's name, and what the metric is multiplied by.
    """

    task: Literal["vqa", "report"]
    recipes: tuple[str, ...]
    columns: tuple[tuple[str, str, float], ...]
    epochs: float
    batch: int
    test_images: int
    max_new_tokens: int | None = None

    def cell_name(self, recipe: str) -> str:
        return recipe if self.task == "vqa" else f"report-{recipe}"


QUESTIONS = Job(
    task="vqa",
    recipes=(
        "frozen",
        "ln",
        "ln-vision",
        "ln-encoder+decoder",
        "attention",
        "ffn",
        "full",
        "lora-4",
        "lora-8",
        "prefix",
        "ia3",
    ),
    columns=(
        ("closed %", "closed_label", 100),
        ("open %", "open_exact", 100),
        ("global %", "global_exact", 100),
    ),
    epochs=4,
    batch=24,
    test_images=120,
)
REPORTS = Job(
    task="report",
    recipes=("frozen", "ln", "full"),
    columns=(
        ("BLEU-1", "bleu_1/none", 100),
        ("BLEU-4", "bleu_4/none", 100),
        ("ROUGE-L", "rouge_l/none", 100),
        ("METEOR", "meteor_", 100),  # with WordNet or without, as it is there
        ("CIDEr-D", "cider_d/none", 1),
        ("findings F1", "findings_rules_f1_micro_14", 100),
    ),
    epochs=6,
    batch=4,  # one report an image: small steps, or there would be few of them
    test_images=60,
    max_new_tokens=64,  # hospital B's reports are shorter
)


def run_demo(
    out: Path,
    *,
    images: int = 160,
    epochs: float = QUESTIONS.epochs,
    report_epochs: float = REPORTS.epochs,
    seed: int = 0,
    quiet: bool = False,
) -> tuple[dict[str, Any], str]:
    """Train and evaluate every recipe; write results.json, table.md, reports.md and accuracy.png under `out`.

    Returns the results and the text to print: the tables, and where the files lie.
    """
    passes = {QUESTIONS: epochs, REPORTS: report_epochs}
    cells = [_cell(job, recipe, out, images, passes[job], seed) for job in passes for recipe in job.recipes]
    cells.reverse()  # the short ones last: no process works long after the other has ended
    rows = {}
    for row in _shown(run_cells(cells, workers=min(2, os.cpu_count() or 1)), len(cells), quiet):
        rows[row["name"]] = row
    answered, written = ([rows[job.cell_name(recipe)] for recipe in job.recipes] for job in passes)
    base = "base 'nano' (hospital A) adapted to hospital B with"
    results = {
        "task": f"{base} {images} images, {epochs:g} passes over their questions",
        "report_task": f"{base} the reports of {images} images, {report_epochs:g} passes",
        "note": "synthetic phantoms; seconds and peak memory with two cells side by side, one thread each",
        "rows": answered,
        "reports": written,
    }
    tables = {"table.md": table_markdown(answered), "reports.md": table_markdown(written, REPORTS)}
    write_json(out / "results.json", results)
    for name, table in tables.items():
        write_text(out / name, table)
    from normtune.studies.demo_plot import accuracy_against_share

    accuracy_against_share(answered, out / "accuracy.png")
    places = "\n".join(f"  {out / name}" for name in ("results.json", *tables, "accuracy.png"))
    return results, (
        f"{results['task']}\n\n{tables['table.md']}\n{results['report_task']}\n\n{tables['reports.md']}\n"
        f"{results['note']}\nWritten:\n{places}"
    )


def _cell(job: Job, recipe: str, out: Path, images: int, epochs: float, seed: int) -> Cell:
    data = f"phantom-b:{images}/0/{job.test_images}"
    name = job.cell_name(recipe)
    adapter = out / "adapters" / name
    train = None
    if recipe != "frozen":
        train = TrainConfig(
            model="nano",
            data=data,
            task=job.task,
            tune=recipe,
            out=adapter,
            epochs=epochs,
            batch=job.batch,
            seed=seed,
            resume=False,
            device="cpu",
        )
    evaluate = EvaluateConfig(
        model="nano",
        data=data,
        task=job.task,
        adapter=adapter if train else None,
        out=out / "evaluations" / name,
        max_new_tokens=job.max_new_tokens,
        device="cpu",
    )
    return Cell(name, train, evaluate)


def _shown(rows: Any, total: int, quiet: bool) -> Any:
    """Pass rows on, with a bar that counts them on stderr."""
    if quiet:
        yield from rows
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(rows, description="recipes", total=total, console=Console(stderr=True))


def table_markdown(rows: list[dict[str, Any]], job: Job = QUESTIONS) -> str:
    """One row a recipe: trainable parameters and %, seconds, peak memory, scores with 95% intervals."""
    headings = " | ".join(heading for heading, _, _ in job.columns)
    lines = [f"| recipe | trainable | % | seconds | peak MB | {headings} |"]
    lines.append("|---|--:|--:|--:|--:|" + "--:|" * len(job.columns))
    for row in rows:
        training = row["training"]
        fixed = ("0", "0", "0", "–")
        if training:
            fixed = (
                f"{training['trainable']:,}",
                f"{100 * training['share']:.3f}",
                f"{training['seconds']:.0f}",
                f"{training['peak_memory_bytes'] / 2**20:.0f}",
            )
        metrics = row["evaluation"]["metrics"]
        scores = [_interval(_named(metrics, start), factor) for _, start, factor in job.columns]
        lines.append("| " + " | ".join((row["name"].removeprefix("report-"), *fixed, *scores)) + " |")
    return "\n".join(lines) + "\n"


def _named(metrics: dict[str, dict[str, float]], start: str) -> dict[str, float]:
    return next(metric for name, metric in metrics.items() if name.startswith(start))


def _interval(metric: dict[str, float], factor: float) -> str:
    digits = 1 if factor > 1 else 2
    value, low, high = (f"{factor * metric[end]:.{digits}f}" for end in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"
