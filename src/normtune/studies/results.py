"""A study's results as tables in `results.sqlite` and `results.json`; docs/study.md describes all columns.

The table `cells` has one row for each cell. What a cell has several of (evaluations, metrics, norms, losses, curves)
is in a table of its own, joined by `key`. `seeds` and `tests` are computed from the other tables.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from normtune.adapters.fingerprint import same_base
from normtune.errors import InputError
from normtune.runtime.files import atomic_write, read_json, write_json, write_text
from normtune.studies.cell import RESULT, failure_reason, is_finished
from normtune.studies.paper_tables import latex, markdown
from normtune.studies.plan import Cell
from normtune.studies.pooling import Row, Tables, pool_folds
from normtune.studies.run import current_plan
from normtune.studies.spec import Study
from normtune.studies.statistics import aggregate_seeds, paired_tests

# table -> column -> SQLite type; JSON columns are text in the database
SCHEMA: dict[str, dict[str, str]] = {
    "cells": {
        "key": "TEXT PRIMARY KEY", "status": "TEXT", "error": "TEXT", "grids": "JSON", "model": "TEXT",
        "model_path": "TEXT", "recipe": "TEXT", "recipe_text": "TEXT", "resolved": "TEXT",
        "trained_on": "TEXT", "share": "REAL", "seed": "INTEGER", "fold": "INTEGER", "rate_source": "TEXT",
        "rates": "JSON", "budget": "JSON", "pairs_available": "INTEGER", "pairs_seen": "INTEGER", "steps": "INTEGER",
        "trainable": "INTEGER", "total": "INTEGER", "trainable_share": "REAL", "train_seconds": "REAL",
        "train_pairs_per_second": "REAL", "train_peak_bytes": "INTEGER", "final_loss": "REAL",
        "passes": "REAL", "validation_metric": "TEXT", "best_step": "INTEGER", "best_score": "REAL",
        "stopped_early": "INTEGER", "validation_seconds": "REAL", "train_bytes_above_base": "INTEGER",
        "changed": "REAL", "warning": "TEXT", "computed_once": "TEXT", "base_fingerprint": "TEXT",
        "commit": "TEXT", "versions": "JSON", "hardware": "JSON", "started": "TEXT", "finished": "TEXT",
        "config": "JSON",
    },
    "evaluations": {
        "key": "TEXT", "dataset": "TEXT", "role": "TEXT", "task": "TEXT", "split": "TEXT", "fold": "INTEGER",
        "rows": "INTEGER", "images": "INTEGER", "split_hash": "TEXT", "normalisation": "JSON",
        "seconds": "REAL", "pairs_per_second": "REAL", "peak_bytes": "INTEGER", "folder": "TEXT",
    },
    "metrics": {
        "key": "TEXT", "dataset": "TEXT", "role": "TEXT", "split": "TEXT", "fold": "INTEGER", "metric": "TEXT",
        "value": "REAL", "low": "REAL", "high": "REAL", "rows": "INTEGER", "images": "INTEGER",
    },
    "forgetting": {
        "key": "TEXT", "dataset": "TEXT", "metric": "TEXT", "base": "REAL", "tuned": "REAL",
        "forgotten": "REAL",
    },
    "norms": {
        "key": "TEXT", "name": "TEXT", "part": "TEXT", "layer": "INTEGER", "kind": "TEXT",
        "count": "INTEGER", "relative": "REAL", "rms": "REAL",
    },
    "losses": {
        "key": "TEXT", "step": "INTEGER", "loss": "REAL",
    },
    "curves": {
        "key": "TEXT", "step": "INTEGER", "pairs": "INTEGER", "passes": "REAL", "seconds": "REAL",
        "train_loss": "REAL", "validation_loss": "REAL", "metric": "TEXT", "score": "REAL", "metrics": "JSON",
        "is_best": "INTEGER",
    },
    "seeds": {
        "grid": "TEXT", "model": "TEXT", "trained_on": "TEXT", "share": "REAL", "recipe": "TEXT",
        "rate": "TEXT", "dataset": "TEXT", "role": "TEXT", "metric": "TEXT", "seeds": "INTEGER",
        "rows": "INTEGER", "images": "INTEGER", "mean": "REAL", "low": "REAL", "high": "REAL",
        "least": "REAL", "most": "REAL",
    },
    "tests": {
        "grid": "TEXT", "model": "TEXT", "trained_on": "TEXT", "share": "REAL", "dataset": "TEXT",
        "role": "TEXT", "metric": "TEXT", "recipe": "TEXT", "against": "TEXT", "difference": "REAL",
        "low": "REAL", "high": "REAL", "p": "REAL", "p_holm": "REAL", "rows": "INTEGER",
        "images": "INTEGER", "seeds": "INTEGER", "method": "TEXT", "question": "TEXT", "first": "REAL",
        "second": "REAL", "smallest_difference": "REAL", "margin": "REAL", "equivalent": "INTEGER",
        "no_worse": "INTEGER",
    },
}  # fmt: skip


def write_tables(study: Study, out: Path) -> list[Path]:
    """Write the tables of all finished and failed cells; return the paths of the files.

    Raises:
        InputError: cells of one model have different bases, or a file cannot be read or written.
    """
    tables = tabulate(study, out)
    excluded = {"datasets": {"__all__": {"root"}}}  # data folders of this machine; results may be published
    spec = study.model_dump(mode="json", exclude=excluded)
    write_json(out / "results.json", {"study": study.study, "about": study.about, "spec": spec, **tables})
    _write_sqlite(out / "results.sqlite", tables)
    write_text(out / "tables.md", markdown(study, tables))
    write_text(out / "tables.tex", latex(study, tables))
    return [out / name for name in ("results.sqlite", "results.json", "tables.md", "tables.tex")]


def read_tables(out: Path) -> Tables:
    """Read the tables of a study's folder, or raise an `InputError` if it has none; JSON columns are objects."""
    results = read_json(out / "results.json")
    return {name: results.get(name, []) for name in SCHEMA}  # files of version 0.1 have fewer tables


