"""Data sets with `folds: N` in a study's file: each fold in turn is the test split, the next one validates.

The study writes one file of splits for such a data set, `splits/NAME-N-folds-HASH.json` in its folder, and trains one
cell for each fold. Each row is in the test split of exactly one of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from normtune.data.options import DataOptions
from normtune.data.registry import open_configured
from normtune.data.split_files import make_split_file, read_split_file, rows_digest, split_file_text
from normtune.errors import InputError
from normtune.runtime.files import file_sha256, write_text
from normtune.studies.spec import Data, Study


def each_fold(options: Data) -> Sequence[int | None]:
    """The number of each fold that is a test split: 0, 1, ... for a data set with folds, [None] for any other."""
    return range(options.folds) if options.folds else [None]


def fold_options(options: Data, fold: int | None) -> dict[str, Any]:
    """The options that a data set has in common with `train` and `evaluate`, with the test fold if it has folds."""
    values = options.model_dump(include=set(DataOptions.model_fields))
    return values | {"fold": fold, "split_seed": None} if options.folds else values


def splits_identity(options: DataOptions) -> str | None:
    """What a file of splits contains, for a cell's key, which must not depend on where the file is.

    Returns:
        For the folds of a study, their number and seed: the file is a function of these and of the rows. Otherwise
        the digest of the file. None without a file.

    Raises:
        InputError: the file cannot be read.
    """
    if isinstance(options, Data) and options.folds:
        return f"{options.folds} folds, seed {options.split_seed or 0}"
    if options.splits is None:
        return None
    try:
        return file_sha256(options.splits)[:16]
    except OSError as error:
        raise InputError(f"cannot read {options.splits}: {error.strerror}. Write it with normtune split.") from error


def with_split_files(study: Study, out: Path) -> Study:
    """The study with the path of the file of splits of each data set with folds; the file may not be there yet."""
    datasets = {
        name: data.model_copy(update={"splits": _split_file(name, data, out)}) if data.folds else data
        for name, data in study.datasets.items()
    }
    return study.model_copy(update={"datasets": datasets})


def write_split_files(study: Study, out: Path) -> None:
    """Write the file of splits of each data set with folds, unless it is there and its rows are still the same.

    Raises:
        InputError: a data set cannot be opened, or has fewer groups of pictures than folds.
    """
    for name, data in study.datasets.items():
        if data.folds:
            file, dataset = _split_file(name, data, out), open_configured(data)
            if not file.is_file() or read_split_file(file).get("digest") != rows_digest(dataset):
                made = make_split_file(dataset, folds=data.folds, seed=data.split_seed or 0)
                write_text(file, split_file_text(made, file.suffix))


def _split_file(name: str, data: Data, out: Path) -> Path:
    """The file of splits; its name has a hash of the options that select the rows."""
    options = data.model_dump(mode="json", include=set(DataOptions.model_fields), exclude={"root", "splits"})
    digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:8]
    return out / "splits" / f"{name}-{data.folds}-folds-{digest}.json"
