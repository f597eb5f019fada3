"""Notices that the rows of a study's data, or its bases, have changed since its cells ran.

A cell's key has the options, not the contents of files. Each cell therefore records a digest of the rows that it
reads (`inputs.json`) and the fingerprint of its base. What has changed is run again; the former files are moved
aside, not deleted. Studies of version 0.1 have no digests: only their bases are compared.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

from normtune.data.registry import open_configured
from normtune.errors import InputError
from normtune.evaluation.config import EvaluateConfig
from normtune.runtime.files import read_json, write_json
from normtune.studies.plan import Cell
from normtune.training.config import TrainConfig

RESULT = "result.json"  # in a cell's folder: its result
INPUTS = "inputs.json"  # in a cell's folder: the digest of the rows of its training and of each evaluation
TRAINING = "training"  # the name of the training in that file; evaluations have the names of their folders


def rows_digest(config: TrainConfig | EvaluateConfig) -> str:
    """The digest of the rows that a run reads: ids, images' names, questions and answers; not the pixels."""
    dataset = open_configured(config)
    examples = [*dataset.split(config.split)]
    if isinstance(config, EvaluateConfig):
        examples = examples[: config.limit]
    elif config.validate_every is not None:
        examples += dataset.split(config.validation_split or "validate")
    rows = [[example.id, *example.images, example.kind, example.question, example.answer] for example in examples]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:32]


def record_rows(directory: Path, name: str, config: TrainConfig | EvaluateConfig) -> None:
    """Write the digest of the rows of a training or an evaluation that begins now to the cell's folder."""
    write_json(directory / INPUTS, _recorded(directory) | {name: rows_digest(config)})


def read_result(directory: Path) -> dict[str, Any]:
    """Read the result of a finished cell; the `InputError` of a damaged one says how the study continues."""
    path = directory / RESULT
    try:
        result: dict[str, Any] = read_json(path)
        if {"evaluations"} <= set(result):
            return result
        reason = f"{path} is not the result of a cell."
    except InputError as error:
        reason = str(error)
    raise InputError(f"{reason} Remove this file: the cell then runs again from what is finished.")


def _recorded(directory: Path) -> dict[str, str]:
    path = directory / INPUTS
    return dict(read_json(path)) if path.is_file() else {}


class Changes:
    """Compares cells with the data and the bases as they are now; reads each of them once."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self._digests: dict[str, str | None] = {}
        self._fingerprints: dict[tuple[str, str], str] = {}

    def find(self, cells: Iterable[Cell]) -> dict[str, dict[str, str]]:
        """The cells with results of other data or another base, by their keys.

        Returns:
            key -> the training or an evaluation -> a description. Data that cannot be opened here counts as unchanged.
        """
        cells = list(cells)
        other_bases = {cell.model_path for cell in cells if self._has_other_base(cell)}
        changes: dict[str, dict[str, str]] = {}
        for cell in cells:
            recorded = _recorded(cell.directory(self.out))
            configs: list[tuple[str, str, Any]] = [(e.folder, e.dataset, e.config) for e in cell.evaluations]
            configs += [(TRAINING, str(cell.trained_on), cell.train)] if cell.train else []
            for name, dataset, config in configs:
                if name in recorded and self._digest(config) not in (None, recorded[name]):
                    changes.setdefault(cell.key, {})[name] = f"the rows of {dataset} ({config.split})"
            if cell.model_path in other_bases and self._is_older_than_base(cell):
                changes.setdefault(cell.key, {})[TRAINING] = f"the base {cell.model_path}"
        return changes

    def _digest(self, config: TrainConfig | EvaluateConfig) -> str | None:
        options = [config.data_options(), config.split, getattr(config, "limit", None)]
        options += [getattr(config, name, None) for name in ("validate_every", "validation_split")]
        key = json.dumps([type(config).__name__, *options], sort_keys=True)
        if key not in self._digests:
            try:
                self._digests[key] = rows_digest(config)
            except InputError:  # the run of a cell that needs these rows reports the error
                self._digests[key] = None
        return self._digests[key]

    def _is_older_than_base(self, cell: Cell) -> bool:
        """Whether a finished cell began before a file of its base in a local folder was written."""
        directory, base = cell.directory(self.out), Path(cell.model_path)
        if cell.model_path == "nano" or not base.is_dir() or not (directory / RESULT).is_file():
            return False
        started = datetime.fromisoformat(read_result(directory)["started"]).timestamp()
        return any(path.stat().st_ctime >= started for path in base.iterdir())

    def _has_other_base(self, cell: Cell) -> bool:
        """Whether a trained cell's base has other values now; the base is loaded only if its files are newer."""
        from normtune.adapters.fingerprint import fingerprint, same_base
        from normtune.models.loading import load

        if cell.train is None or not self._is_older_than_base(cell):
            return False
        key = (cell.model_path, cell.train.dtype)
        if key not in self._fingerprints:
            self._fingerprints[key] = fingerprint(load(cell.model_path, dtype=cell.train.dtype).model)
        return not same_base(read_result(cell.directory(self.out))["base_fingerprint"], self._fingerprints[key])


def move_aside(directory: Path, changed: Iterable[str]) -> list[Path]:
    """Move a whole cell, or some of its evaluations, aside, so that it runs again; return where the files are now."""
    changed = set(changed)
    sources = [directory] if TRAINING in changed else [directory / "evaluations" / name for name in sorted(changed)]
    if TRAINING not in changed:
        (directory / RESULT).unlink(missing_ok=True)
        recorded = _recorded(directory)
        write_json(directory / INPUTS, {name: digest for name, digest in recorded.items() if name not in changed})
    targets = []
    for folder in sources:
        if folder.is_dir():
            number = 1 + len(list(folder.parent.glob(f"{folder.name}.changed-*")))
            targets.append(folder.rename(folder.with_name(f"{folder.name}.changed-{number}")))
    return targets