def tabulate(study: Study, out: Path) -> Tables:
    """All tables of the cells that are finished or failed now; an `InputError` if a model has different bases."""
    tables: dict[str, list[Row]] = {name: [] for name in SCHEMA}
    for cell in current_plan(study, out).cells:
        _add_cell_rows(tables, cell, out)
    _check_bases(tables["cells"])
    tables["forgetting"] = list(_forgetting_rows(tables))
    runs = pool_folds(tables, out)
    tables["seeds"] = aggregate_seeds(runs)
    tables["tests"] = paired_tests(study, runs, out)
    return tables


def _add_cell_rows(tables: dict[str, list[Row]], cell: Cell, out: Path) -> None:
    """Add the rows of one cell to the tables that are read from its files."""
    directory = cell.directory(out)
    done = is_finished(out, cell)
    error = None if done else failure_reason(out, cell)
    result = read_json(directory / RESULT) if done else {}
    training = result.get("training") or {}
    row = {
        "key": cell.key,
        "status": "done" if done else "failed" if error else "missing",
        "error": error,
        **{name: getattr(cell, name) for name in ("model", "model_path", "recipe", "recipe_text", "trained_on")},
        **{name: getattr(cell, name) for name in ("share", "seed", "fold", "rate_source", "rates", "budget")},
        "grids": list(cell.grids),
        "resolved": training.get("recipe"),
        "pairs_seen": training.get("pairs"),
        "trainable": training.get("trainable", 0 if done else None),
        "trainable_share": training.get("share", 0.0 if done else None),
        "train_seconds": training.get("seconds"),
        "train_pairs_per_second": training.get("pairs_per_second"),
        "train_peak_bytes": training.get("peak_memory_bytes"),
        "train_bytes_above_base": training.get("peak_above_base_bytes"),
        "config": cell.train and cell.train.model_dump(mode="json", exclude={"out", "root", "overwrite", "splits"}),
    }
    copied_fields = (
        *("pairs_available", "steps", "total", "final_loss", "changed", "warning", "computed_once"),
        *("passes", "validation_metric", "best_step", "best_score", "stopped_early", "validation_seconds"),
    )
    row |= {name: training.get(name) for name in copied_fields}
    row |= {
        name: result.get(name) for name in ("base_fingerprint", "commit", "versions", "hardware", "started", "finished")
    }
    tables["cells"].append({name: row[name] for name in SCHEMA["cells"]})
    if not done:
        return
    roles = {evaluation.folder: evaluation for evaluation in cell.evaluations}
    for evaluation in result["evaluations"]:
        if evaluation["folder"] not in roles:
            continue  # the study's file no longer asks for this evaluation
        role, fold = roles[evaluation["folder"]].role, roles[evaluation["folder"]].config.fold
        dataset, split = evaluation["dataset"], evaluation["split"]
        shared_columns = {"key": cell.key, "dataset": dataset, "role": role, "split": split, "fold": fold}
        tables["evaluations"].append(
            shared_columns
            | {name: evaluation[name] for name in ("task", "rows", "images", "split_hash", "normalisation", "seconds")}
            | {
                "pairs_per_second": evaluation["pairs_per_second"],
                "peak_bytes": evaluation["peak_memory_bytes"],
                "folder": f"cells/{cell.key}/evaluations/{evaluation['folder']}",
            }
        )
        for name, metric in evaluation["metrics"].items():
            numbers = {end: metric[end] for end in ("value", "low", "high", "rows", "images")}
            tables["metrics"].append({**shared_columns, "metric": name, **numbers})
    if training:
        info = read_json(directory / "adapter" / "adapter.json")["metrics"]["training"]
        tables["norms"] += [{"key": cell.key, **norm} for norm in info.get("norms", ())]
        tables["losses"] += [{"key": cell.key, "step": step, "loss": loss} for step, loss in info["loss"]]
        tables["curves"] += _curve_rows(cell.key, training)


