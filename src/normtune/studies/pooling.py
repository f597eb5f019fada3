"""Pools the folds of a run: it is scored on all rows, each answered by the model that did not train on it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeVar

from normtune.data.records import Example
from normtune.evaluation.compare import compute_metrics, read_runs
from normtune.metrics.sum_metrics import SumMetric, average_metric
from normtune.metrics.table import metric_table, summarize_metrics

T = TypeVar("T")
Row = dict[str, Any]
Tables = Mapping[str, list[Row]]
EvaluationRows = tuple[dict[str, SumMetric], Sequence[Example]]  # metrics by name, and the evaluated examples
# The folders of the evaluations of one run, in a study's folder. The models of one layer answered different rows, each
# row once; two layers answered the same rows. Without folds, there is one layer with one folder.
# Example: the test rows of 3 folds are one layer, (("a/fold0", "a/fold1", "a/fold2"),); another data set, which each of
# the 3 models answers as a whole, has three layers: (("b/fold0",), ("b/fold1",), ("b/fold2",)).
Layers = tuple[tuple[str, ...], ...]
# Columns of `cells` that are the same in all folds of a run.
_RUN = ("grids", "model", "recipe", "recipe_text", "trained_on", "share", "seed", "rate_source", "rates", "budget")


def pool_folds(tables: Tables, out: Path) -> Tables:
    """The tables `cells`, `evaluations` and `metrics` with a row for each run, from tables with a row for each fold.

    A run with a fold that is not finished is left out: it would be scored on fewer rows than the other runs.

    Returns:
        The tables; `evaluations` has a column `layers`, see `Layers`.
    """
    evaluations = group_by(tables["evaluations"], itemgetter("key"))
    metrics = group_by(tables["metrics"], itemgetter("key", "dataset", "role"))
    pooled: dict[str, list[Row]] = {"cells": [], "evaluations": [], "metrics": []}
    for cells in group_runs(tables["cells"]):
        if any(cell["status"] != "done" for cell in cells):
            continue
        pooled["cells"].append(dict(cells[0]))
        run_rows = [row for cell in cells for row in evaluations.get(cell["key"], ())]
        for (dataset, role), rows in group_by(run_rows, itemgetter("dataset", "role")).items():
            # the test rows of the data set trained on differ from fold to fold
            layers = [rows] if role == "in" else group_by(rows, itemgetter("key")).values()
            row = rows[0] | {"layers": tuple(tuple(row["folder"] for row in layer) for layer in layers)}
            pooled["evaluations"].append(row)
            if len(rows) == 1:
                pooled["metrics"] += metrics.get((row["key"], dataset, role), ())
                continue
            table, examples = read_layers(out, row["layers"])
            shared = {name: row[name] for name in ("key", "dataset", "role", "split")}
            for name, metric in summarize_metrics(table, examples).items():
                pooled["metrics"].append({**shared, "metric": name, **asdict(metric)})
    return pooled


def group_runs(cells: Iterable[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """The rows of the table `cells` by run: the folds of a run together, any other cell alone."""
    return list(group_by(cells, lambda cell: json.dumps([cell.get(name) for name in _RUN])).values())


def group_by(rows: Iterable[T], key: Callable[[T], Any]) -> dict[Any, list[T]]:
    """The rows with the same key, in the order in which the keys first occur."""
    groups: dict[Any, list[T]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def fold_note(cells: Sequence[Mapping[str, Any]]) -> str | None:
    """How scores over folds are to be read, and how many runs are not in them; None for a study without folds."""
    runs = [run for run in group_runs(cells) if run[0].get("fold") is not None]
    if not runs:
        return None
    folds = "/".join(str(count) for count in sorted({len(run) for run in runs}))
    text = (
        f"Cross-validation with {folds} folds: a score is over the rows of all folds, each answered by the model of "
        "the fold that did not train on it; a fold is not a seed. Its interval is for new images like these, and with "
        "several seeds for new seeds, with this division into folds: the models of a run share most of their training "
        "rows, and how scores vary with other training rows is not in it."
    )
    unfinished = sum(any(cell["status"] != "done" for cell in run) for run in runs)
    return text + (f" {unfinished} of {len(runs)} runs miss a fold: they are in no score." if unfinished else "")


def read_layers(out: Path, layers: Layers) -> EvaluationRows:
    """The metrics of a run over all of its rows, and the rows' examples.

    A row that several models of the run answered has the mean of their statistics.
    """
    (table, examples), *others = (_read_layer(out, layer) for layer in layers)
    if not others:
        return table, examples
    return {name: average_metric([metric, *(other[name] for other, _ in others)]) for name, metric in table.items()}, (
        examples
    )


def _read_layer(out: Path, layer: Sequence[str]) -> EvaluationRows:
    """The metrics and examples of evaluations of different rows, as if they were one evaluation."""
    runs = [read_runs([out / folder])[0] for folder in layer]
    if len(runs) == 1:
        return compute_metrics(runs[0]), runs[0].examples
    examples = [example for run in runs for example in run.examples]
    texts = {id: text for run in runs for id, text in run.texts.items()}
    return metric_table(examples, texts, runs[0].record["normalisation"]), examples
