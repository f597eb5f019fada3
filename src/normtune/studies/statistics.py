"""Statistics over a study's rows: means over seeds, and tests between recipes.

Both take the tables of `pool_folds`: the rows of all folds of a seed count as one run. docs/study.md describes the
columns of the tables `seeds` and `tests`. The interval of a mean is for new seeds and new images, inside 0 to 1
(CIDEr: 0 to 10) and never empty (`recipe_mean`); with one seed it is that run's own, for new images alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from normtune.evaluation.recipe_differences import Group, compare_metric, correct_p_values
from normtune.metrics.statistics.comparisons import recipe_mean
from normtune.metrics.statistics.intervals import Interval
from normtune.metrics.sum_metrics import score_span
from normtune.studies.pooling import EvaluationRows, Layers, Row, Tables, read_layers
from normtune.studies.recipe_names import FROZEN
from normtune.studies.spec import SEARCH, Study

# The metrics that are tested if the study's file lists none.
TESTED = (
    "choice_accuracy",
    "closed_label",
    "open_exact",
    "global_exact",
    "bleu_4/none",
    "rouge_l/none",
    "cider_d/none",
)
# The reference recipe if the study's file names none: the first of these that a grid has.
REFERENCES = ("ln", "full")


def format_rates(rates: Mapping[str, float]) -> str:
    """Learning rates as text: `ln 0.03`, or `full 0.0003, ln 0.03` for several methods."""
    return ", ".join(f"{method} {rate:g}" for method, rate in sorted(rates.items()))


def aggregate_seeds(tables: Tables) -> list[Row]:
    """Mean, 95% interval and range of each metric over cells that differ only in their seed."""
    cells = {cell["key"]: cell for cell in tables["cells"]}
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for grid, cell, row in _grid_rows(cells, tables["metrics"]):
        group = (grid, *(cell[name] for name in ("model", "trained_on", "share", "recipe")))
        measured = (format_rates(cell["rates"]), row["dataset"], row["role"], row["metric"])
        groups.setdefault((*group, *measured), []).append(row)
    names = ("grid", "model", "trained_on", "share", "recipe", "rate", "dataset", "role", "metric")
    aggregated = []
    for group, rows in groups.items():
        values = [row["value"] for row in rows]
        runs = [Interval(row["value"], row["low"], row["high"]) for row in rows]
        interval = recipe_mean(runs, rows[0]["images"], maximum=score_span(rows[0]["metric"]))
        aggregated.append(
            {
                **dict(zip(names, group, strict=True)),
                "seeds": len(values),
                "rows": rows[0]["rows"],
                "images": rows[0]["images"],
                "mean": interval.value,
                "low": interval.low,
                "high": interval.high,
                "least": min(values),
                "most": max(values),
            }
        )
    return aggregated


def _grid_rows(cells: Mapping[str, Row], rows: Sequence[Row]) -> Iterator[tuple[str, Row, Row]]:
    """(grid, cell, row) for every grid of the cell of a row, without the trials of learning rates."""
    for row in rows:
        for grid in cells[row["key"]]["grids"]:
            if grid != SEARCH and row["role"] != "validate":
                yield grid, cells[row["key"]], row


def paired_tests(study: Study, tables: Tables, out: Path) -> list[Row]:
    """Test every recipe against the reference recipe of its grid, on the same rows.

    A recipe that a grid tries at several learning rates is left out: one of its rates would have to be selected, and
    the test split must not be used for that.

    Returns:
        The rows of the table `tests`; p-values are corrected over the recipes of a group (Holm).
    """
    cells = {cell["key"]: cell for cell in tables["cells"]}
    groups: dict[tuple[Any, ...], dict[str, dict[int | None, list[Layers]]]] = {}
    frozen: dict[tuple[str, str, str], Layers] = {}
    for grid, cell, row in _grid_rows(cells, tables["evaluations"]):
        if cell["trained_on"] is None:
            frozen[grid, cell["model"], row["dataset"]] = row["layers"]
            continue
        group = (grid, cell["model"], cell["trained_on"], cell["share"], row["dataset"], row["role"])
        runs = groups.setdefault(group, {}).setdefault(cell["recipe"], {})
        runs.setdefault(cell["seed"], []).append(row["layers"])
    tested = study.compare.metrics or TESTED

    @cache
    def read_run(layers: Layers) -> EvaluationRows:
        """The tested metrics of a run, and its examples; a run is part of the tests of several grids."""
        table, examples = read_layers(out, layers)
        return {name: table[name] for name in table if name in tested}, examples

    tests: list[Row] = []
    for group, recipes in groups.items():
        # the evaluations of each seed, for recipes that are tried at a single rate
        single_rate = {
            recipe: {seed: runs_by_rate[0] for seed, runs_by_rate in runs.items()}
            for recipe, runs in recipes.items()
            if all(len(runs_by_rate) == 1 for runs_by_rate in runs.values())
        }
        against = study.compare.against or next((recipe for recipe in REFERENCES if recipe in single_rate), None)
        if against not in single_rate:
            continue
        if (base_layers := frozen.get((group[0], group[1], group[4]))) is not None:
            single_rate[FROZEN] = {None: base_layers}
        tests += _test_recipes(read_run, group, against, single_rate, study.compare.margin)
    return tests


def _test_recipes(
    read_run: Callable[[Layers], EvaluationRows],
    group: tuple[Any, ...],
    against: str,
    recipes: Mapping[str, Mapping[int | None, Layers]],
    margin: float | None,
) -> Iterator[Row]:
    """The tests within one grid, model and pair of data sets; p-values are corrected for each metric."""
    names = ("grid", "model", "trained_on", "share", "dataset", "role")
    groups = {
        recipe: Group([read_run(layers)[0] for layers in runs.values()], fixed=recipe == FROZEN)
        for recipe, runs in recipes.items()
    }
    reference, examples = groups.pop(against), read_run(next(iter(recipes[against].values())))[1]
    differences = {
        metric: correct_p_values(
            {
                recipe: compare_metric(metric, reference, seeds, examples, margin=margin)
                for recipe, seeds in groups.items()
                if all(metric in table for table in seeds.metrics)
            }
        )
        for metric in reference.metrics[0]
    }
    for recipe in groups:
        for metric in differences:
            if recipe in differences[metric]:
                about = {"metric": metric, "recipe": recipe, "against": against}
                yield {**dict(zip(names, group, strict=True)), **about, **asdict(differences[metric][recipe])}
