"""Means over seeds, and paired tests of recipes, from the rows of a study."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from normtune.evaluation.compare import metric_rows, read_runs
from normtune.metrics.statistics import holm, mean_over_seeds
from normtune.metrics.sum_metrics import SumMetric, paired
from normtune.studies.spec import SEARCH, Study

Row = dict[str, Any]
Tables = Mapping[str, list[Row]]
TESTED = ("closed_label", "open_exact", "global_exact", "bleu_4/none", "rouge_l/none", "cider_d/none")
REFERENCES = (
    "ln",
    "full",
)  # the first that a grid has is what others are held against, where the file names none


def rate_words(rates: Mapping[str, float]) -> str:
    """`ln 0.03`, `full 0.0003, ln 0.03`."""
    return ", ".join(f"{method} {rate:g}" for method, rate in sorted(rates.items()))


def over_seeds(tables: Tables) -> list[Row]:
    """Mean, interval and range of each metric over the seeds of otherwise equal cells."""
    cells = {cell["key"]: cell for cell in tables["cells"]}
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in tables["metrics"]:
        cell = cells[row["key"]]
        for grid in cell["grids"]:
            if grid == SEARCH or row["role"] == "validate":
                continue
            group = (grid, *(cell[name] for name in ("model", "trained_on", "share", "recipe")))
            where = (rate_words(cell["rates"]), row["dataset"], row["role"], row["metric"])
            groups.setdefault((*group, *where), []).append(row)
    names = ("grid", "model", "trained_on", "share", "recipe", "rate", "dataset", "role", "metric")
    found = []
    for group, rows in groups.items():
        values = [row["value"] for row in rows]
        if len(values) > 1:
            interval = asdict(mean_over_seeds(values))
        else:
            interval = {end: rows[0][end] for end in ("value", "low", "high")}
        found.append(
            {
                **dict(zip(names, group, strict=True)),
                "seeds": len(values),
                "mean": interval["value"],
                "low": interval["low"],
                "high": interval["high"],
                "least": min(values),
                "most": max(values),
            }
        )
    return found


def paired_tests(study: Study, tables: Tables, out: Path) -> list[Row]:
    """Every recipe against one, on the same rows: the rows of all common seeds together, paired by image.

    Recipes that a grid tries at several learning rates are left out: which one should stand for them is a
    choice that the test split must not make.
    """
    cells = {cell["key"]: cell for cell in tables["cells"]}
    groups: dict[tuple[Any, ...], dict[str, dict[int | None, list[Path]]]] = {}
    frozen: dict[tuple[str, str, str], Path] = {}
    for row in tables["evaluations"]:
        cell = cells[row["key"]]
        for grid in cell["grids"]:
            if grid == SEARCH or row["role"] == "validate":
                continue
            if cell["trained_on"] is None:
                frozen[grid, cell["model"], row["dataset"]] = out / row["folder"]
                continue
            where = (grid, cell["model"], cell["trained_on"], cell["share"], row["dataset"], row["role"])
            runs = groups.setdefault(where, {}).setdefault(cell["recipe"], {})
            runs.setdefault(cell["seed"], []).append(out / row["folder"])
    read = _Read(study.compare.metrics or TESTED)
    found: list[Row] = []
    for where, recipes in groups.items():
        single = {
            recipe: {seed: folders[0] for seed, folders in runs.items()}
            for recipe, runs in recipes.items()
            if all(len(folders) == 1 for folders in runs.values())
        }
        against = study.compare.against or next((one for one in REFERENCES if one in single), None)
        if against not in single:
            continue
        if (base := frozen.get((where[0], where[1], where[4]))) is not None:
            single["frozen"] = dict.fromkeys(single[against], base)
        found += _tested(read, where, against, single)
    return found


def _tested(
    read: _Read, where: tuple[Any, ...], against: str, recipes: Mapping[str, Mapping[int | None, Path]]
) -> Iterator[Row]:
    """The tests of one grid, model and pair of data sets, corrected metric by metric."""
    names = ("grid", "model", "trained_on", "share", "dataset", "role")
    rows: list[Row] = []
    for recipe, runs in recipes.items():
        seeds = [seed for seed in runs if seed in recipes[against]]
        if recipe == against or not seeds:
            continue
        first, cluster = read.together([recipes[against][seed] for seed in seeds])
        second, _ = read.together([runs[seed] for seed in seeds])
        for metric in first:
            rows.append(
                {
                    **dict(zip(names, where, strict=True)),
                    "metric": metric,
                    "recipe": recipe,
                    "against": against,
                    "seeds": len(seeds),
                    **asdict(paired(first[metric], second[metric], cluster)),
                }
            )
    for metric in dict.fromkeys(row["metric"] for row in rows):
        own = [row for row in rows if row["metric"] == metric]
        corrected = holm({row["recipe"]: row["p"] for row in own})
        for row in own:
            row["p_holm"] = corrected[row["recipe"]]
    yield from rows


class _Read:
    """Evaluations row by row, each read once."""

    def __init__(self, metrics: Sequence[str]) -> None:
        self.metrics = metrics
        self._held: dict[Path, tuple[dict[str, SumMetric], dict[str, tuple[str, ...]]]] = {}

    def together(self, folders: Sequence[Path]) -> tuple[dict[str, SumMetric], dict[str, tuple[str, ...]]]:
        """The metrics of several seeds' rows as one, and each row's images: the clusters, of all seeds."""
        every = [self._one(folder) for folder in folders]
        summed = {}
        for metric in every[0][0]:
            rows = {
                f"{seed} {id}": values
                for seed, (metrics, _) in enumerate(every)
                for id, values in metrics[metric].rows.items()
            }
            summed[metric] = SumMetric(rows, every[0][0][metric].value)
        cluster = {
            f"{seed} {id}": images for seed, (_, held) in enumerate(every) for id, images in held.items()
        }
        return summed, cluster

    def _one(self, folder: Path) -> tuple[dict[str, SumMetric], dict[str, tuple[str, ...]]]:
        if folder not in self._held:
            (run,) = read_runs([folder])
            metrics = {name: one for name, one in metric_rows(run).items() if name in self.metrics}
            self._held[folder] = metrics, {example.id: example.images for example in run.examples}
        return self._held[folder]
