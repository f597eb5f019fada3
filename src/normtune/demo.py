"""The main job on the embedded default: hospital A's nano base, adapted to hospital B by every recipe."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from normtune.cells import Cell, run_cells
from normtune.config import EvaluateConfig, TrainConfig
from normtune.files import write_json, write_text

RECIPES = (
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
)
TEST_IMAGES = 120
COLUMNS = (("closed", "closed_label"), ("open", "open_exact"), ("global", "global_exact"))


def run_demo(
    out: Path, *, images: int = 160, epochs: float = 4, seed: int = 0, quiet: bool = False
) -> tuple[dict[str, Any], str]:
    """Train and evaluate every recipe; write results.json, table.md and accuracy.png under `out`.

    Returns the results and the text to print: the table, and where the files lie.
    """
    cells = [_cell(recipe, out, images, epochs, seed) for recipe in RECIPES]
    rows = {}
    for row in _shown(run_cells(cells, workers=min(2, os.cpu_count() or 1)), len(cells), quiet):
        rows[row["name"]] = row
    ordered = [rows[recipe] for recipe in RECIPES]
    results = {
        "task": f"base 'nano' (hospital A) adapted to hospital B with {images} images, {epochs:g} passes",
        "note": "synthetic phantoms; seconds and peak memory with two cells side by side, one thread each",
        "rows": ordered,
    }
    table = table_markdown(ordered)
    write_json(out / "results.json", results)
    write_text(out / "table.md", table)
    from normtune.report.plots import accuracy_against_share

    accuracy_against_share(ordered, out / "accuracy.png")
    places = "\n".join(f"  {out / name}" for name in ("results.json", "table.md", "accuracy.png"))
    return results, f"{results['task']}\n\n{table}\n{results['note']}\nWritten:\n{places}"


def _cell(recipe: str, out: Path, images: int, epochs: float, seed: int) -> Cell:
    data = f"phantom-b:{images}/0/{TEST_IMAGES}"
    adapter = out / "adapters" / recipe
    train = None
    if recipe != "frozen":
        train = TrainConfig(
            model="nano",
            data=data,
            tune=recipe,
            out=adapter,
            epochs=epochs,
            seed=seed,
            resume=False,
            device="cpu",
        )
    evaluate = EvaluateConfig(
        model="nano",
        data=data,
        adapter=adapter if train else None,
        out=out / "evaluations" / recipe,
        device="cpu",
    )
    return Cell(recipe, train, evaluate)


def _shown(rows: Any, total: int, quiet: bool) -> Any:
    """Pass rows on, with a bar that counts them on stderr."""
    if quiet:
        yield from rows
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(rows, description="recipes", total=total, console=Console(stderr=True))


def table_markdown(rows: list[dict[str, Any]]) -> str:
    """One row a recipe: trainable parameters and %, seconds, peak memory, accuracies with 95% intervals."""
    head = "| recipe | trainable | % | seconds | peak MB | " + " | ".join(f"{c} %" for c, _ in COLUMNS) + " |"
    lines = [head, "|---|--:|--:|--:|--:|" + "--:|" * len(COLUMNS)]
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
        scores = [_interval(row["evaluation"]["metrics"][metric]) for _, metric in COLUMNS]
        lines.append("| " + " | ".join((row["name"], *fixed, *scores)) + " |")
    return "\n".join(lines) + "\n"


def _interval(metric: dict[str, float]) -> str:
    return f"{100 * metric['value']:.1f} [{100 * metric['low']:.1f}, {100 * metric['high']:.1f}]"
