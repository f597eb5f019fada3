"""Tables of the scores by type of question, modality, organ, ...: from the files of a study's evaluations."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

from normtune.metrics.strata import STRATUM_FIELDS
from normtune.runtime.files import read_json
from normtune.runtime.number_format import NONE
from normtune.studies.page.figures import format_score
from normtune.studies.page.results import Record, Results, Setting, metric_name
from normtune.studies.page.tables import Cell, Table, text_cells

FIELDS = [field for field in STRATUM_FIELDS if field != "kind"]  # closed and open have metrics of their own


def strata_tables(results: Results, setting: Setting, folder: Path) -> Iterator[Table]:
    """A table for each data set and field, from the evaluations in `folder`: a row a value, a column a recipe."""
    arms = results.full_data_arms(setting)
    cells = [cell for cell in results.finished.values() if cell["model"] == setting.model]
    keys_of = {"frozen base": {cell["key"] for cell in cells if cell.get("trained_on") is None}}
    keys_of |= {arm.name: {cell["key"] for cell in arm.cells} for arm in arms}
    seeds = results.counts(None, arms)
    for dataset in results.datasets(setting, "in"):
        if results.has_folds(dataset):
            continue  # no file has the strata of all folds together
        metric = results.primary_metric(dataset)
        strata_of = {name: _read_strata(results, folder, keys, dataset) for name, keys in keys_of.items()}
        strata_of = {name: runs for name, runs in strata_of.items() if runs}
        for field in FIELDS:
            values: Record = next((run[field] for runs in strata_of.values() for run in runs if field in run), {})
            if not values:
                continue
            header = [*text_cells([field.replace("_", " ")], ["questions", "images"])]
            header += [Cell(name, "number code") for name in strata_of]
            rows = [
                [
                    *text_cells([value], [f"{stratum['rows']:,}", f"{stratum['images']:,}"]),
                    *(
                        _mean_cell(metric, [run[field][value]["metrics"][metric] for run in runs])
                        for runs in strata_of.values()
                    ),
                ]
                for value, stratum in values.items()
            ]
            caption = (
                f"{metric_name(metric)} on {dataset} by {field.replace('_', ' ')}: means over {seeds}; below, the mean "
                "ends of the runs' 95% intervals."
            )
            yield Table(f"{dataset} by {field}", header, rows, caption=caption)


def _read_strata(results: Results, folder: Path, keys: set[str], dataset: str) -> list[Record]:
    """The strata of each evaluation on a data set's test split of the cells with these keys."""
    paths = [
        folder / str(row.get("folder") or "") / "metrics.json"
        for row in results.tables["evaluations"]
        if row["key"] in keys and row["dataset"] == dataset and row["role"] != "validate"
    ]
    return [strata for path in paths if path.is_file() and (strata := read_json(path).get("strata"))]


def _mean_cell(metric: str, scores: list[Record]) -> Cell:
    """The mean of some runs' scores of a stratum, and of the ends of their intervals."""
    value, low, high = (
        fmean(score[end] for score in scores) if all(score[end] is not None for score in scores) else None
        for end in ("value", "low", "high")
    )
    ends = "" if low is None else f"{format_score(metric, low)} to {format_score(metric, high)}"
    return Cell(NONE if value is None else format_score(metric, value), "number", ends=ends)
