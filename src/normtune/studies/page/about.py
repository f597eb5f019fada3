"""The page's sections on the study itself: what was run, where, on which data, with which methods."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from normtune.adapters.info import NOTICE
from normtune.metrics.statistics.comparisons import MIN_SEEDS
from normtune.runtime.files import read_json
from normtune.runtime.number_format import format_bytes, format_duration, join_names
from normtune.studies.page.results import Record, Results, counted, distinct_values
from normtune.studies.page.tables import Cell, Table, text_cells

MIN_IMAGES = 20  # below this, a warning
RECOMMENDED_SEEDS = 5


def warnings(study: Results) -> list[str]:
    """What is too small for firm conclusions: the images of a test split, or the seeds of a setting."""
    texts = [
        f"{dataset} has {counted(count, 'test image')}: with fewer than {MIN_IMAGES}, another sample of images "
        "may give a very different score."
        for dataset, count in study.images.items()
        if count < MIN_IMAGES
    ]
    seeds = {setting: min(arm.seeds for arm in study.arms(setting)) for setting in study.settings()}
    if few := [study.title(setting) for setting, count in seeds.items() if count < MIN_SEEDS]:
        texts.append(
            f"Fewer than {MIN_SEEDS} seeds: {join_names(few)}. A test there is about the trained models, not about "
            "their recipes."
        )
    elif seeds and min(seeds.values()) < RECOMMENDED_SEEDS:
        texts.append(
            f"Some recipes have {min(seeds.values())} seeds; {RECOMMENDED_SEEDS} or more are recommended: with fewer, "
            "only large differences between recipes can be shown."
        )
    return texts


FOLDED_FACTS = ("hardware", "versions", "commit", "bases")


def facts(study: Results) -> list[tuple[str, str]]:
    """What was run, as names and texts: cells, models, recipes, data, seeds, time, hardware and versions."""
    cells = study.cells
    counts = {state: sum(cell.get("status") == state for cell in cells) for state in ("done", "failed", "missing")}
    trained = [cell for cell in study.finished.values() if cell.get("trained_on") is not None]
    states = [f"{number} {state}" for state, number in counts.items() if number or state == "done"]
    dates = sorted(str(cell[end])[:10] for cell in cells for end in ("started", "finished") if cell.get(end))
    days = " to ".join(dict.fromkeys((dates[0], dates[-1]))) if dates else ""
    versions: dict[str, dict[str, None]] = {}  # package -> its versions over the cells
    for cell in cells:
        for name, version in (cell.get("versions") or {}).items():
            versions.setdefault(name, {})[str(version)] = None
    # each model with the first digits of its base's fingerprint
    bases = (f"{cell['model']} {cell['base_fingerprint'][:12]}" for cell in cells if cell.get("base_fingerprint"))
    seconds = sum(cell.get("train_seconds") or 0 for cell in trained)
    seeds = sorted({cell["seed"] for cell in trained if cell.get("seed") is not None})
    entries: list[tuple[str, str]] = [
        ("cells", f"{join_names(states)} (a cell is one training with its evaluations)"),
        ("models", join_names(distinct_values(cells, "model"))),
        ("recipes", join_names([f"`{name}`" for name in distinct_values(cells, "recipe")])),
        ("trained on", join_names(distinct_values(cells, "trained_on"))),
        ("evaluated on", join_names(distinct_values(study.tables["evaluations"], "dataset"))),
        ("seeds", join_names([str(seed) for seed in seeds])),
        ("training time", f"{format_duration(seconds)} in all"),
        ("date", days),
        ("hardware", "; ".join(_format_machines(cells))),
        ("versions", ", ".join(f"{name} {join_names(list(numbers))}" for name, numbers in versions.items())),
        (  # a commit with uncommitted changes ends with +
            "commit",
            join_names([commit[:12] + "+" * commit.endswith("+") for commit in distinct_values(cells, "commit")]),
        ),
        ("bases", join_names(list(dict.fromkeys(bases)))),
    ]
    return [(name, text) for name, text in entries if text not in ("", "none")]


def _format_machines(cells: Iterable[Record]) -> list[str]:
    """The hardware of each different machine as text."""
    machines: dict[str, None] = {}
    for cell in cells:
        value = cell.get("hardware")
        if isinstance(value, Mapping):
            parts = [
                format_bytes(float(field)) + " " + name.replace("_bytes", "").replace("_", " ")
                if name.endswith("_bytes") and field
                else f"{field} {name.removesuffix('s') if field == 1 else name}"
                if isinstance(field, int) and not isinstance(field, bool)
                else str(field)
                for name, field in value.items()
                if field not in (None, "", [], False)
            ]
            machines[", ".join(parts)] = None
        elif value:
            machines[str(value)] = None
    return list(machines)


def datasets_table(study: Results, folder: Path) -> Table | None:
    """The data sets with their licences and test splits; None if there is no evaluation."""
    first_rows: dict[str, Record] = {}
    for row in study.tables["evaluations"]:
        if row["role"] != "validate":
            first_rows.setdefault(row["dataset"], row)
    rows = [
        [
            Cell(dataset),
            Cell(row["split"] if row.get("fold") is None else f"{row['split']} (fold {row['fold']})"),
            *text_cells([], [f"{row['rows']:,}", f"{row['images']:,}"]),
            *text_cells([licence(study, folder, dataset)]),
            Cell(str(row.get("split_hash") or "")[:12], "code"),
        ]
        for dataset, row in first_rows.items()
    ]
    header = [*text_cells(["data set", "split"], ["rows", "images"]), *text_cells(["licence", "rows' hash"])]
    return Table("data sets and licences", header, rows) if rows else None


def licence(study: Results, folder: Path, dataset: str) -> str:
    """The licence that an evaluation on the data set has recorded; `unknown` if there is none."""
    for row in study.tables["evaluations"]:
        path = folder / str(row.get("folder") or "") / "metrics.json"
        if row["dataset"] == dataset and row.get("folder") and path.is_file():
            return str(read_json(path).get("licence") or "unknown")
    return "unknown"


def notice() -> str:
    """The notice that results are for research only, as a sentence."""
    return f"{NOTICE[0].upper()}{NOTICE[1:]}."
