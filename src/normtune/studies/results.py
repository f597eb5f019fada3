"""The results of a study as tables: `results.sqlite`, `results.json`; docs/study.md has every column.

One row a cell stands in `cells`; what a cell has several of (evaluations, metrics, norms, losses) has a table
of its own, joined by `key`. `seeds` and `tests` are made of the others.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from normtune.adapters.fingerprint import same_base
from normtune.errors import InputError
from normtune.runtime.files import atomic_write, read_json, write_json, write_text
from normtune.studies.cell import RESULT, cell_directory, failure_reason, is_finished
from normtune.studies.paper_tables import latex, markdown
from normtune.studies.plan import Cell
from normtune.studies.run import current_plan
from normtune.studies.spec import Study
from normtune.studies.statistics import over_seeds, paired_tests

Row = dict[str, Any]
Tables = dict[str, list[Row]]

SCHEMA: dict[str, dict[str, str]] = {
    "cells": {
        "key": "TEXT PRIMARY KEY", "status": "TEXT", "error": "TEXT", "grids": "JSON", "model": "TEXT",
        "model_path": "TEXT", "recipe": "TEXT", "recipe_text": "TEXT", "resolved": "TEXT",
        "trained_on": "TEXT", "share": "REAL", "seed": "INTEGER", "rate_source": "TEXT", "rates": "JSON",
        "budget": "JSON", "pairs_available": "INTEGER", "pairs_seen": "INTEGER", "steps": "INTEGER",
        "trainable": "INTEGER", "total": "INTEGER", "trainable_share": "REAL", "train_seconds": "REAL",
        "train_pairs_per_second": "REAL", "train_peak_bytes": "INTEGER", "final_loss": "REAL",
        "changed": "REAL", "warning": "TEXT", "computed_once": "TEXT", "base_fingerprint": "TEXT",
        "commit": "TEXT", "versions": "JSON", "hardware": "JSON", "started": "TEXT", "finished": "TEXT",
        "config": "JSON",
    },
    "evaluations": {
        "key": "TEXT", "dataset": "TEXT", "role": "TEXT", "task": "TEXT", "split": "TEXT",
        "rows": "INTEGER", "images": "INTEGER", "split_hash": "TEXT", "normalisation": "JSON",
        "seconds": "REAL", "pairs_per_second": "REAL", "peak_bytes": "INTEGER", "folder": "TEXT",
    },
    "metrics": {
        "key": "TEXT", "dataset": "TEXT", "role": "TEXT", "split": "TEXT", "metric": "TEXT",
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
    "seeds": {
        "grid": "TEXT", "model": "TEXT", "trained_on": "TEXT", "share": "REAL", "recipe": "TEXT",
        "rate": "TEXT", "dataset": "TEXT", "role": "TEXT", "metric": "TEXT", "seeds": "INTEGER",
        "mean": "REAL", "low": "REAL", "high": "REAL", "least": "REAL", "most": "REAL",
    },
    "tests": {
        "grid": "TEXT", "model": "TEXT", "trained_on": "TEXT", "share": "REAL", "dataset": "TEXT",
        "role": "TEXT", "metric": "TEXT", "recipe": "TEXT", "against": "TEXT", "difference": "REAL",
        "low": "REAL", "high": "REAL", "p": "REAL", "p_holm": "REAL", "rows": "INTEGER",
        "images": "INTEGER", "seeds": "INTEGER", "method": "TEXT",
    },
}  # fmt: skip


def write_tables(study: Study, out: Path) -> list[Path]:
    """Tabulate what is finished and what failed; returns the files written.

    Raises:
        InputError: cells of one model were made of different bases, or a file cannot be read or written.
    """
    tables = tabulate(study, out)
    here = {"datasets": {"__all__": {"root"}}}  # folders of this machine: results are passed on
    spec = study.model_dump(mode="json", exclude=here)
    write_json(out / "results.json", {"study": study.study, "about": study.about, "spec": spec, **tables})
    _write_sqlite(out / "results.sqlite", tables)
    write_text(out / "tables.md", markdown(study, tables))
    write_text(out / "tables.tex", latex(study, tables))
    return [out / name for name in ("results.sqlite", "results.json", "tables.md", "tables.tex")]


def read_tables(out: Path) -> Tables:
    """The tables of a study's folder, JSON columns as objects.

    Raises:
        InputError: there are none.
    """
    found = read_json(out / "results.json")
    return {name: found[name] for name in SCHEMA}


def tabulate(study: Study, out: Path) -> Tables:
    """All tables of what is there now.

    Raises:
        InputError: cells of one model were made of different bases.
    """
    tables: Tables = {name: [] for name in SCHEMA}
    for cell in current_plan(study, out).cells:
        _add(tables, cell, out)
    _check_bases(tables["cells"])
    tables["forgetting"] = list(_forgetting(tables))
    tables["seeds"] = over_seeds(tables)
    tables["tests"] = paired_tests(study, tables, out)
    return tables


def _add(tables: Tables, cell: Cell, out: Path) -> None:
    """The rows of one cell."""
    directory = cell_directory(out, cell)
    done = is_finished(out, cell)
    error = None if done else failure_reason(out, cell)
    found = read_json(directory / RESULT) if done else {}
    training = found.get("training") or {}
    row = {
        "key": cell.key,
        "status": "done" if done else "failed" if error else "missing",
        "error": error,
        **{
            name: getattr(cell, name)
            for name in ("model", "model_path", "recipe", "recipe_text", "trained_on")
        },
        **{name: getattr(cell, name) for name in ("share", "seed", "rate_source", "rates", "budget")},
        "grids": list(cell.grids),
        "resolved": training.get("recipe"),
        "pairs_seen": training.get("pairs"),
        "trainable": training.get("trainable", 0 if done else None),
        "trainable_share": training.get("share", 0.0 if done else None),
        "train_seconds": training.get("seconds"),
        "train_pairs_per_second": training.get("pairs_per_second"),
        "train_peak_bytes": training.get("peak_memory_bytes"),
        "config": cell.train and cell.train.model_dump(mode="json", exclude={"out", "root"}),
    }
    plain = ("pairs_available", "steps", "total", "final_loss", "changed", "warning", "computed_once")
    row |= {name: training.get(name) for name in plain}
    row |= {
        name: found.get(name)
        for name in ("base_fingerprint", "commit", "versions", "hardware", "started", "finished")
    }
    tables["cells"].append({name: row[name] for name in SCHEMA["cells"]})
    if not done:
        return
    roles = {one.folder: one for one in cell.evaluations}
    for one in found["evaluations"]:
        if one["folder"] not in roles:
            continue  # of another form of the study's file
        role = roles[one["folder"]].role
        about = {"key": cell.key, "dataset": one["dataset"], "role": role, "split": one["split"]}
        tables["evaluations"].append(
            about
            | {
                name: one[name]
                for name in ("task", "rows", "images", "split_hash", "normalisation", "seconds")
            }
            | {
                "pairs_per_second": one["pairs_per_second"],
                "peak_bytes": one["peak_memory_bytes"],
                "folder": f"cells/{cell.key}/evaluations/{one['folder']}",
            }
        )
        for name, metric in one["metrics"].items():
            numbers = {end: metric[end] for end in ("value", "low", "high", "rows", "images")}
            tables["metrics"].append({**about, "metric": name, **numbers})
    if training:
        about = read_json(directory / "adapter" / "adapter.json")["metrics"]["training"]
        tables["norms"] += [{"key": cell.key, **norm} for norm in about.get("norms", ())]
        tables["losses"] += [{"key": cell.key, "step": step, "loss": loss} for step, loss in about["loss"]]


def _check_bases(cells: list[Row]) -> None:
    first: dict[str, Row] = {}
    for cell in cells:
        if (mark := cell["base_fingerprint"]) is None:
            continue
        other = first.setdefault(cell["model"], cell)
        if not same_base(mark, other["base_fingerprint"]):
            raise InputError(
                f"model {cell['model']}: cells {other['key']} and {cell['key']} were made of different bases "
                "under one name. Remove the cells of the older base, or use another --out."
            )


def _forgetting(tables: Tables) -> Iterator[Row]:
    """What each tuned model lost on its base's own task."""
    cells = {cell["key"]: cell for cell in tables["cells"]}
    home = [row for row in tables["metrics"] if row["role"] == "home"]
    base = {
        (cells[row["key"]]["model"], row["dataset"], row["metric"]): row["value"]
        for row in home
        if cells[row["key"]]["trained_on"] is None
    }
    for row in home:
        cell = cells[row["key"]]
        before = base.get((cell["model"], row["dataset"], row["metric"]))
        if cell["trained_on"] is not None and before is not None:
            yield {
                "key": row["key"],
                "dataset": row["dataset"],
                "metric": row["metric"],
                "base": before,
                "tuned": row["value"],
                "forgotten": before - row["value"],
            }


def _write_sqlite(path: Path, tables: Mapping[str, list[Row]]) -> None:
    with atomic_write(path) as temporary:
        temporary.unlink(missing_ok=True)
        connection = sqlite3.connect(temporary)
        try:
            with connection:
                for name, columns in SCHEMA.items():
                    words = ", ".join(
                        f'"{column}" {kind.replace("JSON", "TEXT")}' for column, kind in columns.items()
                    )
                    connection.execute(f'CREATE TABLE "{name}" ({words})')
                    marks = ", ".join("?" * len(columns))
                    connection.executemany(
                        f'INSERT INTO "{name}" VALUES ({marks})',
                        [
                            [_stored(row[column], kind) for column, kind in columns.items()]
                            for row in tables[name]
                        ],
                    )
        finally:
            connection.close()


def _stored(value: Any, kind: str) -> Any:
    return json.dumps(value, ensure_ascii=False) if kind == "JSON" and value is not None else value
