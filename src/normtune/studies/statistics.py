"""Statistics over a study's rows: means over seeds, and paired tests between recipes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from normtune.evaluation.compare import compute_metrics, read_runs
from normtune.metrics.statistics import holm_correction, mean_over_seeds
from normtune.metrics.sum_metrics import SumMetric, paired_difference
from normtune.studies.spec import SEARCH, Study

Row = dict[str, Any]
Tables = Mapping[str, list[Row]]
EvaluationRows = tuple[dict[str, SumMetric], dict[str, tuple[str, ...]]]  # metrics by name, images by row id
# The metrics that are tested if the study's file lists none.
TESTED = ("closed_label", "open_exact", "global_exact", "bleu_4/none", "rouge_l/none", "cider_d/none")
# The reference recipe if the study's file names none: the first of these that a grid has.
REFERENCES = ("ln", "full")


def format_rates(rates: Mapping[str, float]) -> str:
    """Learning rates as text: `ln 0.03`, or `full 0.0003, ln 0.03` for several methods."""
    return ", ".join(f"{method} {rate:g}" for method, rate in sorted(rates.items()))


def aggregate_seeds(tables: Tables) -> list[Row]:
    """Mean, 95% interval and range of each metric over cells that differ only in their seed.

    The interval is Student's t; with one seed it is that run's own interval.
    """
    cells = {cell["key"]: cell for cell in tables["cells"]}
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in tables["metrics"]:
        cell = cells[row["key"]]
        for grid in cell["grids"]:
            if grid == SEARCH or row["role"] == "validate":
                continue
            group = (grid, *(cell[name] for name in ("model", "trained_on", "share", "recipe")))
            measured = (format_rates(cell["rates"]), row["dataset"], row["role"], row["metric"])
            groups.setdefault((*group, *measured), []).append(row)
    names = ("grid", "model", "trained_on", "share", "recipe", "rate", "dataset", "role", "metric")
    aggregated = []
    for group, rows in groups.items():
        values = [row["value"] for row in rows]
        if len(values) > 1:
            interval = asdict(mean_over_seeds(values))
        else:
            interval = {end: rows[0][end] for end in ("value", "low", "high")}
        aggregated.append(
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
    return aggregated


def paired_tests(study: Study, tables: Tables, out: Path) -> list[Row]:
    """Test every recipe against the reference recipe of its grid, on the same rows, paired by image.

    The rows of all seeds that both recipes have are tested together. A recipe that a grid tries at several
    learning rates is left out: one of its rates would have to be selected, and the test split must not be
    used for that.

    Returns:
        The rows of the table `tests`; p-values are corrected over the recipes of a group (Holm).
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
            group = (grid, cell["model"], cell["trained_on"], cell["share"], row["dataset"], row["role"])
            runs = groups.setdefault(group, {}).setdefault(cell["recipe"], {})
            runs.setdefault(cell["seed"], []).append(out / row["folder"])
    reader = _EvaluationReader(study.compare.metrics or TESTED)
    tests: list[Row] = []
    for group, recipes in groups.items():
        # the folder of each seed, for recipes that are tried at a single rate
        single_rate = {
            recipe: {seed: rate_folders[0] for seed, rate_folders in runs.items()}
            for recipe, runs in recipes.items()
            if all(len(rate_folders) == 1 for rate_folders in runs.values())
        }
        against = study.compare.against or next((recipe for recipe in REFERENCES if recipe in single_rate), None)
        if against not in single_rate:
            continue
        if (base_folder := frozen.get((group[0], group[1], group[4]))) is not None:
            # the base has no seeds: its one evaluation is paired with each seed of the reference
            single_rate["frozen"] = dict.fromkeys(single_rate[against], base_folder)
        tests += _test_recipes(reader, group, against, single_rate)
    return tests


def _test_recipes(
    reader: _EvaluationReader, group: tuple[Any, ...], against: str, recipes: Mapping[str, Mapping[int | None, Path]]
) -> Iterator[Row]:
    """The tests within one grid, model and pair of data sets; p-values are corrected for each metric."""
    names = ("grid", "model", "trained_on", "share", "dataset", "role")
    rows: list[Row] = []
    for recipe, runs in recipes.items():
        seeds = [seed for seed in runs if seed in recipes[against]]
        if recipe == against or not seeds:
            continue
        reference_metrics, clusters = reader.read_seeds([recipes[against][seed] for seed in seeds])
        recipe_metrics, _ = reader.read_seeds([runs[seed] for seed in seeds])
        for metric in reference_metrics:
            rows.append(
                {
                    **dict(zip(names, group, strict=True)),
                    "metric": metric,
                    "recipe": recipe,
                    "against": against,
                    "seeds": len(seeds),
                    **asdict(paired_difference(reference_metrics[metric], recipe_metrics[metric], clusters)),
                }
            )
    for metric in dict.fromkeys(row["metric"] for row in rows):
        tests = [row for row in rows if row["metric"] == metric]
        corrected = holm_correction({row["recipe"]: row["p"] for row in tests})
        for row in tests:
            row["p_holm"] = corrected[row["recipe"]]
    yield from rows


class _EvaluationReader:
    """Reads evaluations row by row, each file once."""

    def __init__(self, metrics: Sequence[str]) -> None:
        self.metrics = metrics
        self._cache: dict[Path, EvaluationRows] = {}

    def read_seeds(self, run_folders: Sequence[Path]) -> EvaluationRows:
        """The rows of several seeds as one set of rows.

        Returns:
            Each metric with the rows of all seeds, and the images of each row. Tests resample by image, so an
            image's rows of all seeds are one cluster.
        """
        runs = [self._read_one(folder) for folder in run_folders]
        joined = {}
        for metric in runs[0][0]:
            rows = {  # a row id is unique within its seed only
                f"{seed} {id}": values
                for seed, (metrics, _) in enumerate(runs)
                for id, values in metrics[metric].row_statistics.items()
            }
            joined[metric] = SumMetric(rows, runs[0][0][metric].from_sums)
        clusters = {f"{seed} {id}": names for seed, (_, images) in enumerate(runs) for id, names in images.items()}
        return joined, clusters

    def _read_one(self, folder: Path) -> EvaluationRows:
        """The metrics of one evaluation, and the images of each of its rows."""
        if folder not in self._cache:
            (run,) = read_runs([folder])
            metrics = {name: metric for name, metric in compute_metrics(run).items() if name in self.metrics}
            self._cache[folder] = metrics, {example.id: example.images for example in run.examples}
        return self._cache[folder]
