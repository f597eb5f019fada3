"""Does a tuned nano look at the image? SLAKE (English) and phantoms asked with blank, noise and other images.

    python benchmarks/reliance.py --slake DIR --out benchmarks/reliance.json

nano as it is, `ln` and `full`: 10 passes on SLAKE as `real_data` trains, 4 passes on 160 phantoms of hospital
B as the demo does. What replaces the images, and what "earned" means: `normtune.evaluation.image_reliance`. What lies under
--work, of the same options, is neither trained nor evaluated again.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from record import record

from normtune.evaluation.config import CONTROLS, EvaluateConfig
from normtune.evaluation.image_reliance import interval_text
from normtune.runtime.files import read_json
from normtune.studies.demo_cells import Cell, run_cells
from normtune.training.config import TrainConfig

RECIPES = ("frozen", "ln", "full")
METRIC = "global_exact"  # what the table shows; the record holds closed and open answers besides
KEPT = ("rows", "images", "split_hash", "reliance")  # of an evaluation: no question, answer or image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slake", type=Path, help="SLAKE's folder; without it phantoms alone")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", type=Path, help="where adapters and rows are kept; by default nowhere")
    parser.add_argument("--epochs", type=float, default=10, help="on SLAKE")
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
            cell(name, named, recipe, epochs, work)
            for name, (named, epochs) in data.items()
            for recipe in RECIPES
        ]
        rows = []
        for found in run_cells(cells, workers=options.workers, kept=options.work and work / "rows"):
            name, recipe = found["name"].split("/")
            row = {"dataset": name, "recipe": recipe, "trainable": trainable(work / name / recipe)}
            rows.append(row | {field: found["evaluation"][field] for field in KEPT})
            print(table(rows[-1:]), flush=True)
    rows.sort(key=lambda row: (list(data).index(row["dataset"]), RECIPES.index(row["recipe"])))
    print("\n" + table(rows))
    if options.out:
        epochs = {name: passes for name, (_, passes) in data.items()}
        record(options.out, "reliance", rows, epochs=epochs, phantoms=options.phantoms, model="nano")
        options.out.with_suffix(".md").write_text(table(rows), encoding="utf-8")


def cell(name: str, named: dict[str, Any], recipe: str, epochs: float, work: Path) -> Cell:
    """One recipe on one dataset, evaluated with the images and without."""
    adapter = work / name / recipe
    train = None
    if recipe != "frozen":
        train = TrainConfig(model="nano", tune=recipe, out=adapter, epochs=epochs, device="cpu", **named)
    evaluate = EvaluateConfig(
        model="nano",
        adapter=adapter if train else None,
        out=work / f"{name}-{recipe}",
        controls=",".join(CONTROLS),
        device="cpu",
        **named,
    )
    return Cell(f"{name}/{recipe}", None if train and trained(train) else train, evaluate)


def trained(config: TrainConfig) -> bool:
    """Whether an adapter of these options lies in its place."""
    if not (config.out / "adapter.json").is_file():
        return False
    held = read_json(config.out / "train_config.json")
    return all(held.get(name, value) == value for name, value in config.model_dump(mode="json").items())


def trainable(adapter: Path) -> dict[str, Any] | None:
    """How much of the model was trained, in values and as a share; None of the base itself."""
    if not adapter.is_dir():
        return None
    result = read_json(adapter / "train_result.json")
    return {name: result[name] for name in ("trainable", "share", "pairs", "steps")}


def table(rows: list[dict[str, Any]]) -> str:
    """One row for each image shown, as a Markdown table, with 95% intervals."""
    lines = [
        f"| dataset | recipe | image | `{METRIC}` | real - replaced | p (Holm) | earned by the image, % |",
        "|---|---|---|--:|--:|--:|--:|",
    ]
    for row in rows:
        found = {control: about["metrics"][METRIC] for control, about in row["reliance"].items()}
        head = [row["dataset"], row["recipe"]]
        real = interval_text(next(iter(found.values()))["real"])
        lines.append("| " + " | ".join([*head, "real", real, "", "", ""]) + " |")
        for control, one in found.items():
            cells = [
                interval_text(one["replaced"]),
                interval_text(one["difference"], sign="+"),
                f"{one['difference']['p_holm']:.4f}",
                interval_text(one["earned"]) if one["earned"] else "–",
            ]
            lines.append("| " + " | ".join([*head, control, *cells]) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