def _curve_rows(key: str, training: Row) -> Iterator[Row]:
    """The rows of the table `curves` of one cell."""
    metric = training.get("validation_metric")
    for point in training.get("curve", ()):
        score = point["validation_loss"] if metric == "loss" else point["metrics"][metric]
        is_best = int(point["step"] == training["best_step"])
        yield {"key": key, **point, "metric": metric, "score": score, "is_best": is_best}


def _check_bases(cells: list[Row]) -> None:
    """Raise an InputError if two cells of one model have bases with different fingerprints."""
    first: dict[str, Row] = {}
    for cell in cells:
        if (fingerprint := cell["base_fingerprint"]) is None:
            continue
        other = first.setdefault(cell["model"], cell)
        if not same_base(fingerprint, other["base_fingerprint"]):
            raise InputError(
                f"model {cell['model']}: cells {other['key']} and {cell['key']} have different bases under "
                "one name. Remove the cells of the older base, or use another --out."
            )


def _forgetting_rows(tables: Tables) -> Iterator[Row]:
    """How much each trained model lost on its base's own task."""
    cells = {cell["key"]: cell for cell in tables["cells"]}
    home_rows = [row for row in tables["metrics"] if row["role"] == "home"]
    base_values = {
        (cells[row["key"]]["model"], row["dataset"], row["metric"]): row["value"]
        for row in home_rows
        if cells[row["key"]]["trained_on"] is None
    }
    for row in home_rows:
        cell = cells[row["key"]]
        base_value = base_values.get((cell["model"], row["dataset"], row["metric"]))
        if cell["trained_on"] is not None and base_value is not None:
            lost = {"base": base_value, "tuned": row["value"], "forgotten": base_value - row["value"]}
            yield {name: row[name] for name in ("key", "dataset", "metric")} | lost


def _write_sqlite(path: Path, tables: Tables) -> None:
    """Write the tables to a new database that replaces the file at `path`."""
    with atomic_write(path) as temporary:
        temporary.unlink(missing_ok=True)
        connection = sqlite3.connect(temporary)
        try:
            with connection:
                for name, columns in SCHEMA.items():
                    definitions = (f'"{column}" {kind.replace("JSON", "TEXT")}' for column, kind in columns.items())
                    connection.execute(f'CREATE TABLE "{name}" ({", ".join(definitions)})')
                    values = [[_to_sql(row[column], kind) for column, kind in columns.items()] for row in tables[name]]
                    connection.executemany(f'INSERT INTO "{name}" VALUES ({", ".join("?" * len(columns))})', values)
        finally:
            connection.close()


def _to_sql(value: Any, kind: str) -> Any:
    """A value as SQLite stores it: JSON columns hold text."""
    return json.dumps(value, ensure_ascii=False) if kind == "JSON" and value is not None else value
